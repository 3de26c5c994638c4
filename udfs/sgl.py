"""SGL (Wu et al. 2021, "Self-supervised graph learning for recommendation", arXiv 2010.10783), its edge-dropout variant.

LightGCN's BPR, and InfoNCE between two views of the graph, each with some edges left out, drawn anew every epoch: a node is
to be near itself in the other view and far from the others. As is usual in its reimplementations, the others are those of the
batch (the paper takes all nodes).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from udfs.bpr import Bpr
from udfs.cf_inputs import CfParams
from udfs.lightgcn import Propagation, normalized_adjacency, propagation
from udfs.pair_training import Data


def info_nce(one: torch.Tensor, other: torch.Tensor, temperature: float) -> torch.Tensor:
    """-mean_v log(exp(cos(v', v'') / t) / sum_w exp(cos(v', w'') / t)) of nodes in two views [n, d] (equation 10)."""
    logits = F.normalize(one, dim=1) @ F.normalize(other, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(one), device=one.device))


class Sgl:
    """BPR over the whole graph + params.contrast_weight * InfoNCE of the batch's users, and of its items."""

    def __init__(self, data: Data, params: CfParams) -> None:
        self._data, self._params = data, params
        self._bpr = Bpr(data, params, propagation(data, params))
        self._views: list[Propagation] = []

    def begin_epoch(self) -> None:
        self._views = [self._view() for _ in range(2)]

    def _view(self) -> Propagation:
        data, params = self._data, self._params
        drawn = torch.rand(len(data.users), generator=data.generator, device=data.users.device)
        kept = drawn >= params.edge_dropout
        users, items = (side[kept].cpu().numpy() for side in (data.users, data.items))
        graph = normalized_adjacency(users, items, data.n_users, data.n_items)
        return Propagation(graph, params.layers, data.users.device, data.weights.dtype)

    def loss(self, ego: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        users = torch.unique(self._data.users[batch])
        items = self._data.n_users + torch.unique(self._data.items[batch])
        rows = torch.cat([users, items])
        views = [view.at(ego, rows)[0].split([len(users), len(items)]) for view in self._views]
        contrast = sum(info_nce(one, other, self._params.temperature) for one, other in zip(*views, strict=True))
        return self._bpr.loss(ego, batch) + self._params.contrast_weight * contrast

    def embeddings(self, ego: torch.Tensor) -> torch.Tensor:
        return self._bpr.embeddings(ego)
