"""The processes that train one model together: each computes its part of a batch, and all add up what they found.

Every process holds the whole model and takes the same steps, so nothing but sums travels. On CPUs they go over gloo, on GPUs
over NCCL (torch.distributed, which Ray Train sets up).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed


@dataclass(frozen=True)
class Group:
    """This process is number `rank` of `size`; alone it needs no torch.distributed."""

    rank: int = 0
    size: int = 1

    def part(self, index: np.ndarray) -> np.ndarray:
        """This process's share of `index` [n]: consecutive, sizes differ by one at most, perhaps none."""
        return np.array_split(index, self.size)[self.rank]

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every process's `tensor`, in place and the same to the last bit everywhere."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Put the sum of all processes' gradients in place of each one's.

        A sparse gradient must be one of the same rows in every process. A dense parameter that had no part in one process's
        loss counts as zero there.
        """
        if self.size == 1:
            return
        pending = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient = parameter.grad
            values = gradient._values() if gradient.is_sparse else gradient
            pending.append(distributed.all_reduce(values, async_op=True))
        for work in pending:
            work.wait()

    def rows(self, compute: Callable[[np.ndarray], torch.Tensor], index: np.ndarray) -> torch.Tensor:
        """`compute(index)` [n, ...], each process having computed its part; the same to the last bit everywhere."""
        if self.size == 1:
            return compute(index)
        mine = self.part(index)
        # One row at least, so that a process without a part knows the shape of the others'.
        found = compute(mine if len(mine) else index[:1])
        whole = found.new_zeros((len(index), *found.shape[1:]))
        begin = sum(len(part) for part in np.array_split(index, self.size)[: self.rank])
        whole[begin : begin + len(mine)] = found[: len(mine)]
        return self.add(whole)
