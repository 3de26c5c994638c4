"""What really happened: the test pairs that a run is judged by, as ranking tasks for cold, warm and overall.

Of more users than evaluate.max_users these many are asked about cold items and these many about warm ones, drawn by a hash of
their ids: what is collected here are their pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from jobs import inputs
from jobs.run import Run, log
from jobs.spark_session import session, spark_path
from jobs.staging import Staging
from schemas.errors import ContractError
from udfs.cleaning import usable_weight
from udfs.floors import id_hashes
from udfs.ids import large
from udfs.ranking_metrics import Ints, Task, task

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

Pairs = tuple[Ints, Ints]

#: (user, item) pairs whose probability is compared with what happened, at most.
CELLS = 500_000_000
_SOME_ITEMS = 1000

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

    def history(self, users: Ints) -> sparse.csr_array:
        """[U, I] bool: the training pairs of `users`, read anew; the other rows are empty."""
        asked = np.zeros(len(self.user_ids), np.bool_)
        asked[users] = True
        parts = [np.zeros((2, 0), np.int64)]
        # Piece by piece: everybody's pairs need not fit into memory.
        for batch in self.staged.batches("training_interactions", ["user_idx", "item_idx"]):
            pairs = np.stack([batch[name].to_numpy().astype(np.int64) for name in ("user_idx", "item_idx")])
            parts.append(pairs[:, asked[pairs[0]]])
        user, item = np.concatenate(parts, axis=1)
        shape = (len(self.user_ids), len(self.item_ids))
        return sparse.csr_array((np.ones(len(user), np.bool_), (user, item)), shape=shape)


@dataclass(frozen=True)
class Truth:
    """Tasks by split (cold, warm, overall; those without any user are left out), and what can be said of them in JSON.

    whole: the pairs (user_idx, item_idx) of some cold items with all of their users, where the tasks have not all of them.
    """

    tasks: dict[str, Task]
    facts: dict[str, Any]
    whole: Pairs | None = None


def catalog(run: Run) -> Catalog:
    """The run's snapshot. Raises StagingError if the snapshot is not complete."""
    staged = run.staging("snapshot")
    staged.facts()
    users = large(staged.read("users", ["user_id", "user_idx"])).sort_by("user_idx")
    columns = ["item_id", "item_idx", "label", "interactions", "content", "text_sha256"]
    items = large(staged.read("items_labelled", columns)).sort_by("item_idx")
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
    temporal: pairs first seen within evaluate.horizon_days from the run date; cold candidates are all cold items, those that
    nobody takes among them, since that night nobody knows which these are; training pairs are masked.

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
    """`pairs` with user_idx, item_idx and the item's label, null where tonight's snapshot knows no such user or item."""
    staged = run.staging("snapshot")
    users = spark.read.parquet(spark_path(staged.path("users"))).select("user_id", "user_idx")
    items = spark.read.parquet(spark_path(staged.path("items_labelled"))).select("item_id", "item_idx", "label")
    return pairs.join(users, "user_id", "left").join(items, "item_id", "left")


@dataclass(frozen=True)
class _Collected:
    """What a driver can hold of the pairs whose user and item are known.

    pairs: (user_idx, item_idx, ..., cold, warm: whether the user is asked about such items) of the users who are asked.
    items: (item_idx, ...) of all pairs, whose users are asked or not.
    counts: pairs there were and were left out, users there were and are asked. whole: as in Truth.
    """

    pairs: pa.Table
    items: pa.Table
    counts: dict[str, int]
    whole: Pairs | None


def _collect(run: Run, catalog: Catalog, numbered: DataFrame, judged: dict[str, Column], *columns: str) -> _Collected:
    """Of pairs that are numbered, with `columns`. judged: which of them make a user one of the truth, cold and warm."""
    from pyspark.sql import functions as F

    numbered, seed = numbered.persist(), F.lit(run.settings.seed)
    is_known = F.col("user_idx").isNotNull() & F.col("item_idx").isNotNull()
    of_kinds = [F.count_distinct(F.when(is_known & one, F.col("user_idx"))).alias(kind) for kind, one in judged.items()]
    counts = numbered.agg(
        F.count("*").alias("pairs"),
        F.count_if(F.col("user_idx").isNull()).alias("pairs_of_unknown_users"),
        F.count_if(F.col("user_idx").isNotNull() & F.col("item_idx").isNull()).alias("pairs_of_unknown_items"),
        F.count_distinct(F.when(is_known & (judged["cold"] | judged["warm"]), F.col("user_idx"))).alias("users"),
        *of_kinds,
    ).first()
    known, most, whole = numbered.where(is_known), run.settings.evaluate.max_users, None
    items = known.select("item_idx", *columns).distinct().toArrow()
    asked = known.withColumns(dict.fromkeys(judged, F.lit(True)))
    if max(counts[kind] for kind in judged) > most:
        asked = known
        for kind, one in judged.items():
            users = known.where(one).select("user_id", "user_idx").distinct()
            drawn = users.orderBy(F.xxhash64("user_id", seed), "user_id").limit(most)
            asked = asked.join(F.broadcast(drawn.select("user_idx", F.lit(True).alias(kind))), "user_idx", "left")
        asked = asked.fillna(False, list(judged)).where("cold or warm")
        there = f"{counts['cold']} users of cold items and {counts['warm']} of warm ones"
        log(f"[evaluate] of {there}, {most} each are asked at most (evaluate.max_users)")
        # What a probability is compared with are all users of an item: of few items, where there are many users. Some of these
        # items will be no candidates, or have no text.
        cold, few = known.where(judged["cold"]), max(_SOME_ITEMS, CELLS // max(1, len(catalog.user_ids)))
        first = cold.select("item_id", "item_idx").distinct().orderBy(F.xxhash64("item_id", seed), "item_id").limit(few)
        whole = _pairs(cold.join(F.broadcast(first), "item_idx", "left_semi").select("user_idx", "item_idx").toArrow())
    pairs = asked.select("user_idx", "item_idx", *columns, *judged).toArrow()
    numbered.unpersist()
    told = {name: value for name, value in counts.asDict().items() if name not in judged}
    return _Collected(pairs, items, {**told, "users_asked": len(pc.unique(pairs["user_idx"]))}, whole)


def _random_item(run: Run, catalog: Catalog, spark: SparkSession) -> Truth:
    from pyspark.sql import functions as F

    name = run.settings.evaluate.part
    numbered = _numbered(run, spark, inputs.split(spark, run).distinct())
    judged = {kind: F.col("part") == f"{kind}_{name}" for kind in ("cold", "warm")}
    found = _collect(run, catalog, numbered, judged, "part")
    users, items = _pairs(found.pairs)
    part = np.array(found.pairs["part"].to_pylist(), dtype=object)
    is_cold = np.array([of in ("cold_val", "cold_test") for of in found.items["part"].to_pylist()], np.bool_)
    numbers = found.items["item_idx"].to_numpy().astype(np.int64)
    cold, warm = np.unique(numbers[is_cold]), np.unique(numbers[~is_cold])
    both = np.intersect1d(cold, warm)
    if len(both):
        examples = [catalog.item_ids[i] for i in both[:3]]
        raise ContractError(
            f"table 'split': {len(both)} items are in a cold part and in a warm one, such as {examples}; a cold item has "
            "no training pair"
        )
    rest = ~np.isin(part, [f"cold_{name}", f"warm_{name}"])
    of_part = {kind: (part == f"{kind}_{name}") & found.pairs[kind].to_numpy() for kind in ("cold", "warm")}
    trained = _history_pairs(catalog, users[~rest])
    known = (np.concatenate([users[rest], trained[0]]), np.concatenate([items[rest], trained[1]]))
    truths = {kind: (users[rows], items[rows]) for kind, rows in of_part.items()}
    facts = {"protocol": "random_item", "part": name, **found.counts}
    return _truth(run, catalog, {"cold": cold, "warm": warm}, truths, known, facts, found.whole)


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
    judged = {"cold": F.col("label") == "cold", "warm": F.col("label") != "cold"}
    found = _collect(run, catalog, _numbered(run, spark, later), judged)
    users, items = _pairs(found.pairs)
    is_cold = catalog.cold[items]
    of_kind = {kind: found.pairs[kind].to_numpy() & (is_cold == (kind == "cold")) for kind in ("cold", "warm")}
    truths = {kind: (users[rows], items[rows]) for kind, rows in of_kind.items()}
    facts = {
        "protocol": "temporal",
        "from": str(run.run_date),
        "until": str(until.date()),
        "version": version,
        **found.counts,
    }
    candidates = {"cold": np.flatnonzero(catalog.cold), "warm": np.flatnonzero(~catalog.cold)}
    none = np.zeros(0, np.int64)
    known = _history_pairs(catalog, users) if len(users) else (none, none)
    return _truth(run, catalog, candidates, truths, known, facts, found.whole)


def _pairs(table: pa.Table) -> Pairs:
    return tuple(table[name].to_numpy().astype(np.int64) for name in ("user_idx", "item_idx"))  # type: ignore[return-value]


def _history_pairs(catalog: Catalog, users: Ints) -> Pairs:
    pairs = catalog.history(users).tocoo()
    return pairs.row.astype(np.int64), pairs.col.astype(np.int64)


def _truth(
    run: Run,
    catalog: Catalog,
    candidates: dict[str, Ints],
    truths: dict[str, Pairs],
    known: Pairs,
    facts: dict[str, Any],
    whole: Pairs | None,
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
    return Truth(tasks, facts, whole)
