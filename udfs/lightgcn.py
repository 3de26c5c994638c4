"""LightGCN (He et al. 2020, arXiv 2002.02126): embeddings smoothed over the user-item graph, trained by BPR."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse

from udfs import pair_training
from udfs.bpr import Bpr
from udfs.pair_training import Data, OnEpoch, Start
from udfs.vectors import Matrix

if TYPE_CHECKING:
    from udfs.cf_model import CfParams, Pairs


def normalized_adjacency(users: np.ndarray, items: np.ndarray, n_users: int, n_items: int) -> sparse.csr_matrix:
    """D^-1/2 A D^-1/2 of the bipartite graph, users before items (equations 3 and 8): [n, n] float64, symmetric.

    An edge counts once, whatever its weight, as in the paper; a node without an edge has a row of zeros.
    """
    n = n_users + n_items
    rows, columns = np.concatenate([users, items + n_users]), np.concatenate([items + n_users, users])
    graph = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(n, n))
    graph.data[:] = 1.0  # a pair given twice has been added up
    degree = np.asarray(graph.sum(1)).ravel()
    scale = sparse.diags(np.divide(1.0, np.sqrt(degree), out=np.zeros(n), where=degree > 0))
    return (scale @ graph @ scale).tocsr()


class _Product(torch.autograd.Function):
    """A x with a symmetric A: its gradient is A g, so the transpose of a CSR matrix is never needed."""

    @staticmethod
    def forward(ctx: Any, graph: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        ctx.graph = graph
        return graph @ dense

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, ctx.graph @ gradients[0].contiguous()


class Propagation:
    """The mean of layers 0 .. L of E, A E, A^2 E, ... (equations 4 to 8 with alpha_k = 1 / (L + 1))."""

    def __init__(self, adjacency: sparse.csr_matrix, layers: int, device: torch.device, dtype: torch.dtype) -> None:
        self._layers = layers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR tensors beta, once a process
            # On a CPU the product is MKL's, which has 32-bit indices: others would be converted each time.
            self._graph = torch.sparse_csr_tensor(
                torch.from_numpy(adjacency.indptr.astype(np.int32)),
                torch.from_numpy(adjacency.indices.astype(np.int32)),
                torch.from_numpy(adjacency.data).to(dtype),
                size=adjacency.shape,
            ).to(device)

    def __call__(self, ego: torch.Tensor) -> torch.Tensor:
        """`ego` [users + items, d] -> the same shape."""
        layer, total = ego, ego
        for _ in range(self._layers):
            layer = _Product.apply(self._graph, layer)
            total = total + layer
        return total / (self._layers + 1)


def propagation(data: Data, params: CfParams) -> Propagation:
    """Over the graph of the training pairs, on their device."""
    users, items = data.users.cpu().numpy(), data.items.cpu().numpy()
    adjacency = normalized_adjacency(users, items, data.n_users, data.n_items)
    return Propagation(adjacency, params.layers, data.users.device, torch.float32)


def fit(
    pairs: Pairs,
    n_users: int,
    n_items: int,
    params: CfParams,
    seed: int,
    start: Start | None = None,
    on_epoch: OnEpoch | None = None,
) -> tuple[Matrix, Matrix]:
    """As `udfs.pair_training.train`, with one propagation over the whole graph a batch."""

    def objective(data: Data, params: CfParams) -> Bpr:
        return Bpr(data, params, propagation(data, params))

    return pair_training.train(pairs, n_users, n_items, params, seed, objective, start, on_epoch)
