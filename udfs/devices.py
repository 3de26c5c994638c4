"""Torch on the device that work runs on: random numbers that others do not notice, and memory that is given back."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager

import torch


def forked(device: torch.device | str = "cpu") -> AbstractContextManager[None]:
    """What is drawn within changes nothing without: of the CPU's generator, and of the GPU's if `device` is one.

    The GPU is named, since torch otherwise asks all that the driver lists, and fails where the driver is too old for it although
    nothing runs there.
    """
    on = torch.device(device)
    if on.type != "cuda":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[torch.cuda.current_device() if on.index is None else on.index])


def release(device: torch.device | str) -> None:
    """Give the memory of a GPU that nothing uses any more back to other processes, such as the actors of the stage to come."""
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
