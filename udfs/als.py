"""Implicit-feedback ALS on Spark (Hu, Koren, Volinsky 2008, "Collaborative filtering for implicit feedback datasets").

Spark's variant (pyspark.ml.recommendation.ALS with implicitPrefs): confidence 1 + alpha * weight, and the ridge is multiplied
by a row's number of pairs (Zhou et al. 2008, ALS-WR). Items are solved first in each iteration and users last, so the
users are the exact solution for the items that come back; `udfs.fold_in` solves the same system.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from udfs.cf_inputs import CfParams
from udfs.vectors import Matrix, from_column

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# Factors come to the driver in pieces, each well below the 1 GB that Spark lets a job return.
_NUMBERS_A_PIECE = 1 << 26


def fit(pairs: DataFrame, n_users: int, n_items: int, params: CfParams, seed: int) -> tuple[Matrix, Matrix]:
    """Factorise `pairs` where they are: they stay in Spark, only the factors come back.

    Without a checkpoint folder (params.checkpoint_dir, or one that the session has) Spark's plan grows with each
    iteration, and some twenty of them overflow its stack. With params.blocks = 1 the result is the same to the last bit
    whatever the order of the rows; more blocks add up floats in an order that the cluster decides.

    Args:
        pairs: columns user_idx, item_idx (int) and weight (above 0); one row a pair.

    Returns:
        users [n_users, d] and items [n_items, d], float32; rows without a pair are zero.
    """
    from pyspark.ml.recommendation import ALS
    from pyspark.sql import functions as F

    if params.checkpoint_dir:
        pairs.sparkSession.sparkContext.setCheckpointDir(params.checkpoint_dir)
    ratings = pairs.select("user_idx", "item_idx", F.col("weight").cast("float").alias("weight"))
    if params.blocks == 1:
        ratings = ratings.coalesce(1).sortWithinPartitions("user_idx", "item_idx")
    model = ALS(
        rank=params.dimension,
        maxIter=params.epochs,
        regParam=params.regularization,
        alpha=params.alpha,
        implicitPrefs=True,
        numUserBlocks=params.blocks,
        numItemBlocks=params.blocks,
        userCol="user_idx",
        itemCol="item_idx",
        ratingCol="weight",
        seed=seed,
        checkpointInterval=5,
    ).fit(ratings)
    users = _collect(model.userFactors, n_users, params.dimension)
    items = _collect(model.itemFactors, n_items, params.dimension)
    for factors in (model.userFactors, model.itemFactors):
        factors.unpersist()
    return users, items


def _collect(factors: DataFrame, n: int, dimension: int) -> Matrix:
    """Rows (id, features) as a matrix [n, dimension]."""
    matrix = np.zeros((n, dimension), np.float32)
    step = max(1, _NUMBERS_A_PIECE // dimension)
    for start in range(0, n, step):
        piece = factors.where((factors["id"] >= start) & (factors["id"] < start + step)).toArrow()
        if piece.num_rows:
            matrix[piece.column("id").to_numpy()] = from_column(piece.column("features").combine_chunks())
    return matrix
