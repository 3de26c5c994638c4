"""What the gates look at: a table's rows brought down to one row an item, a user or a fact (Arrow, numpy -> pandas; Spark
for the training interactions).

Expectations cannot see into array columns, and are slow on many millions of rows; so embeddings become a dimension, a
norm and a flag, and (item, user) rows become one row an item with counts of what is wrong in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from udfs.ids import place

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """(code of each row int64, the distinct values); null has a code of its own."""
    encoded = pc.dictionary_encode(column, null_encoding="encode").combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0) if encoded.num_chunks else pa.array([], column.type).dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary


def known(ids: pa.Array | pa.ChunkedArray, of: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Which of `ids` are in `of`: bool, one a row; a null is not."""
    return place(ids, of) >= 0


def by_item(pairs: pa.Table, items: pa.ChunkedArray, users: pa.ChunkedArray) -> tuple[pd.DataFrame, np.ndarray]:
    """One row an item of `pairs` (item_id, user_id, rank, probability), and for each row of `pairs` the number of its item's.

    Returns:
        item_id, known (is it in `items`), rows, incomplete (rows with a null), repeated (rows whose user the item has
        already), unknown_users (rows whose user is not in `users`).
    """
    item, item_ids = _codes(pairs["item_id"])
    user, user_ids = _codes(pairs["user_id"])
    n = len(item_ids)
    incomplete = np.zeros(len(item), dtype=bool)
    for name in ("item_id", "user_id", "rank", "probability"):
        incomplete |= np.asarray(pc.is_null(pairs[name], nan_is_null=True).to_numpy(), dtype=bool)
    distinct = np.unique(item * max(len(user_ids), 1) + user) // max(len(user_ids), 1)
    rows = np.bincount(item, minlength=n)
    stranger = ~known(user_ids, users)[user] if len(user_ids) else np.zeros(0, dtype=bool)
    frame = pd.DataFrame(
        {
            "item_id": item_ids.to_pandas().astype(object),
            "known": known(item_ids, items),
            "rows": rows,
            "incomplete": np.bincount(item, weights=incomplete, minlength=n).astype(np.int64),
            "repeated": rows - np.bincount(distinct, minlength=n),
            "unknown_users": np.bincount(item, weights=stranger, minlength=n).astype(np.int64),
        }
    )
    return frame, item


def _extremes(values: np.ndarray, group: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest of `values` in each of `n` groups, NaN left out (`incomplete` counts it)."""
    low, high = np.full(n, np.inf), np.full(n, -np.inf)
    np.fmin.at(low, group, values)
    np.fmax.at(high, group, values)
    return low, high


def training_by_item(pairs: DataFrame, items: DataFrame, users: DataFrame) -> DataFrame:
    """What `by_item` says of training_interactions, by Spark, since they need not fit into memory.

    Args:
        pairs, items, users: the staged tables training_interactions, items_labelled and users.

    Returns:
        item_id, known, incomplete, repeated, unknown_users, events (their sum), lowest_weight (NaN left out, null for none),
        one row an item, by item_id.
    """
    from pyspark.sql import functions as F

    weight = F.nanvl("weight", F.lit(None).cast("double"))
    incomplete = F.isnull("item_id") | F.isnull("user_id") | F.isnull(weight)
    once = pairs.groupBy("item_id", "user_id").agg(
        F.count("*").alias("rows"),
        F.count_if(incomplete).alias("incomplete"),
        F.sum("events").alias("events"),
        F.min(weight).alias("lowest_weight"),
    )
    of_users = once.join(users.select("user_id", F.lit(True).alias("numbered")).distinct(), "user_id", "left")
    of_items = of_users.groupBy("item_id").agg(
        F.sum("incomplete").alias("incomplete"),
        (F.sum("rows") - F.count("*")).alias("repeated"),
        F.sum(F.when(F.isnull("numbered"), F.col("rows")).otherwise(0)).alias("unknown_users"),
        F.sum("events").alias("events"),
        F.min("lowest_weight").alias("lowest_weight"),
    )
    labelled = items.select("item_id", F.lit(True).alias("known")).distinct()
    return of_items.join(labelled, "item_id", "left").fillna({"known": False}).orderBy("item_id")


def sampled_by_item(sampled: pa.Table, cold: pa.ChunkedArray, users: pa.ChunkedArray) -> pd.DataFrame:
    """`by_item` of sampled_interactions with its ranks (first_rank, last_rank, ranks: how many different ones), its
    probabilities (lowest, highest, mass: their sum) and `rises`: how often the probability grows with the rank."""
    frame, item = by_item(sampled, cold, users)
    n = len(frame)
    rank, probability = _float(sampled["rank"]), _float(sampled["probability"])
    frame["first_rank"], frame["last_rank"] = _extremes(rank, item, n)
    order = np.lexsort((rank, item))
    item, rank, probability = item[order], rank[order], probability[order]
    same = item[1:] == item[:-1]
    frame["ranks"] = frame["rows"] - np.bincount(item[1:], weights=same & (rank[1:] == rank[:-1]), minlength=n).astype(
        int
    )
    frame["lowest"], frame["highest"] = _extremes(probability, item, n)
    frame["mass"] = np.bincount(item, weights=np.nan_to_num(probability), minlength=n)
    grows = same & (probability[1:] > probability[:-1])
    frame["rises"] = np.bincount(item[1:], weights=grows, minlength=n).astype(int)
    return frame


def _float(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)


def vectors(table: pa.Table, key: str, items: pa.Table | None = None) -> pd.DataFrame:
    """One row a vector of `table` (column `embedding`, list<float32>).

    Args:
        key: column of the vector's id.
        items: items_labelled, to add `label`; null where the id is not in it.

    Returns:
        the key, the other columns but lineage, dimension (values in the vector), finite (no NaN, no infinity, not
        null), norm (L2, float64; NaN unless finite).
    """
    lineage = ("refresh_date", "run_id", "model_version", "space_version")
    others = [name for name in table.column_names if name not in ("embedding", *lineage)]
    frame = table.select(others).to_pandas()
    dimension, norm = _norms(table["embedding"])
    frame["dimension"] = dimension
    frame["finite"] = np.isfinite(norm) & (dimension > 0)
    frame["norm"] = np.where(frame["finite"], norm, np.nan)
    if items is not None:
        position = pc.index_in(table[key], value_set=items["item_id"])
        frame["label"] = items["label"].take(position).to_pandas()
    return frame


def _norms(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(values a vector int64, L2 norm float64) of a list<float32> column; a null vector has 0 values."""
    lengths, norms = [np.zeros(0, np.int64)], [np.zeros(0)]
    for chunk in column.chunks:
        length = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        values = chunk.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
        owner = np.repeat(np.arange(len(chunk)), length)
        lengths.append(length)
        norms.append(np.sqrt(np.bincount(owner, weights=values * values, minlength=len(chunk))))
    return np.concatenate(lengths), np.concatenate(norms)


def lineage(table: pa.Table, columns: list[str]) -> pd.DataFrame:
    """The distinct values of `columns` together, with how many rows carry them (`rows`); dates as ISO text."""
    counted = table.select(columns).group_by(columns).aggregate([([], "count_all")])
    frame = counted.rename_columns({"count_all": "rows"}).to_pandas()
    if "refresh_date" in frame:
        frame["refresh_date"] = [None if d is None else str(d) for d in frame["refresh_date"]]
    return frame


def recommended_by_user(rows: pa.Table, served: pa.Array, items: pa.ChunkedArray, history: pa.Table) -> pd.DataFrame:
    """One row a user of `rows` (user_id, item_id, rank, score, likelihood).

    Args:
        served: users who are to have rows; items: those that may be recommended; history: pairs (user_id, item_id).

    Returns:
        user_id, known (is it in `served`), rows, incomplete (rows with a null), repeated (rows whose item the user has
        already), unknown_items, had_before (rows whose pair is in `history`), first_rank, holes (of the ranks up to the last
        one those that are absent, and ranks that stand twice), not_finite (score or likelihood), rises (how often the
        score grows with the rank).
    """
    user, user_ids = _codes(rows["user_id"])
    item, item_ids = _codes(rows["item_id"])
    n, width = len(user_ids), max(len(item_ids), 1)
    rank, score, likelihood = (_float(rows[name]) for name in ("rank", "score", "likelihood"))
    incomplete = np.zeros(len(user), dtype=bool)
    for name in ("user_id", "item_id", "rank", "score", "likelihood"):
        incomplete |= np.asarray(pc.is_null(rows[name]).to_numpy(), dtype=bool)
    stranger = ~known(item_ids, items)[item] if len(item_ids) else np.zeros(0, dtype=bool)
    of_user, of_item = place(history["user_id"], user_ids), place(history["item_id"], item_ids)
    both = (of_user >= 0) & (of_item >= 0)
    keys = user * width + item
    had = np.isin(keys, of_user[both] * width + of_item[both])

    def count(mask: np.ndarray) -> np.ndarray:
        return np.bincount(user, weights=mask, minlength=n).astype(np.int64)

    total = np.bincount(user, minlength=n)
    first, last = _extremes(rank, user, n)
    order = np.lexsort((rank, user))
    same = user[order][1:] == user[order][:-1]
    twice = same & (rank[order][1:] == rank[order][:-1])
    grows = same & (score[order][1:] > score[order][:-1])
    repeated_ranks, rises = (
        np.bincount(user[order][1:], weights=mask, minlength=n).astype(np.int64) for mask in (twice, grows)
    )
    return pd.DataFrame(
        {
            "user_id": user_ids.to_pandas().astype(object),
            "known": known(user_ids, served),
            "rows": total,
            "incomplete": count(incomplete),
            "repeated": total - np.bincount(np.unique(keys) // width, minlength=n),
            "unknown_items": count(stranger),
            "had_before": count(had),
            "first_rank": first,
            "holes": last - total + 2 * repeated_ranks,
            "not_finite": count(~(np.isfinite(score) & np.isfinite(likelihood))),
            "rises": rises,
        }
    )
