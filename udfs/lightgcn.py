"""LightGCN (He et al. 2020, arXiv 2002.02126): embeddings smoothed over the user-item graph, trained by BPR."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from scipy import sparse

from udfs.bpr import Bpr
from udfs.cf_inputs import CfError, CfParams
from udfs.pair_training import Data

_MOST = np.iinfo(np.int32).max


def normalized_adjacency(users: np.ndarray, items: np.ndarray, n_users: int, n_items: int) -> sparse.csr_matrix:
    """D^-1/2 A D^-1/2 of the bipartite graph, users before items (equations 3 and 8): [n, n] float64, symmetric.

    An edge counts once, whatever its weight, as in the paper; a node without an edge has a row of zeros.

    Raises:
        CfError: it would have more entries than 32-bit indices tell apart (see `_csr`).
    """
    if 2 * len(users) > _MOST:
        raise CfError(
            f"the graph of {len(users)} pairs has twice as many entries, and lightgcn, sgl and sgcl cannot hold more than {_MOST}: "
            "set cf.model to als, als_cg or bpr, which have no graph, or train on fewer pairs (snapshot.warm_interactions)"
        )
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
    """Rows of the mean of E, A E, ..., A^L E with a symmetric A, and the same rows of E.

    Only the last product knows which rows are wanted, and the first one of the gradient: on a CPU they take these rows of A
    alone, for a batch a fraction of its entries. The gradient goes back through the same products, since A is its own transpose.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        of: Propagation,
        part: torch.Tensor | None,
        back: torch.Tensor | None,
        ego: torch.Tensor,
        rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of A [m, n] and their transpose [n, m], or None: then it is the whole A; ego [n, d], rows [m] -> [m, d] twice."""
        own = ego.index_select(0, rows)
        layer, total = ego, own
        for number in range(of.layers - 1):
            layer = _product(of.graph, layer, of.buffer(number % 2, ego))
            total = total + layer.index_select(0, rows)
        ctx.of, ctx.back = of, back
        ctx.save_for_backward(rows, ego)
        if part is None:
            last = _product(of.graph, layer, of.buffer((of.layers - 1) % 2, ego)).index_select(0, rows)
        else:
            last = part @ layer
        return (total + last) / (of.layers + 1), own

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, ego = ctx.saved_tensors
        layers = ctx.of.layers
        gradient = gradients[0].contiguous() / (layers + 1)
        # Horner's scheme for (I + A + ... + A^L) S g, where S puts g into its rows.
        left, found = ctx.back, gradient
        if left is None:
            left, found = ctx.of.graph, torch.zeros_like(ego).index_copy_(0, rows, gradient)
        for number in range(layers):
            # What is returned is a tensor of its own, since autograd keeps it.
            last = number == layers - 1
            found = _product(left, found, ctx.of.buffer(number % 2, ego, new=last))
            found.index_add_(0, rows, gradient + gradients[1] if last else gradient)
            left = ctx.of.graph
        return None, None, None, found, None


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """`left` @ `right`, in `out` if there is one."""
    return left @ right if out is None else torch.addmm(out, left, right, beta=0, out=out)


class Propagation:
    """The mean of layers 0 .. L of E, A E, A^2 E, ... (equations 4 to 8 with alpha_k = 1 / (L + 1))."""

    def __init__(self, adjacency: sparse.csr_matrix, layers: int, device: torch.device, dtype: torch.dtype) -> None:
        self._adjacency = adjacency.astype(np.float32 if dtype == torch.float32 else np.float64)
        self.layers, self.graph = layers, _csr(self._adjacency, device, dtype)
        self._buffers: dict[int, torch.Tensor] = {}

    def __call__(self, ego: torch.Tensor) -> torch.Tensor:
        """`ego` [users + items, d] -> the same shape."""
        return self.at(ego, torch.arange(len(ego), device=ego.device))[0]

    def at(self, ego: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [m] of it, each once, and the same rows of `ego`: [m, d] each."""
        if not self.layers:
            own = ego[rows]
            return own, own
        part = back = None
        # A GPU would wait for the host, which takes rows out of A, with each batch: there it is the whole product.
        if len(rows) < len(ego) and ego.device.type == "cpu":
            of_rows = self._adjacency[rows.numpy()]
            part, back = (_csr(matrix, ego.device, ego.dtype) for matrix in (of_rows, of_rows.T.tocsr()))
        return _MeanOfLayers.apply(self, part, back, ego, rows)

    def buffer(self, number: int, like: torch.Tensor, *, new: bool = False) -> torch.Tensor | None:
        """A tensor of this shape for a product: kept for the next pass through the layers, since on a CPU a large one that is new
        each time costs as much as the product, in page faults; or new. None on a GPU, where it costs nothing.
        """
        if like.is_cuda:
            return None
        if new:
            return torch.empty_like(like, requires_grad=False)
        if number not in self._buffers or self._buffers[number].shape != like.shape:
            self._buffers[number] = torch.empty_like(like, requires_grad=False)
        return self._buffers[number]


def propagation(data: Data, params: CfParams) -> Propagation:
    """Over the graph of the training pairs, on their device."""
    users, items = data.users.cpu().numpy(), data.items.cpu().numpy()
    adjacency = normalized_adjacency(users, items, data.n_users, data.n_items)
    return Propagation(adjacency, params.layers, data.users.device, data.weights.dtype)


def objective(data: Data, params: CfParams) -> Bpr:
    """BPR on what the graph makes of the embeddings, with one propagation a batch."""
    return Bpr(data, params, propagation(data, params))
