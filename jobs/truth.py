"""What really happened: the test pairs that a run is judged by, as ranking tasks for cold, warm and overall."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from jobs import inputs
from jobs.run import Run
from jobs.spark_session import session, spark_path
from jobs.staging import Staging
from schemas.errors import ContractError
from udfs.cleaning import usable_weight
from udfs.floors import id_hashes
from udfs.ranking_metrics import Ints, Task, task

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

Pairs = tuple[Ints, Ints]

_QUIET_DAYS = 7  # as long as nothing may happen at all and the day before still counts as known


@dataclass(frozen=True)
class Catalog:
    """Tonight's users [U] and items [I] in the order of their idx, and what is known of them.

    interactions [I] int64 are distinct users; cold [I] bool; staged: the snapshot.
    """

    user_ids: list[str]
    item_ids: list[str]
    texts: list[str | None]
    text_sha256: list[str | None]
    interactions: Ints
    cold: np.ndarray
    staged: Staging

    @cached_property
    def history(self) -> sparse.csr_array:
        """[U, I] bool: the training pairs, read when they are first asked for, which on the night itself nobody does."""
        pairs = self.staged.read("training_interactions", ["user_idx", "item_idx"])
        at = (pairs["user_idx"].to_numpy(), pairs["item_idx"].to_numpy())
        return sparse.csr_array((np.ones(pairs.num_rows, np.bool_), at), shape=(len(self.user_ids), len(self.item_ids)))


@dataclass(frozen=True)
class Truth:
    """Tasks by split (cold, warm, overall; those without any user are left out), and what can be said of them in JSON."""

    tasks: dict[str, Task]
    facts: dict[str, Any]


def catalog(run: Run) -> Catalog:
    """The run's snapshot. Raises StagingError if the snapshot is not complete."""
    staged = run.staging("snapshot")
    staged.facts()
    users = staged.read("users", ["user_id", "user_idx"]).sort_by("user_idx")
    columns = ["item_id", "item_idx", "label", "interactions", "content", "text_sha256"]
    items = staged.read("items_labelled", columns).sort_by("item_idx")
    return Catalog(
        user_ids=users["user_id"].to_pylist(),
        item_ids=items["item_id"].to_pylist(),
        texts=items["content"].to_pylist(),
        text_sha256=items["text_sha256"].to_pylist(),
        interactions=items["interactions"].to_numpy().astype(np.int64),
        cold=np.array([label == "cold" for label in items["label"].to_pylist()], np.bool_),
        staged=staged,
    )


def read(run: Run, catalog: Catalog, version: int | None = None, *, whole: bool = False) -> Truth:
    """The truth by the protocol of the settings (evaluate.protocol).

    random_item: the part `evaluate.part` of the given split (FilterLLM, arXiv 2502.16924, and the methods it is compared
    with): cold candidates are all cold items, of val and test; a user's other positives are masked.
    temporal: pairs first seen within evaluate.horizon_days from the run date; cold candidates are the cold items that at
    least evaluate.min_item_users of the users had; training pairs are masked.

    Args:
        version: of the interactions table (temporal); the one the run pinned by default, which on the night itself holds
            nothing yet, or next to nothing, of what comes after.
        whole: (temporal) no truth before the last day of the horizon has begun.
    """
    settings = run.settings.evaluate
    if settings.protocol == "none":
        return Truth({}, {"protocol": "none", "note": "evaluate.protocol is none: nothing is measured"})
    spark = session(run.settings.spark)
    if settings.protocol == "random_item":
        return _random_item(run, catalog, spark)
    return _temporal(run, catalog, spark, run.input_versions["interactions"] if version is None else version, whole)


def _numbered(run: Run, spark: SparkSession, pairs: DataFrame) -> DataFrame:
    """`pairs` with user_idx and item_idx, null where tonight's snapshot knows no such user or item."""
    staged = run.staging("snapshot")
    users = spark.read.parquet(spark_path(staged.path("users"))).select("user_id", "user_idx")
    items = spark.read.parquet(spark_path(staged.path("items_labelled"))).select("item_id", "item_idx")
    return pairs.join(users, "user_id", "left").join(items, "item_id", "left")


def _collect(numbered: DataFrame, *columns: str) -> tuple[pa.Table, dict[str, int]]:
    """The pairs whose user and item are known, and how many there were and were left out."""
    from pyspark.sql import functions as F

    numbered = numbered.persist()
    counts = numbered.agg(
        F.count("*").alias("pairs"),
        F.count_if(F.col("user_idx").isNull()).alias("pairs_of_unknown_users"),
        F.count_if(F.col("user_idx").isNotNull() & F.col("item_idx").isNull()).alias("pairs_of_unknown_items"),
    ).first()
    known = numbered.where("user_idx is not null and item_idx is not null").select("user_idx", "item_idx", *columns)
    table = known.toArrow()
    numbered.unpersist()
    return table, counts.asDict()


def _random_item(run: Run, catalog: Catalog, spark: SparkSession) -> Truth:
    table, counts = _collect(_numbered(run, spark, inputs.split(spark, run).distinct()), "part")
    users, items = _pairs(table)
    part = np.array(table["part"].to_pylist(), dtype=object)
    is_cold = np.array([name in ("cold_val", "cold_test") for name in part], np.bool_)
    cold, warm = np.unique(items[is_cold]), np.unique(items[~is_cold])
    both = np.intersect1d(cold, warm)
    if len(both):
        examples = [catalog.item_ids[i] for i in both[:3]]
        raise ContractError(
            f"table 'split': {len(both)} items are in a cold part and in a warm one, such as {examples}; a cold item has "
            "no training pair"
        )
    name = run.settings.evaluate.part
    of_part = {kind: part == f"{kind}_{name}" for kind in ("cold", "warm")}
    rest = ~(of_part["cold"] | of_part["warm"])
    trained = _history_pairs(catalog)
    known = (np.concatenate([users[rest], trained[0]]), np.concatenate([items[rest], trained[1]]))
    truths = {kind: (users[rows], items[rows]) for kind, rows in of_part.items()}
    facts = {"protocol": "random_item", "part": name, **counts}
    return _truth(run, catalog, {"cold": cold, "warm": warm}, truths, known, facts)


def _temporal(run: Run, catalog: Catalog, spark: SparkSession, version: int, whole: bool) -> Truth:
    from pyspark.sql import functions as F

    until = run.midnight + timedelta(days=run.settings.evaluate.horizon_days)
    known = inputs.interactions(spark, run, version=version)
    if whole:
        last_day = until - timedelta(days=1)
        # What is dated far later may be a source's mistake, and does not tell that this day is known.
        soon = last_day + timedelta(days=_QUIET_DAYS)
        if known.where((F.col("event_time") >= F.lit(last_day)) & (F.col("event_time") < F.lit(soon))).isEmpty():
            note = f"measured when events of {last_day.date()} are known; now, with those that are: jobs.evaluate --run-date"
            return Truth(
                {}, {"protocol": "temporal", "from": str(run.run_date), "until": str(until.date()), "note": note}
            )
    events = known.where(
        (F.col("event_time") >= F.lit(run.midnight)) & (F.col("event_time") < F.lit(until)) & usable_weight()
    )
    trained = spark.read.parquet(spark_path(run.staging("snapshot").path("training_interactions")))
    later = (
        events.where("user_id is not null and item_id is not null")
        .select("user_id", "item_id")
        .distinct()
        .join(trained.select("user_id", "item_id"), ["user_id", "item_id"], "left_anti")
    )
    table, counts = _collect(_numbered(run, spark, later))
    users, items = _pairs(table)
    is_cold = catalog.cold[items]
    degrees = np.bincount(items[is_cold], minlength=len(catalog.item_ids))
    cold = np.flatnonzero(degrees >= run.settings.evaluate.min_item_users)
    truths = {"cold": (users[is_cold], items[is_cold]), "warm": (users[~is_cold], items[~is_cold])}
    facts = {
        "protocol": "temporal",
        "from": str(run.run_date),
        "until": str(until.date()),
        "version": version,
        **counts,
    }
    candidates = {"cold": cold, "warm": np.flatnonzero(~catalog.cold)}
    none = np.zeros(0, np.int64)
    known = _history_pairs(catalog) if table.num_rows else (none, none)
    return _truth(run, catalog, candidates, truths, known, facts)


def _pairs(table: pa.Table) -> Pairs:
    return tuple(table[name].to_numpy().astype(np.int64) for name in ("user_idx", "item_idx"))  # type: ignore[return-value]


def _history_pairs(catalog: Catalog) -> Pairs:
    pairs = catalog.history.tocoo()
    return pairs.row.astype(np.int64), pairs.col.astype(np.int64)


def _truth(
    run: Run,
    catalog: Catalog,
    candidates: dict[str, Ints],
    truths: dict[str, Pairs],
    known: Pairs,
    facts: dict[str, Any],
) -> Truth:
    """The three tasks; overall is for the users who have test items of both kinds."""
    # Equal scores are ranked by a hash of the id: ids in their own order may tell the age or the popularity.
    rank = np.argsort(np.argsort(id_hashes(catalog.item_ids, run.settings.seed), kind="stable"))
    ordered = {kind: items[np.argsort(rank[items])] for kind, items in candidates.items()}
    tasks = {kind: task(ordered[kind], truths[kind], known) for kind in ("cold", "warm")}
    every = np.concatenate([ordered["cold"], ordered["warm"]])
    every = every[np.argsort(rank[every])]
    together = tuple(np.concatenate([truths["cold"][side], truths["warm"][side]]) for side in (0, 1))
    both = np.intersect1d(tasks["cold"].users, tasks["warm"].users)
    tasks["overall"] = task(every, (together[0], together[1]), known, among=both)
    tasks = {name: tasks[name] for name in ("overall", "cold", "warm") if len(tasks[name].users)}
    facts["splits"] = {
        name: {"users": len(t.users), "candidates": len(t.candidates), "pairs": int(t.truth.nnz)}
        for name, t in tasks.items()
    }
    if not tasks:
        facts["note"] = (
            f"no truth yet for {run.run_date}: the table holds no later pair of a known user and item, so nothing is "
            f"measured; when it does: python -m jobs.evaluate --conf ... --run-date {run.run_date}"
        )
    return Truth(tasks, facts)
