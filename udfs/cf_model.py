"""Collaborative filtering behind one interface: pairs in, user and item embeddings of one space out.

The score of an item for a user is the inner product of their rows. `als` takes a Spark DataFrame and stays distributed; the
torch models take arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from udfs.cf_inputs import CfError, CfParams, Pairs
from udfs.vectors import Matrix

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from udfs.llm_init import TextMap
    from udfs.pair_training import OnEpoch, Start

#: model -> what its `pairs` are.
ENGINES: dict[str, Literal["spark", "torch"]] = {
    "als": "spark",
    "als_cg": "torch",
    "bpr": "torch",
    "lightgcn": "torch",
    "sgl": "torch",
    "sgcl": "torch",
}
#: Models that can be given a start, and looked at after each epoch; and those of them that draw negatives.
STARTABLE = ("bpr", "lightgcn", "sgl", "sgcl")
DRAWS_NEGATIVES = ("bpr", "lightgcn", "sgl")


def fit(
    model: str,
    pairs: DataFrame | Pairs,
    n_users: int,
    n_items: int,
    params: CfParams,
    seed: int,
    start: Start | None = None,
    on_epoch: OnEpoch | None = None,
) -> tuple[Matrix, Matrix]:
    """Train `model`, a key of ENGINES.

    Args:
        pairs: for als a Spark DataFrame (user_idx, item_idx, weight), otherwise Pairs; at least one.
        start: users [n_users, dimension] and items [n_items, dimension] to begin with, for a model of STARTABLE; drawn by
            default. Rows of users and items without a pair are not looked at.
        on_epoch: see udfs/pair_training.py; for a model of STARTABLE.

    Returns:
        users [n_users, dimension] and items [n_items, dimension], float32 and finite. A user or an item without a pair has a
        row of zeros, and is never drawn as a negative.

    Raises:
        CfError: there is no pair, the GPU that is asked for is missing, or the embeddings are not finite.
        TypeError: `pairs` is not what the model takes, or it takes neither `start` nor `on_epoch`.
    """
    if model not in STARTABLE and not (start is None and on_epoch is None):
        raise TypeError(f"{model} begins and ends by itself: a start and on_epoch are for {', '.join(STARTABLE)}")
    if isinstance(pairs, Pairs) != (ENGINES[model] == "torch"):
        raise TypeError(f"{model} runs on {ENGINES[model]} and cannot take its pairs as {type(pairs).__name__}")
    if not isinstance(pairs, Pairs):
        from udfs import als

        users, items = als.fit(pairs, n_users, n_items, params, seed)
    else:
        users, items = _fit_torch(model, pairs, n_users, n_items, params, seed, start, on_epoch)
        from udfs import devices

        devices.release(params.torch_device())
    if not (np.isfinite(users).all() and np.isfinite(items).all()):
        raise CfError(
            f"{model} gave embeddings that are not finite: lower cf.learning_rate, or raise cf.regularization "
            f"(als, als_cg) or cf.weight_decay (the others)"
        )
    return users, items


def without_pairs(model: str, params: CfParams, start: TextMap) -> TextMap:
    """What `model` scores for an item that begins at its `start` and has no pair, and so stays there.

    Raises:
        TypeError: the model takes no start.
    """
    if model == "bpr":
        return start
    if model == "sgcl":
        return replace(start, length=1.0)
    if model in ("lightgcn", "sgl"):
        # The layers of the graph are empty around it: a mean of them all, of which only the first is not zero.
        return start.rotated(np.eye(params.dimension), 1 / (params.layers + 1))
    raise TypeError(f"{model} takes no start: only {', '.join(STARTABLE)} do")


def _fit_torch(
    model: str,
    pairs: Pairs,
    n_users: int,
    n_items: int,
    params: CfParams,
    seed: int,
    start: Start | None,
    on_epoch: OnEpoch | None,
) -> tuple[Matrix, Matrix]:
    if not len(pairs.users):
        raise CfError(f"no pair to train {model} on: {n_users} users and {n_items} items, 0 pairs")
    pairs = pairs.sorted()
    known_users, user = np.unique(pairs.users, return_inverse=True)
    known_items, item = np.unique(pairs.items, return_inverse=True)
    known = Pairs(user, item, pairs.weights)
    sizes = len(known_users), len(known_items)

    def of_all(trained: tuple[Matrix, Matrix]) -> tuple[Matrix, Matrix]:
        users = np.zeros((n_users, params.dimension), np.float32)
        items = np.zeros((n_items, params.dimension), np.float32)
        users[known_users], items[known_items] = trained
        return users, items

    if model == "als_cg":
        from udfs import als_cg

        return of_all(als_cg.fit(known, *sizes, params, seed))
    from udfs import bpr, lightgcn, pair_training, sgcl, sgl

    def told(epoch: int, embeddings: Callable[[], tuple[Matrix, Matrix]]) -> bool:
        return on_epoch is not None and on_epoch(epoch, lambda: of_all(embeddings()))

    begin = None if start is None else (start[0][known_users], start[1][known_items])
    objectives: dict[str, Callable[[pair_training.Data, CfParams], pair_training.Objective]]
    objectives = {"bpr": bpr.Bpr, "lightgcn": lightgcn.objective, "sgl": sgl.Sgl, "sgcl": sgcl.Sgcl}
    return of_all(pair_training.train(known, *sizes, params, seed, objectives[model], begin, told))
