"""udfs/cleaning.py: which of many rows is kept, how events add up, and how many rejected rows are named."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from udfs import cleaning

MIDNIGHT = datetime(2026, 3, 1, tzinfo=UTC)
EARLY, LATE = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
EVENTS = "user_id string, item_id string, event_time timestamp, event_type string, weight double, seq bigint"
ITEMS = "item_id string, title string, text string, created_at timestamp"


def _rejected(frame: Any) -> dict[tuple[str | None, str], tuple[str | None, int]]:
    return {(row["key"], row["reason"]): (row["detail"], row["rows"]) for row in frame.collect()}


def test_of_items_with_one_id_the_latest_created_of_before_the_run_date_is_kept(spark: Any) -> None:
    rows = [
        ("twice", "Old", None, EARLY),
        ("twice", "New", None, LATE),
        ("twice", "Newer than the run", None, MIDNIGHT),
        ("undated", "Some day", None, EARLY),
        ("undated", "No day", None, None),
        ("same", "Same", None, EARLY),
        ("same", "Same", None, LATE),
        ("just", "Just before", None, MIDNIGHT - timedelta(microseconds=1)),
        ("later", "Later", None, MIDNIGHT),
    ]
    frame = spark.createDataFrame(rows, ITEMS)
    kept, rejected = cleaning.clean_items(frame, MIDNIGHT, "{content}", 1000)
    found = {row["item_id"]: (row["title"], row["created_at"]) for row in kept.collect()}
    assert {name: title for name, (title, _) in found.items()} == {
        "twice": "New",
        "undated": "Some day",
        "same": "Same",
        "just": "Just before",
    }
    assert found["same"][1].astimezone(UTC) == LATE
    assert _rejected(rejected) == {
        (None, "after_run_date"): (None, 2),
        ("twice", "duplicate"): ("another text", 1),
        ("undated", "duplicate"): ("another text", 1),
        ("same", "duplicate"): ("the same text", 1),
    }


def test_what_the_model_reads_is_the_prompt_with_the_items_fields(spark: Any) -> None:
    rows = [
        ("both", "Tea", "green"),
        ("repeated", " Tea ", "Tea, green"),
        ("title", "Tea", "\t"),
        ("text", None, "green"),
        ("none", "", None),
    ]
    frame = spark.createDataFrame(rows, "item_id string, title string, text string")
    read = frame.select("item_id", cleaning.content("{content}").alias("plain"), cleaning.content("<{title}|{text}>"))
    assert {name: (plain, prompted) for name, plain, prompted in read.collect()} == {
        "both": ("Tea\ngreen", "<Tea|green>"),
        "repeated": ("Tea, green", "<Tea|Tea, green>"),
        "title": ("Tea", "<Tea|>"),
        "text": ("green", "<|green>"),
        "none": (None, None),
    }


@pytest.mark.parametrize("prompt", ["{name}", "{title:>9}", "{title!r}", "nothing", "{"])
def test_a_prompt_that_is_none_is_an_error(prompt: str) -> None:
    with pytest.raises(ValueError):
        cleaning.template(prompt)


def test_copies_are_one_event_of_the_highest_weight_and_events_add_up(spark: Any) -> None:
    """Time, type and seq tell events apart, null is a value as any; weights are added in one order, however the rows come in."""
    summed = [10.0 ** (n % 7) / 3 for n in range(40)]
    old = MIDNIGHT - timedelta(days=28)
    events = [
        ("u", "copies", LATE, "buy", 1.0, 1),
        ("u", "copies", LATE, "buy", 5.0, 1),
        ("u", "copies", LATE, "buy", 3.0, 1),
        *[("u", "apart", when, kind, 2.0, seq) for when in (LATE, None) for kind in ("buy", None) for seq in (7, None)],
        ("u", "apart", None, None, 1.0, None),
        ("u", "unweighed", LATE, None, None, 3),
        ("u", "unweighed", LATE, None, None, 9),
        *[("u", "sum", LATE, None, weight, n) for n, weight in enumerate(summed)],
        ("u", "window", old, None, 4.0, None),
        ("u", "window", old - timedelta(microseconds=1), None, 1.0, None),
    ]
    known = spark.createDataFrame(
        [(name,) for name in ("copies", "apart", "unweighed", "sum", "window")], "item_id string"
    )
    weights, before = set(), spark.conf.get("spark.sql.shuffle.partitions")
    for partitions, rows in ((1, events), (2, events[::-1]), (3, events[1::2] + events[::2])):
        spark.conf.set("spark.sql.shuffle.partitions", partitions)
        frame = spark.createDataFrame(rows, EVENTS).repartition(partitions)
        pairs, rejected = cleaning.clean_interactions(frame, known, MIDNIGHT, 28, None)
        found = {row["item_id"]: row for row in pairs.persist().collect()}
        weights.add(found["sum"]["weight"])
        assert _rejected(rejected) == {
            ("u copies", "duplicate"): (None, 2),
            ("u apart", "duplicate"): (None, 1),
            (None, "before_window"): (None, 1),
        }
        pairs.unpersist()
    spark.conf.set("spark.sql.shuffle.partitions", before)
    assert weights == {sum(sorted(summed))}
    told = {name: (row["weight"], row["events"], row["last_seq"]) for name, row in found.items() if name != "sum"}
    assert told == {
        "copies": (5.0, 1, 1),
        "apart": (16.0, 8, 7),
        "unweighed": (2.0, 2, 9),
        "window": (4.0, 1, None),
    }
    assert found["apart"]["last_time"].astimezone(UTC) == LATE


def test_rejected_rows_of_a_reason_are_named_up_to_a_limit(spark: Any) -> None:
    rows = [
        *[("interactions", f"u{n} i", "duplicate", None, 2) for n in range(3)],
        *[("interactions", f"i{n}", "unknown_item", None, 1) for n in range(2)],
        *[("items", f"i{n}", "duplicate", "the same text", 1) for n in range(2)],
    ]
    frame = spark.createDataFrame(rows, cleaning.REJECTED)
    assert {tuple(row) for row in cleaning.listed(frame, 2).collect()} == {
        ("interactions", None, "duplicate", None, 6),
        *rows[3:],
    }
    assert cleaning.listed(frame, 3).count() == len(rows)
