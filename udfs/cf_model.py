"""Collaborative filtering behind one interface: pairs in, user and item embeddings of one space out.

The score of an item for a user is the inner product of their rows. `als` takes a Spark DataFrame and stays distributed; the
torch models take arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from schemas.errors import ColdRefreshError
from udfs.vectors import Matrix

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

#: model -> what its `pairs` are.
ENGINES: dict[str, Literal["spark", "torch"]] = {
    "als": "spark",
    "als_cg": "torch",
    "lightgcn": "torch",
    "bpr": "torch",
}


class CfError(ColdRefreshError):
    """Collaborative filtering cannot be trained: the message says on what, and the remedy."""


@dataclass(frozen=True)
class CfParams:
    """How to train; jobs/settings.py describes each (section cf)."""

    dimension: int = 64
    epochs: int = 15
    regularization: float = 0.05
    alpha: float = 40.0
    blocks: int = 2
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    batch_size: int = 8192
    layers: int = 2
    negatives: Literal["item", "user"] = "item"  # lightgcn, bpr: see udfs/bpr.py
    device: str = "auto"
    checkpoint_dir: str | None = None  # als: a folder that Spark's workers share

    def torch_device(self) -> str:
        """cuda or cpu.

        Raises:
            CfError: cuda is asked for and there is none.
        """
        import torch

        if self.device == "cpu":
            return "cpu"
        if torch.cuda.is_available():
            return "cuda"
        if self.device == "cuda":
            raise CfError("cf.device is cuda and torch sees no GPU: set cf.device=auto or cpu, or check the driver")
        return "cpu"


@dataclass(frozen=True)
class Pairs:
    """(user, item) pairs as arrays of one length, each pair once: indices and weights above 0."""

    users: npt.NDArray[np.integer]
    items: npt.NDArray[np.integer]
    weights: npt.NDArray[np.floating]

    def sorted(self) -> Pairs:
        """By user, then item: training must not depend on the order in which rows were read."""
        order = np.lexsort((self.items, self.users))
        return Pairs(self.users[order], self.items[order], self.weights[order])


def fit(
    model: str, pairs: DataFrame | Pairs, n_users: int, n_items: int, params: CfParams, seed: int
) -> tuple[Matrix, Matrix]:
    """Train `model` (als, als_cg, lightgcn or bpr).

    Args:
        pairs: for als a Spark DataFrame (user_idx, item_idx, weight), otherwise Pairs; at least one.

    Returns:
        users [n_users, dimension] and items [n_items, dimension], float32 and finite. A user or an item without a pair has a
        row of zeros, and is never drawn as a negative.

    Raises:
        CfError: there is no pair, the GPU that is asked for is missing, or the embeddings are not finite.
        TypeError: `pairs` is not what the model takes.
    """
    if isinstance(pairs, Pairs) != (ENGINES[model] == "torch"):
        raise TypeError(f"{model} runs on {ENGINES[model]} and cannot take its pairs as {type(pairs).__name__}")
    if not isinstance(pairs, Pairs):
        from udfs import als

        users, items = als.fit(pairs, n_users, n_items, params, seed)
    else:
        users, items = _fit_torch(model, pairs, n_users, n_items, params, seed)
    if not (np.isfinite(users).all() and np.isfinite(items).all()):
        raise CfError(
            f"{model} gave embeddings that are not finite: lower cf.learning_rate, or raise cf.regularization "
            f"(als, als_cg) or cf.weight_decay (lightgcn, bpr)"
        )
    return users, items


def _fit_torch(
    model: str, pairs: Pairs, n_users: int, n_items: int, params: CfParams, seed: int
) -> tuple[Matrix, Matrix]:
    from udfs import als_cg, bpr, lightgcn

    if not len(pairs.users):
        raise CfError(f"no pair to train {model} on: {n_users} users and {n_items} items, 0 pairs")
    pairs = pairs.sorted()
    known_users, user = np.unique(pairs.users, return_inverse=True)
    known_items, item = np.unique(pairs.items, return_inverse=True)
    trained = {"als_cg": als_cg.fit, "lightgcn": lightgcn.fit, "bpr": bpr.fit}[model](
        Pairs(user, item, pairs.weights), len(known_users), len(known_items), params, seed
    )
    users = np.zeros((n_users, params.dimension), np.float32)
    items = np.zeros((n_items, params.dimension), np.float32)
    users[known_users], items[known_items] = trained
    return users, items
