"""AdamW for tables of which a step touches a few rows: what it costs is in proportion to those rows, not to the table.

A row's moments and its number of steps move only when it has a gradient, as those of torch.optim.SparseAdam and of lazy Adam
elsewhere do; a row that is touched in every step is updated exactly as by torch.optim.AdamW (Loshchilov and Hutter 2019,
arXiv 1711.05101). Decay, too, falls on touched rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_BETAS, _EPS = (0.9, 0.999), 1e-8  # AdamW's own


class RowAdamW(torch.optim.Optimizer):
    """For parameters [rows, ...] whose gradients are sparse in the first dimension (COO).

    State of a parameter: exp_avg and exp_avg_sq like it, step [rows] float32.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the rows that have a gradient. `closure` is not called."""
        first, second = _BETAS
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(len(parameter), device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                step = state["step"][rows] + 1
                mean = state["exp_avg"][rows].lerp_(values, 1 - first)
                square = state["exp_avg_sq"][rows].mul_(second).addcmul_(values, values, value=1 - second)
                state["step"][rows], state["exp_avg"][rows], state["exp_avg_sq"][rows] = step, mean, square
                step = step.view(-1, *[1] * (values.ndim - 1))
                root = square.sqrt() / (1 - second**step).sqrt() + _EPS
                moved = parameter[rows] * (1 - group["lr"] * group["weight_decay"])
                parameter[rows] = moved - group["lr"] / (1 - first**step) * (mean / root)
