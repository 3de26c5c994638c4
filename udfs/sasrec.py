"""SASRec (Kang and McAuley 2018, "Self-attentive sequential recommendation", arXiv 1808.09781): causal self-attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Shapes of a model; the defaults are those that A-LLMRec (arXiv 2404.11343) uses."""

    items: int
    dimension: int = 50
    max_length: int = 50
    blocks: int = 2
    heads: int = 1  # a divisor of dimension
    dropout: float = 0.5


class SasRec(nn.Module):
    """Parameters: items [I, d], which is both read and scored with; positions [max_length, d], 0 the most recent; blocks."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.items = nn.Parameter(0.02 * torch.randn(config.items, config.dimension))
        self.positions = nn.Parameter(0.02 * torch.randn(config.max_length, config.dimension))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.dimension)

    def forward(self, histories: torch.Tensor) -> torch.Tensor:
        """What follows each position: its product with `items` ranks the next item.

        Args:
            histories: [n, L] int64, oldest item first, PADDING before it; of more than max_length items the last count.

        Returns:
            [n, min(L, max_length), d]; zeros at padding, so an empty history says nothing.
        """
        histories = histories[:, -self.config.max_length :]
        length, real = histories.shape[1], histories >= 0
        x = F.embedding(histories.clamp(min=0), self.items) * self.config.dimension**0.5
        x = self.dropout(x + self.positions[:length].flip(0)) * real[..., None]
        allowed = real[:, None, :] & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        # Padding attends to itself: a row that may look nowhere would be 0 / 0.
        allowed = (allowed | torch.eye(length, dtype=torch.bool, device=x.device))[:, None]
        for block in self.blocks:
            x = block(x, allowed)
        return self.norm(x) * real[..., None]


class _Block(nn.Module):
    """x + dropout(g(norm(x))) for self-attention, then for a two-layer network (section 3.2)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.dimension
        self.heads, self.rate = config.heads, config.dropout
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.network = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(width, width)
        )

    def forward(self, x: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """x [n, L, d]; allowed [n, 1, L, L] of bool, True where a query (row) may look at a key (column)."""
        n, length, width = x.shape
        parts = self.inputs(self.attention_norm(x)).view(n, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=rate)
        x = x + self.dropout(self.output(found.transpose(1, 2).reshape(n, length, width)))
        return x + self.dropout(self.network(self.network_norm(x)))
