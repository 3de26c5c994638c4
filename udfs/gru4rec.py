"""GRU4Rec (Hidasi et al. 2016, "Session-based recommendations with recurrent neural networks", arXiv 1511.06939).

The GRU's state is brought to the items' width by a linear layer, so that items are read and scored by one embedding. The loss
is that of udfs/sequence_training.py, not the paper's ranking losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Shapes of a model."""

    items: int
    dimension: int = 50
    max_length: int = 50
    hidden: int = 100
    layers: int = 1
    dropout: float = 0.3  # of what is read, and between layers


class Gru4Rec(nn.Module):
    """Parameters: items [I, d], which is both read (times sqrt(d), as SASRec does) and scored with; gru; output."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.items = nn.Parameter(0.02 * torch.randn(config.items, config.dimension))
        self.dropout = nn.Dropout(config.dropout)
        between = config.dropout if config.layers > 1 else 0.0
        self.gru = nn.GRU(config.dimension, config.hidden, config.layers, batch_first=True, dropout=between)
        self.output = nn.Linear(config.hidden, config.dimension)

    def forward(self, histories: torch.Tensor) -> torch.Tensor:
        """As `udfs.sasrec.SasRec.forward`: [n, L] -> [n, min(L, max_length), d], zeros at padding."""
        histories = histories[:, -self.config.max_length :]
        real = histories >= 0
        length = histories.shape[1]
        # The GRU begins with the first real item: padding goes behind the history, where it changes nothing.
        padding = length - real.sum(1, keepdim=True)
        place = torch.arange(length, device=histories.device)
        first = histories.gather(1, (place + padding) % length)
        x = self.dropout(F.embedding(first.clamp(min=0), self.items) * self.config.dimension**0.5)
        states = self.output(self.gru(x)[0])
        back = ((place - padding) % length)[..., None].expand_as(states)
        return states.gather(1, back) * real[..., None]
