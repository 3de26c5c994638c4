"""What is kept of the input tables, and why the rest is not: Spark expressions, one reason code a rejected row.

Every function that cleans returns (kept, rejected); `rejected` has the columns of REJECTED, and the counts add up: rows in =
rows kept + sum of `rows` of the rejected.
"""

from __future__ import annotations

import string
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

REJECTED = "table string, key string, reason string, detail string, rows bigint"

REASONS = {
    "null_id": "the user or item id is null, empty or blank",
    "invalid_utf8": "an id or a text holds bytes that are not UTF-8",
    "bad_weight": "the weight is not a finite number above 0 (or beyond what sums of weights can hold: 1e-30 to 1e30)",
    "unknown_item": "the item is not in the items table (or was itself rejected)",
    "duplicate": "the same event, or the same item id, stands in the table more than once; one row is kept",
    "text_too_long": "the item's text is longer than snapshot.max_text_bytes",
    "no_text": "a cold item without any text: nothing to place it by",
    "after_run_date": "happened, or was created, on or after the run date",
    "before_window": "happened before the window of snapshot.window_days",
    "held_out": "a pair that the given split does not train on",
    "unknown_user": "recommendations were asked for, and no interaction of before the run date is used",
    "no_vector": "nothing ties the user or item to the night's embedding space (or, where recommendations are asked for, the "
    "user to the backbone)",
    "no_history": "recommendations were asked for, and no item of the user's history can be named",
    "no_candidate": "recommendations were asked for, and every published item is in the history",
    "k_core": "left over with too few others after snapshot.k_core_users and k_core_items",
}

# SQL's TRIM knows spaces only: not tabs, line ends, no-break spaces or a byte order mark.
_BLANK = r"\s\p{Z}\p{Cc}\p{Cf}"

#: What a prompt may name of an item; content is title and text.
FIELDS = ("title", "text", "content")

# Reasons that hold for rows by the million on a good day are counted in one row, not listed.
SET_ASIDE = ("after_run_date", "before_window", "held_out", "k_core")

#: Rejected rows that are listed of one table and reason; more (a stream that delivers twice, an upstream job that broke) are
#: counted in one row too: whoever reads them could not hold them.
LISTED = 100_000


def rejects(
    frame: DataFrame, table: str, key: Column, reason: Column, detail: Column, rows: Column | None = None
) -> DataFrame:
    """Rows of REJECTED from those of `frame`, alike ones added up; `rows`: how many each of them stands for, 1 if None.

    What is counted (SET_ASIDE) has neither key nor detail.
    """
    from pyspark.sql import functions as F

    counted = reason.isin(*SET_ASIDE)
    facts = frame.select(
        F.lit(table).alias("table"),
        F.make_valid_utf8(F.when(~counted, key)).alias("key"),
        reason.alias("reason"),
        F.make_valid_utf8(F.when(~counted, detail)).alias("detail"),
        (F.lit(1) if rows is None else rows).cast("bigint").alias("rows"),
    )
    return (
        facts.groupBy("table", "key", "reason")
        .agg(F.min("detail").alias("detail"), F.sum("rows").alias("rows"))
        .select("table", "key", "reason", "detail", "rows")
    )


def listed(rejected: DataFrame, limit: int = LISTED) -> DataFrame:
    """`rejected` (columns of REJECTED), where what has more than `limit` rows of one table and reason is one row, without key
    and detail. `rejected` is read twice: the caller keeps it.
    """
    from pyspark.sql import functions as F

    sizes = rejected.groupBy("table", "reason").agg(F.count("*").alias("n")).where(F.col("n") > limit).collect()
    if not sizes:
        return rejected
    crowded = F.lit(False)
    for row in sizes:
        crowded = crowded | ((F.col("table") == row["table"]) & (F.col("reason") == row["reason"]))
    counted = rejected.where(crowded).groupBy("table", "reason").agg(F.sum("rows").alias("rows"))
    nothing = F.lit(None).cast("string")
    return rejected.where(~crowded).unionByName(
        counted.select("table", nothing.alias("key"), "reason", nothing.alias("detail"), "rows")
    )


def _is_text(*columns: str) -> Column:
    """All of `columns` are null or valid UTF-8."""
    from pyspark.sql import functions as F

    valid = F.lit(True)
    for column in columns:
        valid = valid & (F.col(column).isNull() | F.is_valid_utf8(F.col(column)))
    return valid


def _trimmed(column: str) -> Column:
    """The column without what is blank at its ends; "" for null."""
    from pyspark.sql import functions as F

    # Every run of blanks is looked at once, from its beginning: a long one costs no more than its length.
    ends = f"^[{_BLANK}]++|(?<![{_BLANK}])[{_BLANK}]++$"
    return F.regexp_replace(F.coalesce(F.col(column), F.lit("")), ends, "")


def _is_blank(column: str) -> Column:
    """The column is null, or nothing in it can be seen."""
    from pyspark.sql import functions as F

    return ~F.coalesce(F.rlike(F.col(column), F.lit(f"[^{_BLANK}]")), F.lit(False))


def template(prompt: str) -> list[tuple[str, str | None]]:
    """The pieces of `prompt`: literal text, and the field of an item that follows it, if any.

    Raises:
        ValueError: it is no template, names another field than {title}, {text} and {content}, or none.
    """
    parts = []
    for literal, field, form, conversion in string.Formatter().parse(prompt):
        if field is not None and field not in FIELDS:
            raise ValueError(f"it names {{{field}}}; an item has {', '.join(f'{{{f}}}' for f in FIELDS)}")
        if form or conversion:
            raise ValueError(f"{{{field}}} has a format, which a text has not: write {{{field}}}")
        parts.append((literal, field))
    if all(field is None for _, field in parts):
        raise ValueError(f"{prompt!r} names no field of an item: every item would have the same text")
    return parts


def content(prompt: str) -> Column:
    """What the LLM reads of an item: `prompt` with {title}, {text} and {content} (title and text, one below the other).

    Null if all the fields that the prompt names are empty. Raises as `template`.
    """
    from pyspark.sql import functions as F

    title, text = (F.nullif(_trimmed(c), F.lit("")) for c in ("title", "text"))
    # Many catalogues repeat the title at the head of the text.
    both = F.when(F.startswith(text, title), text).otherwise(F.concat_ws("\n", title, text))
    fields = dict(zip(FIELDS, (title, text, both), strict=True))
    parts, named = [], []
    for literal, field in template(prompt):
        parts.append(F.lit(literal))
        if field is not None:
            parts.append(F.coalesce(fields[field], F.lit("")))
            named.append(F.nullif(fields[field], F.lit("")).isNotNull())
    any_field = named[0]
    for more in named[1:]:
        any_field = any_field | more
    return F.when(any_field, F.concat(*parts))


def clean_items(items: DataFrame, midnight: datetime, prompt: str, max_text_bytes: int) -> tuple[DataFrame, DataFrame]:
    """One row an item that exists at `midnight`, with `content` and `text_sha256`, and the rejected rows.

    Of rows with one id the latest created is kept, then the one whose text hashes lowest: whatever the rows' order.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    size = F.coalesce(F.octet_length("title"), F.lit(0)) + F.coalesce(F.octet_length("text"), F.lit(0))
    reason = (
        F.when(_is_blank("item_id"), "null_id")
        .when(~_is_text("item_id", "title", "text"), "invalid_utf8")
        .when(F.col("created_at") >= F.lit(midnight), "after_run_date")
        .when(size > max_text_bytes, "text_too_long")
    )
    flagged = items.withColumn("reason", reason).withColumn(
        "detail", F.when(F.col("reason") == "text_too_long", F.concat(F.lit("text of "), size, F.lit(" bytes")))
    )
    good = flagged.where("reason is null").withColumn("content", content(prompt))
    good = good.withColumn("text_sha256", F.sha2(F.col("content"), 256))
    everything = F.sha2(F.to_json(F.struct("title", "text", "created_at"), {"ignoreNullFields": "false"}), 256)
    order = Window.partitionBy("item_id").orderBy(F.col("created_at").desc_nulls_last(), everything)
    ranked = good.withColumn("copy", F.row_number().over(order)).withColumn(
        "first_sha256", F.first("text_sha256").over(order.rowsBetween(Window.unboundedPreceding, Window.currentRow))
    )
    kept = ranked.where("copy = 1").select("item_id", "title", "content", "text_sha256", "created_at")
    copies = ranked.where("copy > 1")
    same = F.when(F.col("text_sha256").eqNullSafe(F.col("first_sha256")), "the same text").otherwise("another text")
    rejected = rejects(
        flagged.where("reason is not null"), "items", F.col("item_id"), F.col("reason"), F.col("detail")
    ).unionByName(rejects(copies, "items", F.col("item_id"), F.lit("duplicate"), same))
    return kept, rejected


def usable_weight() -> Column:
    """Column `weight` is a number above 0 whose sums float32 can hold; one that is null counts as 1."""
    from pyspark.sql import functions as F

    weight = F.coalesce("weight", F.lit(1.0))
    return ~F.isnan(weight) & weight.between(1e-30, 1e30)


def clean_interactions(
    interactions: DataFrame,
    known_items: DataFrame,
    midnight: datetime,
    window_days: int | None,
    trained_pairs: DataFrame | None,
) -> tuple[DataFrame, DataFrame]:
    """The (user, item) pairs of before `midnight`, their events added up, and the rejected rows.

    Args:
        known_items: one column, item_id.
        trained_pairs: with a given split, the pairs (user_id, item_id) to train on; the others are held out.

    Returns:
        pairs (user_id, item_id, weight double, events bigint, last_time, last_seq, rows bigint: events and their copies),
        rejected, which is computed from pairs too: persist them. An event without a time is taken as past: the source keeps
        none.
    """
    from pyspark.sql import functions as F

    weight = F.coalesce("weight", F.lit(1.0))
    old = F.lit(False) if window_days is None else F.col("event_time") < F.lit(midnight - timedelta(days=window_days))
    reason = (
        F.when(F.col("event_time") >= F.lit(midnight), "after_run_date")
        .when(
            _is_blank("user_id") | _is_blank("item_id"),
            "null_id",
        )
        .when(~_is_text("user_id", "item_id"), "invalid_utf8")
        .when(~usable_weight(), "bad_weight")
        .when(old, "before_window")
    )
    flagged = interactions.withColumn("weight", weight).withColumn("reason", reason)
    known = known_items.select("item_id", F.lit(True).alias("known"))
    flagged = flagged.join(known, "item_id", "left").withColumn(
        "reason", F.coalesce("reason", F.when(F.col("known").isNull(), "unknown_item"))
    )
    if trained_pairs is not None:
        trained = trained_pairs.select("user_id", "item_id", F.lit(True).alias("trained")).distinct()
        flagged = flagged.join(trained, ["user_id", "item_id"], "left").withColumn(
            "reason", F.coalesce("reason", F.when(F.col("trained").isNull(), "held_out"))
        )
    # One row an event: its copies are rejected.
    event = ["user_id", "item_id", "event_time", "event_type", "seq"]
    events = (
        flagged.where("reason is null")
        .groupBy(*event)
        .agg(F.max("weight").alias("weight"), F.count("*").alias("copies"))
    )
    # In one order: as rows arrive, the last bits of the sum would differ from run to run, and with them what is trained.
    weights = F.array_sort(F.collect_list("weight"))
    pairs = events.groupBy("user_id", "item_id").agg(
        F.aggregate(weights, F.lit(0.0), lambda total, one: total + one).alias("weight"),
        F.count("*").alias("events"),
        F.max("event_time").alias("last_time"),
        F.max("seq").alias("last_seq"),
        F.sum("copies").alias("rows"),
    )
    both = F.concat_ws(" ", F.coalesce("user_id", F.lit("(null)")), F.coalesce("item_id", F.lit("(null)")))
    key = F.when(F.col("reason") == "unknown_item", F.col("item_id")).otherwise(both)
    detail = F.when(F.col("reason") == "bad_weight", F.concat(F.lit("weight "), F.col("weight").cast("string")))
    rejected = rejects(flagged.where("reason is not null"), "interactions", key, F.col("reason"), detail).unionByName(
        rejects(
            pairs.where("rows > events"),
            "interactions",
            both,
            F.lit("duplicate"),
            F.lit(None).cast("string"),
            F.col("rows") - F.col("events"),
        )
    )
    return pairs, rejected


def k_core(pairs: DataFrame, users: int, items: int) -> tuple[DataFrame, DataFrame]:
    """`pairs` whose users have at least `users` items and items at least `items` users, all among themselves."""
    from pyspark.sql import functions as F

    kept, before = pairs, -1
    while users > 1 or items > 1:
        for side, least in (("user_id", users), ("item_id", items)):
            if least > 1:
                enough = kept.groupBy(side).agg(F.count("*").alias("n")).where(F.col("n") >= least).select(side)
                kept = kept.join(enough, side, "left_semi")
        kept = kept.localCheckpoint()
        now = kept.count()
        if now == before:
            break
        before = now
    dropped = pairs.join(kept.select("user_id", "item_id"), ["user_id", "item_id"], "left_anti")
    return kept, rejects(
        dropped,
        "interactions",
        F.lit(None).cast("string"),
        F.lit("k_core"),
        F.lit(None).cast("string"),
        F.col("events"),
    )


def number(ids: DataFrame, column: str, index: str) -> DataFrame:
    """`ids` with an int column `index`: 0, 1, ... in the order of `column` (unique).

    One task sorts them all: ids are small beside the interactions, and Spark spills what does not fit.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    return ids.withColumn(index, (F.row_number().over(Window.orderBy(column)) - 1).cast("int"))
