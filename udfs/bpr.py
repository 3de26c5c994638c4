"""BPR matrix factorisation (Rendle et al. 2009, "BPR: Bayesian personalized ranking from implicit feedback") in torch.

The training loop is LightGCN's too (udfs/lightgcn.py): there the embeddings pass through the graph before they are scored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from udfs.vectors import Matrix

if TYPE_CHECKING:
    from udfs.cf_model import CfParams, Pairs

# [users + items, d] -> the same shape: what is scored, made from what is learnt.
Propagate = Callable[[torch.Tensor], torch.Tensor]

# Draws of a negative item; a triple whose last draw is still a positive does not count.
_DRAWS = 4


def bpr_loss(
    scored: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ego: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    weight_decay: float,
) -> torch.Tensor:
    """-mean(w ln sigma(u.i - u.j)) + weight_decay / 2 * mean(|u0|^2 + |i0|^2 + |j0|^2) (Rendle 2009, section 4.2).

    Args:
        scored: users u, positives i and negatives j as they are scored, [n, d] each.
        ego: the same rows as they are learnt (He et al. 2020, equation 15, penalises these).
        weights: [n], what a triple counts.
    """
    user, positive, negative = scored
    margin = (user * (positive - negative)).sum(1)
    penalty = sum(part.square().sum() for part in ego) / (2 * len(weights))
    return -(weights * F.logsigmoid(margin)).mean() + weight_decay * penalty


class NegativeSampler:
    """Items that a user has no pair with, uniformly, for many users at once, on the device (or users, for items)."""

    def __init__(self, users: torch.Tensor, items: torch.Tensor, n_items: int, generator: torch.Generator) -> None:
        """`users` and `items` [pairs] int64 are the positives."""
        self._n_items = n_items
        self._keys = torch.sort(users * n_items + items).values
        self._generator = generator

    def _is_positive(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        keys = users * self._n_items + items
        place = torch.searchsorted(self._keys, keys).clamp_(max=len(self._keys) - 1)
        return self._keys[place] == keys

    def __call__(self, users: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One item for each of `users` [n], and whether it is no positive (False only for users of nearly all items)."""

        def draw() -> torch.Tensor:
            return torch.randint(self._n_items, users.shape, generator=self._generator, device=users.device)

        items = draw()
        positive = self._is_positive(users, items)
        for _ in range(_DRAWS - 1):
            items = torch.where(positive, draw(), items)
            positive = self._is_positive(users, items)
        return items, ~positive


def train(
    pairs: Pairs, n_users: int, n_items: int, params: CfParams, seed: int, propagate: Propagate | None = None
) -> tuple[Matrix, Matrix]:
    """Learn embeddings with Adam on BPR triples; one negative a pair and epoch.

    params.negatives says what a pair is set against: "item", another item for the same user (Rendle 2009), or "user", another
    user for the same item: then the embeddings say which users an item is for, as FilterLLM's CF guider does (arXiv
    2502.16924, L_G).

    The same seed gives the same result on the same kind of device.

    Args:
        pairs: users 0 .. n_users - 1 and items 0 .. n_items - 1, each with at least one pair.
        propagate: applied once a batch to all embeddings; none for plain matrix factorisation.

    Returns:
        users [n_users, d] and items [n_items, d] as they are scored, float32.
    """
    device = torch.device(params.torch_device())
    generator = torch.Generator(device=device).manual_seed(seed)
    start = torch.randn(
        n_users + n_items, params.dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )
    ego = torch.nn.Parameter((0.1 * start).to(device))
    users = torch.from_numpy(pairs.users.astype(np.int64)).to(device)
    items = torch.from_numpy(pairs.items.astype(np.int64)).to(device)
    weights = torch.from_numpy((pairs.weights / pairs.weights.mean()).astype(np.float32)).to(device)
    # Rows of `ego`: whose preference a triple states, and over which rows.
    anchor, positive, first, others = users, items, n_users, n_items
    if params.negatives == "user":
        anchor, positive, first, others = items, users, 0, n_users
    negatives = NegativeSampler(anchor, positive, others, generator)
    offset = n_users - first
    optimizer = torch.optim.Adam([ego], lr=params.learning_rate)
    for _ in range(params.epochs):
        order = torch.randperm(len(users), generator=generator, device=device)
        for batch in order.split(params.batch_size):
            negative, counts = negatives(anchor[batch])
            rows = (offset + anchor[batch], first + positive[batch], first + negative)
            everything = propagate(ego) if propagate else ego
            u, i, j = (F.embedding(r, everything) for r in rows)
            u0, i0, j0 = (F.embedding(r, ego) for r in rows) if propagate else (u, i, j)
            loss = bpr_loss((u, i, j), (u0, i0, j0), weights[batch] * counts, params.weight_decay)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        final = (propagate(ego) if propagate else ego).float().cpu().numpy()
    return final[:n_users].copy(), final[n_users:].copy()


def fit(pairs: Pairs, n_users: int, n_items: int, params: CfParams, seed: int) -> tuple[Matrix, Matrix]:
    """BPR-MF: `train` without a graph."""
    return train(pairs, n_users, n_items, params, seed)
