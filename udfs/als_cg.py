"""Implicit-feedback ALS in torch, its systems solved by a few conjugate gradient steps, for wide spaces on one machine.

The objective is that of udfs/als.py (Hu, Koren, Volinsky 2008; the ridge times a row's number of pairs). A row's system is
never formed: a step costs a product with Y'Y and one with the sparse pairs (Takács, Pilászy, Tikk 2011, "Applications of the
conjugate gradient method for implicit feedback collaborative filtering"), so the cost grows with d^2 a row and not d^3: at 256
dimensions and more this is minutes where exact solving is hours. Each solution starts from the row's vector of the iteration
before. Users are solved last and to the end, as in udfs/als.py.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse

from udfs.cf_inputs import CfParams, Pairs
from udfs.vectors import Matrix

# More steps an iteration gained nothing on CiteULike, at 128 to 512 dimensions; the last solution takes more.
_STEPS, _LAST_STEPS = 4, 32


@dataclass(frozen=True)
class _Side:
    """The pairs of one side's rows: ones, confidences less one (alpha w) [rows, columns] as CSR, counts [rows, 1]."""

    ones: torch.Tensor
    excess: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, matrix: sparse.csr_array, alpha: float, device: str) -> _Side:
        def csr(values: np.ndarray) -> torch.Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR tensors beta, once a process
                pointers, columns = (
                    torch.from_numpy(part.astype(np.int64)) for part in (matrix.indptr, matrix.indices)
                )
                values = values.astype(np.float32)
                return torch.sparse_csr_tensor(pointers, columns, torch.from_numpy(values), matrix.shape).to(device)

        counts = torch.from_numpy(np.diff(matrix.indptr).astype(np.float32))[:, None]
        return cls(csr(np.ones(matrix.nnz)), csr(alpha * matrix.data), counts.to(device))

    def weighted(self, values: torch.Tensor) -> torch.Tensor:
        """The pattern of the pairs with other values [pairs]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_csr_tensor(self.ones.crow_indices(), self.ones.col_indices(), values, self.ones.shape)


def solve(side: _Side, fixed: torch.Tensor, start: torch.Tensor, regularization: float, steps: int) -> torch.Tensor:
    """The rows [n, d] that `steps` conjugate gradient steps from `start` [n, d] give, with `fixed` [m, d] held."""
    gram = fixed.T @ fixed
    ridge = regularization * side.counts

    def product(rows: torch.Tensor) -> torch.Tensor:
        # (Y'Y + sum_u alpha w_u y_u y_u' + ridge) x for every row at once.
        dots = torch.sparse.sampled_addmm(side.ones, rows, fixed.T, beta=0.0).values()
        return rows @ gram + side.weighted(dots * side.excess.values()) @ fixed + ridge * rows

    solution = start.clone()
    residual = side.weighted(1 + side.excess.values()) @ fixed - product(solution)
    direction = residual.clone()
    size = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        moved = product(direction)
        # A row that is solved has a residual of zero and stays where it is.
        length = size / (direction * moved).sum(1, keepdim=True).clamp_min(1e-30)
        solution += length * direction
        residual -= length * moved
        now = residual.square().sum(1, keepdim=True)
        direction = residual + now / size.clamp_min(1e-30) * direction
        size = now
    return solution


@torch.inference_mode()
def fit(pairs: Pairs, n_users: int, n_items: int, params: CfParams, seed: int) -> tuple[Matrix, Matrix]:
    """Factorise `pairs`, each once, users 0 .. n_users - 1 and items 0 .. n_items - 1 with one at least.

    Returns:
        users [n_users, d] and items [n_items, d], float32.
    """
    device = params.torch_device()
    matrix = sparse.csr_array((pairs.weights, (pairs.users, pairs.items)), shape=(n_users, n_items))
    of_users = _Side.of(matrix, params.alpha, device)
    of_items = _Side.of(matrix.T.tocsr(), params.alpha, device)
    generator = torch.Generator().manual_seed(seed)
    items = 0.1 * params.dimension**-0.5 * torch.randn(n_items, params.dimension, generator=generator)
    items, users = items.to(device), torch.zeros(n_users, params.dimension, device=device)
    for _ in range(params.epochs):
        users = solve(of_users, items, users, params.regularization, _STEPS)
        items = solve(of_items, users, items, params.regularization, _STEPS)
    users = solve(of_users, items, users, params.regularization, _LAST_STEPS)
    return users.cpu().numpy(), items.cpu().numpy()
