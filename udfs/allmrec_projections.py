"""F_U and F_I of A-LLMRec's second stage (arXiv 2404.11343, section 4.2): users and items as tokens of a language model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from udfs import module_files
from udfs.allmrec_examples import AllmrecError
from udfs.devices import forked
from udfs.vectors import Matrix


@dataclass(frozen=True)
class Config:
    """Widths: of x_u, of the joint item vectors, and of the language model's token embeddings."""

    users: int
    joint: int
    tokens: int


class Projections(nn.Module):
    """Two MLPs as in the paper's released code: Linear, LayerNorm, LeakyReLU (users) or GELU (items), Linear.

    Beyond it what they read is standardised, since joint vectors, being sigmoids, lie close together at first; and what they
    write is scaled so that a soft token is about as large as a token. `fit` sets both.
    """

    user_offset: torch.Tensor
    user_scale: torch.Tensor
    item_offset: torch.Tensor
    item_scale: torch.Tensor
    size: torch.Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.user = _mlp(config.users, config.tokens, nn.LeakyReLU())
        self.item = _mlp(config.joint, config.tokens, nn.GELU())
        self.register_buffer("user_offset", torch.zeros(config.users))
        self.register_buffer("user_scale", torch.ones(config.users))
        self.register_buffer("item_offset", torch.zeros(config.joint))
        self.register_buffer("item_scale", torch.ones(config.joint))
        self.register_buffer("size", torch.ones(()))

    @torch.no_grad()
    def fit(self, users: Matrix, joint: Matrix, tokens: torch.Tensor) -> None:
        """Standardise by users [n, users] and joint item vectors [m, joint]; scale to token embeddings [vocabulary, tokens]."""
        for part, vectors in (("user", users), ("item", joint)):
            std = vectors.std(0)
            getattr(self, f"{part}_offset").copy_(torch.from_numpy(vectors.mean(0).astype(np.float32)))
            # A dimension that never varies carries nothing: its standardised value stays 0, not 0 / 0.
            getattr(self, f"{part}_scale").copy_(torch.from_numpy(np.where(std > 1e-6, std, 1.0).astype(np.float32)))
        self.size.copy_(tokens.float().square().mean().sqrt())

    def users(self, users: torch.Tensor) -> torch.Tensor:
        """O_u [n, tokens] of x_u [n, users]."""
        return self.user((users - self.user_offset) / self.user_scale) * self.size

    def items(self, joint: torch.Tensor) -> torch.Tensor:
        """O_i [n, tokens] of joint item vectors [n, joint]."""
        return self.item((joint - self.item_offset) / self.item_scale) * self.size


def build(config: Config, seed: int) -> Projections:
    """Untrained projections; `seed` decides their start."""
    with forked():
        torch.manual_seed(seed)
        return Projections(config)


def dump(model: Projections) -> dict[str, bytes]:
    """The projections as files: model.safetensors and config.json."""
    return module_files.dump(model, asdict(model.config))


def load(files: dict[str, bytes]) -> Projections:
    """The projections of `dump`'s files, in evaluation mode; raises AllmrecError if they are not what they should be."""

    def made(fields: dict[str, Any]) -> Projections:
        return Projections(Config(**fields))

    return module_files.load(files, made, "A-LLMRec projection", AllmrecError)


def _mlp(width: int, tokens: int, activation: nn.Module) -> nn.Sequential:
    mlp = nn.Sequential(nn.Linear(width, tokens), nn.LayerNorm(tokens), activation, nn.Linear(tokens, tokens))
    for layer in (mlp[0], mlp[3]):
        nn.init.xavier_normal_(layer.weight)
    return mlp
