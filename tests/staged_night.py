"""Staged tables of a night, made by hand: what the stages cf and refresh are given."""

from __future__ import annotations

import hashlib
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.run import Run
from jobs.settings import Settings
from schemas.table import table as schema

Pair = tuple[str, str]


def run_of(lake: Path, day: date, number: int = 1, **settings: Any) -> Run:
    """An open run of a lake at `lake`; it has ALS of 3 dimensions unless `settings` say otherwise."""
    cf = {
        "model": "als",
        "dimension": 3,
        "epochs": 6,
        "alpha": 10.0,
        "blocks": 1,
        "device": "cpu",
        **settings.pop("cf", {}),
    }
    chosen = Settings.model_validate({"lake": str(lake), "cf": cf, **settings})
    return Run(chosen, day, f"{day:%Y%m%d}-{number:012x}", number, {"interactions": 0, "items": 0}, chosen.digest())


def snapshot(
    run: Run, pairs: dict[Pair, float], cold: tuple[str, ...] = (), texts: dict[str, list[float]] | None = None
) -> None:
    """Stage what snapshot leaves: `pairs` (user, item) -> weight; items without a pair, and those of `cold`, are cold.

    With `texts` (item -> embedding) these items have a text, and stage text_embeddings has left its embedding.
    """
    users = sorted({user for user, _ in pairs})
    items = sorted({item for _, item in pairs} | set(cold))
    user_idx, item_idx = ({name: i for i, name in enumerate(names)} for names in (users, items))
    out = run.staging("snapshot")

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        contract = schema(name)
        columns = {c.name: pa.array([row.get(c.name) for row in rows], c.arrow_type) for c in contract.columns}
        table = pa.table(columns)
        # As Spark leaves it: in no particular order.
        out.write(name, table.take(pa.array(np.random.default_rng(0).permutation(table.num_rows))))

    write("users", [{"user_id": u, "user_idx": i, "interactions": 1} for i, u in enumerate(users)])
    degree = {item: sum(item == other for _, other in pairs) for item in items}
    labels = {item: "cold" if item in cold else "warm" for item in items}
    write(
        "items_labelled",
        [
            {"item_id": x, "item_idx": i, "label": labels[x], "interactions": degree[x], "title": x, "content": x}
            | ({"text_sha256": f"sha-{x}"} if texts and x in texts else {})
            for i, x in enumerate(items)
        ],
    )
    write(
        "training_interactions",
        [
            {"user_id": u, "item_id": x, "user_idx": user_idx[u], "item_idx": item_idx[x], "weight": w, "events": 1}
            for (u, x), w in pairs.items()
        ],
    )
    digest = hashlib.sha256(repr(sorted(pairs.items())).encode()).hexdigest()
    out.complete({"training_digest": digest, "pairs": len(pairs)})
    if texts:
        vectors = pa.array(list(texts.values()), pa.list_(pa.float32()))
        rows = {"text_sha256": [f"sha-{x}" for x in texts], "model_version": ["encoder"] * len(texts)}
        run.lake.commit("text_embeddings", pa.table({**rows, "embedding": vectors}), app=run.run_id)
        run.staging("text_embeddings").complete({"model_version": "encoder"})


def blocks(n_blocks: int = 3, n_users: int = 8, n_items: int = 6, seed: int = 0) -> dict[Pair, float]:
    """Users of a block with three quarters of its items: ("u0-3", "i0-5") -> weight."""
    rng = np.random.default_rng(seed)
    return {
        (f"u{b}-{u}", f"i{b}-{i}"): float(rng.integers(1, 5))
        for b in range(n_blocks)
        for u in range(n_users)
        for i in range(n_items)
        if rng.random() < 0.75
    }
