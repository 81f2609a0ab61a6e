"""``python -m attn_ext.nmt`` says which commands there are."""

import sys

from . import __doc__ as about

if __name__ == "__main__":
    commands = [line for line in str(about).splitlines() if line.startswith("    python")]
    sys.exit("\n".join(["attn_ext.nmt has these commands, each with --help:", *commands]))
