"""A small lake's night as far as stage text_embeddings, with real MiniLM vectors: what FilterLLM's stages are given."""

from __future__ import annotations

import hashlib
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import filterllm_score, filterllm_train, text_embeddings
from jobs.run import Run, execute
from jobs.settings import Settings
from tests.small_lake import RUN_DATE, tables
from udfs.vectors import to_column

SETTINGS: dict[str, Any] = {
    "seed": 3,
    "text": {"model": "minilm", "max_tokens": 24},
    "filterllm": {"epochs": 6, "hidden": 32, "batch_size": 24, "validation_share": 0.1, "retrain_days": 5},
    "sampling": {"k": 10, "shard_items": 5, "user_tile": 32},
}
NIGHTS = iter(range(10_000))


def night(
    lake: Path, day: date = RUN_DATE, *, without=(), texts=None, cold=True, space="space-a", **changes: Any
) -> Run:
    """A run whose earlier stages are complete: a snapshot of the small lake (without some users, with other texts), a
    space of SVD vectors, and MiniLM's vectors of all texts.
    """
    body = {**SETTINGS, **{name: {**SETTINGS.get(name, {}), **value} for name, value in changes.items()}}
    number = hashlib.sha256(str(next(NIGHTS)).encode()).hexdigest()[:12]
    run = Run(Settings(lake=str(lake), **body), day, f"{day:%Y%m%d}-{number}", 1, {}, "conf")
    events, items = tables()
    events = events.filter(pc.less(events["event_time"], pa.scalar(run_midnight(), events["event_time"].type)))
    pairs = sorted({(i, u) for u, i in zip(events["user_id"].to_pylist(), events["item_id"].to_pylist(), strict=True)})
    pairs = [(i, u) for i, u in pairs if u not in without]
    users, warm = sorted({u for _, u in pairs}), {i for i, _ in pairs}
    rows = sorted(items.to_pylist(), key=lambda row: row["item_id"])
    rows = [row for row in rows if cold or row["item_id"] in warm]
    content = [(texts or {}).get(r["item_id"], f"{r['title']}. {r['text']}") for r in rows]
    ids = [row["item_id"] for row in rows]
    snapshot = run.staging("snapshot")
    snapshot.write(
        "items_labelled",
        pa.table(
            {
                "item_id": ids,
                "item_idx": pa.array(range(len(ids)), pa.int32()),
                "label": ["warm" if i in warm else "cold" for i in ids],
                "content": pa.array(content, pa.string()),
                "text_sha256": pa.array([t and hashlib.sha256(t.encode()).hexdigest() for t in content], pa.string()),
            }
        ),
    )
    snapshot.write("users", pa.table({"user_id": users, "user_idx": pa.array(range(len(users)), pa.int32())}))
    user_idx, item_idx = [users.index(u) for _, u in pairs], [ids.index(i) for i, _ in pairs]
    pair_table = {"user_idx": pa.array(user_idx, pa.int32()), "item_idx": pa.array(item_idx, pa.int32())}
    snapshot.write("training_interactions", pa.table(pair_table))
    snapshot.complete({"training_digest": "pairs"})
    artifact = run.artifact("spaces", space)
    if not artifact.is_complete():
        matrix = np.zeros((len(users), len(ids)))
        matrix[user_idx, item_idx] = 1
        left, singular, right = np.linalg.svd(matrix, full_matrices=False)
        of_warm = [n for n, i in enumerate(ids) if i in warm]
        artifact.write("users", pa.table({"user_id": users, "embedding": to_column(left[:, :8] * singular[:8] ** 0.5)}))
        vectors = (right[:8].T * singular[:8] ** 0.5)[of_warm]
        table = {
            "item_id": [ids[n] for n in of_warm],
            "embedding": to_column(vectors),
            "interactions": matrix.sum(0)[of_warm],
        }
        artifact.write("items", pa.table(table))
        artifact.complete({"kind": "cf"})
    run.staging("cf").complete({"space_version": space})
    execute(run, "text_embeddings", text_embeddings.run)
    return run


def run_midnight() -> datetime:
    return datetime(RUN_DATE.year, RUN_DATE.month, RUN_DATE.day, tzinfo=UTC)


def train(run: Run) -> dict[str, Any]:
    return execute(run, "filterllm_train", filterllm_train.run)


def score(run: Run) -> tuple[dict[str, Any], pa.Table]:
    """Facts of scoring (and training, before) and the staged users."""
    train(run)
    facts = execute(run, "filterllm_score", filterllm_score.run)
    return facts, run.staging("filterllm_score").read("sampled")
