"""Stage `snapshot`: the night's view of the input tables, cleaned, numbered, labelled warm or cold (Spark)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import reduce
from typing import TYPE_CHECKING, Any

from jobs import gates, inputs
from jobs.run import Run
from jobs.spark_session import session, spark_path
from jobs.staging import Staging
from schemas.errors import ContractError
from schemas.table import table as schema
from udfs import cleaning

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, Row, SparkSession


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Python has no times before the year 1, which tables may hold: its beginning stands for them.
_OLDEST = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)


def _write(frame: DataFrame, out: Staging, name: str) -> None:
    """Stage `frame` as table `name` with its contract's columns."""
    frame = frame.select(*[c.name for c in schema(name).columns if c.name not in ("refresh_date", "run_id")])
    frame.write.mode("overwrite").option("compression", "zstd").parquet(spark_path(out.path(name)))


def _digest(*columns: str) -> list[Column]:
    """Aggregates of which `_hex` makes a hash of the rows of `columns`, whatever their order.

    What is computed from the rows is named by it; the staged files would not do, since Spark's differ from run to run.
    """
    from pyspark.sql import functions as F

    row = F.sha2(F.to_json(F.struct(*columns), {"ignoreNullFields": "false"}), 256)
    halves = (F.conv(F.substring(row, start, 15), 16, 10).cast("bigint") for start in (1, 16))
    return [F.bit_xor(half).alias(f"digest{i}") for i, half in enumerate(halves)]


def _hex(row: Row) -> str:
    return f"{row['digest0'] or 0:015x}{row['digest1'] or 0:015x}-{row['n']}"


def run(run: Run, out: Staging) -> dict[str, Any]:
    """Leaves training_interactions, users, items_labelled and rejected_rows.

    Returns:
        rows_in, rows_used and rows_rejected for each input; newest_event, of those used (ISO; None: none has a time); users,
        items, those with_text, warm, cold, pairs; digests of what later stages compute from; expectations, succeeded and
        data_docs of the gate.

    Raises:
        ContractError: a column is missing or has the wrong type, a table is empty, or its pinned version is gone.
        jobs.expectations.GateError: the counts do not reconcile, too much is rejected, or the events are stale.
    """
    with inputs.readable(run):
        facts = _stage(run, out)
    return {**facts, **gates.check_inputs(run, out, facts)}


def _stage(run: Run, out: Staging) -> dict[str, Any]:
    spark = session(run.settings.spark)
    rejected: list[DataFrame] = []
    all_items, all_events = inputs.items(spark, run), inputs.interactions(spark, run)
    rows_in = {"interactions": all_events.count(), "items": all_items.count()}
    for name, rows in rows_in.items():
        if rows == 0:
            raise ContractError(
                f"table '{name}' (version {run.input_versions[name]}) is empty: there is nothing to refresh from"
            )
    settings = run.settings.snapshot

    kept_items, bad_items = cleaning.clean_items(
        all_items, run.midnight, run.settings.text.prompt, settings.max_text_bytes
    )
    kept_items = kept_items.persist()
    rejected.append(bad_items)
    pairs, bad_events = cleaning.clean_interactions(
        all_events, kept_items.select("item_id"), run.midnight, settings.window_days, _trained_pairs(spark, run)
    )
    rejected.append(bad_events)
    if settings.k_core_users > 1 or settings.k_core_items > 1:
        pairs, dropped = cleaning.k_core(pairs.persist(), settings.k_core_users, settings.k_core_items)
        rejected.append(dropped)
    pairs = pairs.persist()
    users, labelled = _label(pairs, kept_items, settings.warm_interactions, rejected)

    _write(users, out, "users")
    _write(labelled, out, "items_labelled")
    users, labelled = (spark.read.parquet(spark_path(out.path(name))) for name in ("users", "items_labelled"))
    numbered = pairs.join(users.select("user_id", "user_idx"), "user_id").join(
        labelled.select("item_id", "item_idx"), "item_id"
    )
    # In one order whenever it is computed: what ALS adds up in another order differs in the last bits.
    _write(numbered.sortWithinPartitions("user_idx", "item_idx"), out, "training_interactions")
    together = reduce(lambda one, more: one.unionByName(more), rejected)
    _write(cleaning.listed(together.persist()), out, "rejected_rows")
    spark.catalog.clearCache()
    return _facts(spark, out, rows_in)


def _trained_pairs(spark: SparkSession, run: Run) -> DataFrame | None:
    split = run.settings.snapshot.split
    if split is None:
        return None
    table = inputs.split(spark, run)
    return table.where(table["part"].isin(*split.train)).select("user_id", "item_id")


def _label(
    pairs: DataFrame, items: DataFrame, warm_interactions: int, rejected: list[DataFrame]
) -> tuple[DataFrame, DataFrame]:
    """users and items_labelled; cold items that have neither text nor interactions are added to `rejected`."""
    from pyspark.sql import functions as F

    degrees = pairs.groupBy("item_id").agg(F.count("*").alias("interactions"))
    labelled = items.join(degrees, "item_id", "left").fillna(0, ["interactions"])
    labelled = labelled.withColumn(
        "label", F.when(F.col("interactions") >= warm_interactions, "warm").otherwise("cold")
    )
    hopeless = F.col("content").isNull() & (F.col("interactions") == 0)
    nothing = F.lit(None).cast("string")
    rejected.append(cleaning.rejects(labelled.where(hopeless), "items", F.col("item_id"), F.lit("no_text"), nothing))
    users = cleaning.number(pairs.groupBy("user_id").agg(F.count("*").alias("interactions")), "user_id", "user_idx")
    return users, cleaning.number(labelled.where(~hopeless), "item_id", "item_idx")


def _facts(spark: SparkSession, out: Staging, rows_in: dict[str, int]) -> dict[str, Any]:
    from pyspark.sql import functions as F

    def staged(name: str) -> DataFrame:
        return spark.read.parquet(spark_path(out.path(name)))

    pairs = staged("training_interactions").agg(
        F.count("*").alias("n"),
        F.coalesce(F.sum("events"), F.lit(0)).alias("events"),
        F.unix_micros(F.max("last_time")).alias("newest"),
        *_digest("user_id", "item_id", "weight", "last_time", "last_seq"),
    )
    items = staged("items_labelled").agg(
        F.count("*").alias("n"),
        F.count_if(F.col("label") == "warm").alias("warm"),
        F.count("text_sha256").alias("with_text"),
        *_digest("item_id", "label", "interactions", "text_sha256"),
    )
    rejected = staged("rejected_rows").groupBy("table", "reason").agg(F.sum("rows").alias("rows"))
    (used,), (labels,), reasons = pairs.collect(), items.collect(), sorted(rejected.collect())
    newest = None if used["newest"] is None else _EPOCH + timedelta(microseconds=max(used["newest"], _OLDEST))
    return {
        "rows_in": rows_in,
        "rows_used": {"interactions": used["events"], "items": labels["n"]},
        "rows_rejected": {name: sum(row["rows"] for row in reasons if row["table"] == name) for name in rows_in},
        "rejected_reasons": {f"{row['table']}.{row['reason']}": row["rows"] for row in reasons},
        "newest_event": newest and newest.isoformat(),
        "users": staged("users").count(),
        "items": labels["n"],
        "with_text": labels["with_text"],
        "warm": labels["warm"],
        "cold": labels["n"] - labels["warm"],
        "pairs": used["n"],
        "training_digest": _hex(used),
        "items_digest": _hex(labels),
    }
