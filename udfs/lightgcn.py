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


def _csr(matrix: sparse.csr_matrix, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR tensors beta, once a process
        # On a CPU the product is MKL's, which has 32-bit indices: others would be converted each time.
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(np.int32)),
            torch.from_numpy(matrix.indices.astype(np.int32)),
            torch.from_numpy(matrix.data).to(dtype),
            size=matrix.shape,
        ).to(device)


class _MeanOfLayers(torch.autograd.Function):
    """Rows of the mean of E, A E, ..., A^L E with a symmetric A.

    Only the last product knows which rows are wanted, and the first one of the gradient: they take these rows of A alone,
    for a batch a fraction of its entries. The gradient goes back through the same products (A is symmetric, so its
    transpose is never needed).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        graph: torch.Tensor,
        part: torch.Tensor,
        back: torch.Tensor,
        ego: torch.Tensor,
        rows: torch.Tensor,
        layers: int,
    ) -> torch.Tensor:
        """A [n, n], its rows [m, n] and their transpose [n, m]; ego [n, d], rows [m] -> [m, d]."""
        layer, total = ego, ego[rows]
        for _ in range(layers - 1):
            layer = graph @ layer
            total = total + layer[rows]
        ctx.graph, ctx.back, ctx.layers = graph, back, layers
        ctx.save_for_backward(rows)
        return (total + part @ layer) / (layers + 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        gradient = gradients[0].contiguous() / (ctx.layers + 1)
        # Horner's scheme for (I + A + ... + A^L) S g, where S puts g into its rows.
        back = ctx.back @ gradient
        back[rows] += gradient
        for _ in range(ctx.layers - 1):
            back = ctx.graph @ back
            back[rows] += gradient
        return None, None, None, back, None, None


class Propagation:
    """The mean of layers 0 .. L of E, A E, A^2 E, ... (equations 4 to 8 with alpha_k = 1 / (L + 1))."""

    def __init__(self, adjacency: sparse.csr_matrix, layers: int, device: torch.device, dtype: torch.dtype) -> None:
        self._adjacency, self._layers = adjacency.astype(np.float32 if dtype == torch.float32 else np.float64), layers
        self._graph = _csr(self._adjacency, device, dtype)

    def __call__(self, ego: torch.Tensor) -> torch.Tensor:
        """`ego` [users + items, d] -> the same shape."""
        return self.at(ego, torch.arange(len(ego), device=ego.device))

    def at(self, ego: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows [m] of it, each once and in ascending order: [m, d]."""
        if not self._layers:
            return ego[rows]
        part = back = self._graph
        if len(rows) < len(ego):
            of_rows = self._adjacency[rows.cpu().numpy()]
            part, back = (_csr(matrix, ego.device, ego.dtype) for matrix in (of_rows, of_rows.T.tocsr()))
        return _MeanOfLayers.apply(self._graph, part, back, ego, rows, self._layers)


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
