"""NextItNet (Yuan et al. 2019, "A simple convolutional generative network for next item recommendation", arXiv 1808.05163).

Items are read and scored by one embedding. The loss is that of udfs/sequence_training.py, not the paper's softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

# Of the residual blocks of one round: a round sees 30 items back with kernels of 3.
_DILATIONS = (1, 4)


@dataclass(frozen=True)
class Config:
    """Shapes of a model."""

    items: int
    dimension: int = 50
    max_length: int = 50
    rounds: int = 2  # two residual blocks each
    kernel: int = 3
    dropout: float = 0.3  # of what is read and of the output


class NextItNet(nn.Module):
    """Parameters: items [I, d], which is both read (times sqrt(d), as SASRec does) and scored with; blocks; output."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.items = nn.Parameter(0.02 * torch.randn(config.items, config.dimension))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            _Block(config.dimension, config.kernel, dilation) for _ in range(config.rounds) for dilation in _DILATIONS
        )
        self.output = nn.Linear(config.dimension, config.dimension)

    def forward(self, histories: torch.Tensor) -> torch.Tensor:
        """As `udfs.sasrec.SasRec.forward`: [n, L] -> [n, min(L, max_length), d], zeros at padding."""
        histories = histories[:, -self.config.max_length :]
        real = (histories >= 0)[..., None]
        x = self.dropout(F.embedding(histories.clamp(min=0), self.items) * self.config.dimension**0.5) * real
        for block in self.blocks:
            x = block(x, real)
        return self.output(self.dropout(x)) * real


class _Block(nn.Module):
    """x + relu(norm(conv(relu(norm(conv(x)))))), the second convolution twice as dilated (section 3.3, figure 3b)."""

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, kernel, dilation=step) for step in (dilation, 2 * dilation)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """x [n, L, d], zeros where not `real` [n, L, 1]: padding is then as the zeros that a convolution begins with."""
        found = x
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            before = (convolution.kernel_size[0] - 1) * convolution.dilation[0]
            found = convolution(F.pad(found.transpose(1, 2), (before, 0))).transpose(1, 2)
            found = F.relu(norm(found)) * real
        return x + found
