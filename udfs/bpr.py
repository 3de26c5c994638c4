"""BPR matrix factorisation (Rendle et al. 2009, "BPR: Bayesian personalized ranking from implicit feedback") in torch.

Its objective is LightGCN's and part of SGL's too: there the embeddings pass through the graph before they are scored.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional as F

from udfs.cf_inputs import CfParams
from udfs.pair_training import Data


class Propagate(Protocol):
    """What is scored, made from what is learnt: `ego` [users + items, d]."""

    def __call__(self, ego: torch.Tensor) -> torch.Tensor:
        """All of it, in the shape of `ego`."""
        ...

    def at(self, ego: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [m] of it, each once, and the same rows of `ego`: [m, d] each."""
        ...


# Draws of a negative item; a triple whose last draw is still a positive does not count.
_DRAWS = 4


def bpr_loss(
    scored: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ego: tuple[torch.Tensor, ...],
    weights: torch.Tensor,
    weight_decay: float,
) -> torch.Tensor:
    """-mean(w ln sigma(u.i - u.j)) + weight_decay / 2 * mean(|u0|^2 + |i0|^2 + |j0|^2) (Rendle 2009, section 4.2).

    Args:
        scored: users u, positives i and negatives j as they are scored, [n, d] each.
        ego: the same rows as they are learnt (He et al. 2020, equation 15, penalises these), in any number of parts.
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
        """One item for each of `users` [n], and whether it is no positive.

        Of a user of the share f of all items it is one with probability f**4: then the draws are given up.
        """

        def draw() -> torch.Tensor:
            return torch.randint(self._n_items, users.shape, generator=self._generator, device=users.device)

        items = draw()
        positive = self._is_positive(users, items)
        for _ in range(_DRAWS - 1):
            items = torch.where(positive, draw(), items)
            positive = self._is_positive(users, items)
        return items, ~positive


class Bpr:
    """BPR triples, one negative a pair and epoch.

    params.negatives says what a pair is set against: "item", another item for the same user (Rendle 2009), or "user", another
    user for the same item: then the embeddings say which users an item is for, as FilterLLM's CF guider does (arXiv
    2502.16924, L_G).
    """

    def __init__(self, data: Data, params: CfParams, propagate: Propagate | None = None) -> None:
        """`propagate` is applied once a batch to all embeddings; none for plain matrix factorisation."""
        # Rows of `ego`: whose preference a triple states, and over which rows.
        self._anchor, self._positive, self._first, others = data.users, data.items, data.n_users, data.n_items
        if params.negatives == "user":
            self._anchor, self._positive, self._first, others = data.items, data.users, 0, data.n_users
        self._anchors_from = data.n_users - self._first
        self._negatives = NegativeSampler(self._anchor, self._positive, others, data.generator)
        self._weights, self._weight_decay = data.weights, params.weight_decay
        self._propagate = propagate

    def begin_epoch(self) -> None:
        pass

    def loss(self, ego: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        negative, counts = self._negatives(self._anchor[batch])
        anchor, positive = self._anchors_from + self._anchor[batch], self._first + self._positive[batch]
        # Each row once: the gradient of a gather from `ego` is as large as `ego`.
        rows, place = torch.unique(torch.cat([anchor, positive, self._first + negative]), return_inverse=True)
        scored, learnt = self._propagate.at(ego, rows) if self._propagate else (ego[rows],) * 2
        u, i, j = F.embedding(place, scored).chunk(3)
        return bpr_loss((u, i, j), (F.embedding(place, learnt),), self._weights[batch] * counts, self._weight_decay)

    def embeddings(self, ego: torch.Tensor) -> torch.Tensor:
        return self._propagate(ego) if self._propagate else ego
