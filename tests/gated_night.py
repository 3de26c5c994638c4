"""A night by hand, as far as stage refresh: staged tables, a space and a model that every gate passes, and ways to break it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.run import Run
from jobs.settings import Settings
from schemas.table import table as schema

RUN_DATE = date(2026, 3, 1)
USERS, WARM, COLD, K, DIMENSION = 12, 20, 6, 5, 4
COLD_IDS = [f"cold-{i:02d}" for i in range(COLD)]
WARM_IDS = [f"warm-{i:02d}" for i in range(WARM)]
USER_IDS = [f"user-{i:02d}" for i in range(USERS)]
Break = Callable[[pa.Table], pa.Table]


def run_of(lake: Path, *, sequence: int = 1, run_date: date = RUN_DATE, **sections: Any) -> Run:
    settings = Settings.model_validate(
        {"lake": str(lake), "sampling": {"k": K}, "cf": {"dimension": DIMENSION}, **sections}
    )
    run_id = f"{run_date:%Y%m%d}-{sequence:012x}"
    return Run(settings, run_date, run_id, sequence, {"interactions": 3, "items": 1}, settings.digest())


def _rows(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    # Nullable, as staged Parquet is: whether there are nulls is for the gates to find out.
    fields = [pa.field(f.name, f.type) for f in schema(name).arrow_schema]
    return pa.Table.from_pylist(rows, pa.schema(fields))


def snapshot_tables(cold: int = COLD) -> dict[str, pa.Table]:
    """Every user has three warm items; one warm item has no text; every cold item has."""
    pairs = sorted({(u, (u * 3 + j * 5 + 2) % WARM) for u in range(USERS) for j in range(3)})
    degree = np.bincount([i for _, i in pairs], minlength=WARM)
    items = [*COLD_IDS[:cold], *WARM_IDS]
    labelled = [
        {
            "item_id": item,
            "item_idx": i,
            "label": "cold" if i < cold else "warm",
            "interactions": 0 if i < cold else int(degree[i - cold]),
            "title": item,
            "content": None if item == WARM_IDS[-1] else item,
            "text_sha256": None if item == WARM_IDS[-1] else f"sha-{item}",
        }
        for i, item in enumerate(items)
    ]
    training = [
        {
            "user_id": USER_IDS[u],
            "item_id": WARM_IDS[i],
            "user_idx": u,
            "item_idx": i + cold,
            "weight": 1.0,
            "events": 2,
        }
        for u, i in pairs
    ]
    rejected = [
        {"table": "interactions", "key": None, "reason": "after_run_date", "rows": 900},
        {"table": "interactions", "key": "user-00 warm-01", "reason": "duplicate", "rows": 4},
        {"table": "items", "key": "bare", "reason": "no_text", "rows": 1},
    ]
    return {
        "training_interactions": _rows("training_interactions", training),
        "users": _rows("users", [{"user_id": u, "user_idx": i, "interactions": 3} for i, u in enumerate(USER_IDS)]),
        "items_labelled": _rows("items_labelled", labelled),
        "rejected_rows": _as_spark(_rows("rejected_rows", rejected).drop_columns(["refresh_date", "run_id"])),
    }


def _as_spark(rejected: pa.Table) -> pa.Table:
    """With the column that Spark makes of a constant: it cannot be null."""
    at = rejected.schema.get_field_index("table")
    return rejected.cast(rejected.schema.set(at, pa.field("table", pa.string(), nullable=False)))


def snapshot_facts(tables: dict[str, pa.Table]) -> dict[str, Any]:
    events, items = 2 * tables["training_interactions"].num_rows, tables["items_labelled"].num_rows
    return {
        "rows_in": {"interactions": events + 904, "items": items + 1},
        "rows_used": {"interactions": events, "items": items},
        "rows_rejected": {"interactions": 904, "items": 1},
        "with_text": items,
        "newest_event": f"{RUN_DATE - timedelta(days=3)}T12:00:00+00:00",
    }


def refresh_tables(run: Run, cold: int = COLD) -> dict[str, pa.Table]:
    """Good output tables; vectors of norm near 1."""
    rng = np.random.default_rng(run.sequence)
    lineage = {
        "refresh_date": run.run_date,
        "run_id": run.run_id,
        "model_version": "m1",
        "space_version": "s1",
    }

    def vector() -> list[float]:
        v = rng.normal(size=DIMENSION)
        return list(v / np.linalg.norm(v) * rng.uniform(0.8, 1.2))

    sampled = [
        {
            "item_id": item,
            "user_id": USER_IDS[(i + rank) % USERS],
            "rank": rank,
            "probability": 0.5**rank,
            "propensity": "top_k",
            **lineage,
        }
        for i, item in enumerate(COLD_IDS[:cold])
        for rank in range(1, K + 1)
    ]
    items = [
        {
            "item_id": item,
            "embedding": vector(),
            "source": "sampled" if item in COLD_IDS else "cf",
            "interactions": 0 if item in COLD_IDS else 2,
            "updated_at": run.midnight - timedelta(days=int(item in WARM_IDS)),
            **lineage,
        }
        for item in [*COLD_IDS[:cold], *WARM_IDS]
    ]
    users = [{"user_id": user, "embedding": vector(), **lineage} for user in USER_IDS]
    made = {"sampled_interactions": sampled, "item_embeddings": items, "user_embeddings": users, "rejected_rows": []}
    tables = {name: _rows(name, rows) for name, rows in made.items()}
    return {**tables, "rejected_rows": tables["rejected_rows"].drop_columns(["refresh_date", "run_id"])}


def stage(
    run: Run,
    *,
    cold: int = COLD,
    breaks: dict[str, Break] | None = None,
    cf: dict[str, Any] | None = None,
    refresh: dict[str, Any] | None = None,
) -> None:
    """Leave everything that the gates read.

    Args:
        breaks: output table -> what is done to it first.
        cf, refresh: facts of these stages to change.
    """
    model = run.artifact("models", "m1")
    if not model.is_complete():
        for version in ("s1", "s2"):
            run.artifact("spaces", version).write("users", pa.table({"user_id": USER_IDS}))
            run.artifact("spaces", version).write("items", pa.table({"item_id": WARM_IDS}))
            run.artifact("spaces", version).complete({})
        model.write("users", pa.table({"user_id": [*USER_IDS, "gone"]}))
        model.complete({})
    tables = snapshot_tables(cold)
    outputs = refresh_tables(run, cold)
    for name, change in (breaks or {}).items():
        outputs[name] = change(outputs[name])
    space = {"space_version": "s1", "dimension": DIMENSION, "aligned_to": None, "residual": None, **(cf or {})}
    facts: dict[str, dict[str, Any]] = {
        "snapshot": snapshot_facts(tables),
        "cf": space,
        "filterllm_score": {"items": cold, "rows": cold * K, "model_version": "m1", "space_version": "s1"},
        "refresh": {**space, "model_version": "m1", **(refresh or {})},
    }
    for name, body in facts.items():
        out = run.staging(name)
        out.clear()
        for table, rows in (tables if name == "snapshot" else outputs if name == "refresh" else {}).items():
            out.write(table, rows)
        if name not in ("snapshot", "refresh"):
            out.write_bytes("done", b"")
        out.complete(body)


def where(column: str, value: Any, row: int = 0) -> Break:
    """A break: `column` of one row is `value`."""

    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value
        field = table.schema.field(column).with_nullable(True)
        return table.set_column(table.schema.get_field_index(column), field, pa.array(values, field.type))

    return change


def without(row: int) -> Break:
    """A break: one row is missing."""
    return lambda table: pa.concat_tables([table.slice(0, row), table.slice(row + 1)])


def again(row: int) -> Break:
    """A break: one row stands twice."""
    return lambda table: pa.concat_tables([table, table.slice(row, 1)])
