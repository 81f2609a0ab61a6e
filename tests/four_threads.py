"""A plugin of pytest that lets PyTorch's operations use four threads in every test."""

import torch


def pytest_sessionstart() -> None:
    torch.set_num_threads(4)
