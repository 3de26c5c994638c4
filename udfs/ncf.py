"""Neural CF by user and item numbers: NeuMF (He et al. 2017, "Neural collaborative filtering", arXiv 1708.05031).

Two parts with embeddings of their own. GMF: g = h . (p_u * q_i), a matrix factorisation with a weight for each dimension. MLP:
m = w . f([s_u; t_i]). Each is trained to rank alone, as the paper's pre-training does (section 3.4.1); a pair's score is the mean
of both logits (equation 13, alpha = 1/2), without its further training.

The score is no inner product, so no user and item vector stand for all of it. What represents them is the part that is one:
x_u = h * p_u and E_i = q_i, whose product is GMF's logit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from udfs import epochs
from udfs.bpr import NegativeSampler
from udfs.checkpoints import Checkpoints
from udfs.sequences import Sequences


@dataclass(frozen=True)
class Config:
    """Shapes of a model."""

    users: int
    items: int
    dimension: int = 50  # of GMF, and of the last hidden layer of the MLP
    layers: int = 2  # hidden layers of the MLP, each half as wide as the one before; at least 1


class NeuMf(nn.Module):
    """Parameters: gmf_users [U, d], gmf_items [I, d], gmf_weights [d] (h); mlp_users and mlp_items, mlp."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.dimension * 2 ** (config.layers - 1)

        def table(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(0.01 * torch.randn(rows, columns))  # as the paper starts (section 4.1)

        self.gmf_users, self.gmf_items = table(config.users, config.dimension), table(config.items, config.dimension)
        self.gmf_weights = nn.Parameter(torch.ones(config.dimension))
        self.mlp_users, self.mlp_items = table(config.users, width), table(config.items, width)
        hidden: list[nn.Module] = []
        for step in range(config.layers):
            into = 2 * width if step == 0 else width // 2 ** (step - 1)
            hidden += [nn.Linear(into, width // 2**step), nn.ReLU()]
        self.mlp = nn.Sequential(*hidden, nn.Linear(config.dimension, 1))

    def logits(self, users: torch.Tensor, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """GMF's and the MLP's logit of each pair: users and items, int64 of one shape."""
        p, q = F.embedding(users, self.gmf_users), F.embedding(items, self.gmf_items)
        both = torch.cat([F.embedding(users, self.mlp_users), F.embedding(items, self.mlp_items)], -1)
        return (p * q) @ self.gmf_weights, self.mlp(both).squeeze(-1)

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """The score of each pair: users and items, int64 of one shape."""
        gmf, mlp = self.logits(users, items)
        return (gmf + mlp) / 2


@dataclass(frozen=True)
class Options(epochs.Options):
    """How to train."""

    learning_rate: float = 3e-3
    batch_size: int = 4096  # positives
    negatives: int = 4  # for each positive


def train(
    model: NeuMf,
    histories: Sequences,
    options: Options,
    log: Callable[[str], None],
    *,
    validate: Callable[[], float] | None = None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, Any]:
    """Train both parts in place with Adam by binary cross-entropy against items that the user has no event with.

    A user without an event has rows of zeros before and after.

    Args:
        histories: of the users 0 .. U - 1; the order within one is not read.
        validate, checkpoints, and what is returned and raised: see `udfs.epochs.run`.
    """
    device = model.gmf_users.device
    users, items = (torch.from_numpy(part).to(device) for part in (histories.rows, histories.items))
    with torch.no_grad():
        for table in (model.gmf_users, model.mlp_users):
            table[torch.from_numpy(histories.lengths == 0).to(device)] = 0.0
    generator = torch.Generator(device=device)
    draw = NegativeSampler(users, items, model.config.items, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)

    def epoch(seed: int) -> float:
        generator.manual_seed(seed)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in torch.randperm(len(users), generator=generator, device=device).split(options.batch_size):
            others = users[batch].repeat(options.negatives)
            negative, counts = draw(others)
            labels = torch.cat([torch.ones(len(batch), device=device), torch.zeros(len(others), device=device)])
            weights = torch.cat([torch.ones(len(batch), device=device), counts.float()])
            logits = model.logits(torch.cat([users[batch], others]), torch.cat([items[batch], negative]))
            loss = sum(F.binary_cross_entropy_with_logits(part, labels, weights) for part in logits)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
        return float(total) / max(1, len(users))

    identity = epochs.identity(model, histories, options)
    return epochs.run(model, optimizer, epoch, options, log, validate, checkpoints, identity)
