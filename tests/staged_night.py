"""Staged tables of a night, made by hand: what the stages cf and refresh are given."""

from __future__ import annotations

import hashlib
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import cf, refresh
from jobs.run import OUTPUTS, Run, execute
from jobs.settings import Settings
from schemas.table import table as schema
from udfs import word_map
from udfs.word_map import WordMap

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
    order = np.random.default_rng(1).permutation(len(pairs)).tolist()
    write(
        "training_interactions",
        [
            {"user_id": u, "item_id": x, "user_idx": user_idx[u], "item_idx": item_idx[x], "weight": w, "events": 1}
            | {"last_seq": seq}
            for ((u, x), w), seq in zip(pairs.items(), order, strict=True)
        ],
    )
    digest = hashlib.sha256(repr(sorted(pairs.items())).encode()).hexdigest()
    of_items = hashlib.sha256(repr(sorted(labels.items())).encode()).hexdigest()
    out.complete({"training_digest": digest, "items_digest": of_items, "pairs": len(pairs)})
    if texts:
        vectors = pa.array(list(texts.values()), pa.list_(pa.float32()))
        rows = {"text_sha256": [f"sha-{x}" for x in texts], "model_version": ["encoder"] * len(texts)}
        run.lake.commit("text_embeddings", pa.table({**rows, "embedding": vectors}), app=run.run_id)
        run.staging("text_embeddings").complete({"model_version": "encoder"})


def refreshed(
    run: Run,
    pairs: dict[Pair, float],
    sampled: dict[str, list[tuple[str, float]]],
    cold: tuple[str, ...] = (),
    texts: dict[str, list[float]] | None = None,
    held_out: tuple[str, ...] = (),
    words: WordMap | None = None,
    unseen: WordMap | None = None,
) -> tuple[dict[str, Any], cf.Space]:
    """Run cf and refresh on staged tables: facts of refresh, and the night's space of stage cf.

    `sampled`: FilterLLM's users of cold items, and of the warm ones `held_out`, with their probabilities.
    `words`, `unseen`: the maps that its model came with, with and without the items that were held out; an item's text is its id.
    """
    snapshot(run, pairs, cold, texts)
    chosen = execute(run, "cf", cf.run)
    run.staging("filterllm_train").complete({"model_version": "m1", "space_version": chosen["space_version"]})
    model = run.artifact("models", "m1")
    maps = {"words": words, "words_without_held_out": unseen}
    for name, one in maps.items():
        if one is not None:
            model.write(name, word_map.to_table(one))
    model.complete({name: 0 if one is None else len(one.words) for name, one in maps.items()})
    rows = [
        {"item_id": item, "user_id": user, "rank": rank, "probability": p, "propensity": "top_k"}
        for item, users in sampled.items()
        for rank, (user, p) in enumerate(users, 1)
    ]
    contract = schema("sampled_interactions")
    names = ("item_id", "user_id", "rank", "probability", "propensity")
    columns = {name: pa.array([r[name] for r in rows], contract.column(name).arrow_type) for name in names}
    scored = run.staging("filterllm_score")
    table, held = pa.table(columns), pa.array([row["item_id"] in held_out for row in rows], pa.bool_())
    scored.write("sampled", table.filter(pc.invert(held)))
    scored.write("held_out", table.filter(held))
    scored.complete({"model_version": "m1", "items": len(sampled), "rows": len(rows)})
    return execute(run, "refresh", refresh.run), cf.load_space(run, chosen["space_version"])


def publish(run: Run) -> None:
    """Commit what stage refresh left as the stage `publish` does: tables, then the row of `runs`."""
    staged = run.staging("refresh")
    versions = {
        name: run.lake.commit(
            name, staged.read(name), app=f"{name}/{run.run_date}", replace={"refresh_date": run.run_date}
        )
        for name in OUTPUTS
    }
    run.record("publish", {"space_version": staged.facts()["space_version"]}, 0.0, versions)


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
