"""Speed and memory of additive attention against what users would pick instead."""
