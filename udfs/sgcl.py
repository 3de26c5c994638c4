"""SGCL: supervised graph contrastive learning, with neither sampled negatives nor views (as arXiv 2503.01814 trains it).

A pair's user and item are to be near each other; the batch's users are to be far from each other, and its items too.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from udfs.cf_inputs import CfParams
from udfs.lightgcn import propagation
from udfs.pair_training import Data


def sgcl_loss(users: torch.Tensor, items: torch.Tensor, weights: torch.Tensor, temperature: float) -> torch.Tensor:
    """-mean(w log(exp(u.i / t) / (sum_u' exp(u.u' / t) + sum_i' exp(i.i' / t)))), all of them cosines.

    Args:
        users, items: the rows of the batch's pairs, [n, d] each; the sums run over all n of them.
        weights: [n], what a pair counts.
    """
    u, i = F.normalize(users, dim=1), F.normalize(items, dim=1)
    away = torch.logaddexp((u @ u.T / temperature).logsumexp(1), (i @ i.T / temperature).logsumexp(1))
    return (weights * (away - (u * i).sum(1) / temperature)).mean()


class Sgcl:
    """LightGCN's propagation under `sgcl_loss`, with the L2 of the pair's rows as they are learnt."""

    def __init__(self, data: Data, params: CfParams) -> None:
        self._data, self._params = data, params
        self._propagate = propagation(data, params)

    def begin_epoch(self) -> None:
        pass

    def loss(self, ego: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        data, params = self._data, self._params
        pair = torch.cat([data.users[batch], data.n_users + data.items[batch]])
        rows, place = torch.unique(pair, return_inverse=True)
        scored, learnt = self._propagate.at(ego, rows)
        users, items = F.embedding(place, scored).chunk(2)
        penalty = F.embedding(place, learnt).square().sum() / (2 * len(batch))
        loss = sgcl_loss(users, items, data.weights[batch], params.temperature)
        return loss + params.weight_decay * penalty

    def embeddings(self, ego: torch.Tensor) -> torch.Tensor:
        """Of unit length: what is learnt is the cosine."""
        return F.normalize(self._propagate(ego), dim=1)
