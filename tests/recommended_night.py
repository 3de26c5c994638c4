"""A small night that is published, with what jobs/recommend.py reads of it."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from jobs import item_index
from jobs.lake import Lake
from jobs.run import Run
from tests import staged_night, word_llm
from tests.test_refresh import BPR, SAMPLED

DAY = date(2026, 3, 1)
COLD = ("new-0", "new-1")
PAIRS = {**staged_night.blocks(n_users=24), ("loner", "no-text"): 1.0}


def language_model(folder: Path) -> Path:
    """One that knows the words of the night's titles."""
    titles = [item.replace("-", " - ") for item in sorted({item for _, item in PAIRS} | set(COLD))]
    return word_llm.build(folder, titles)


def night(lake: Path, language_model: Path, **allmrec: Any) -> Run:
    """A published night: users of a block buy its items, whose texts say the block; `loner` is tied to nobody."""
    reader = {
        "model": str(language_model), "epochs": 15, "learning_rate": 1e-2, "batch_size": 8, "negatives": 4,
        "history": 3, "title_tokens": 4, "shard_users": 3,
    }  # fmt: skip
    alignment = {"epochs": 15, "patience": 15, "learning_rate": 1e-2, "stop_by": "loss", "joint": 16}
    sections = {"reader": reader, "alignment": alignment, **allmrec}
    run = staged_night.run_of(lake, DAY, cf=BPR, snapshot={"warm_interactions": 2}, allmrec=sections)
    texts = {item: np.eye(5)[int(item[1])].tolist() for item in sorted({i for _, i in PAIRS if i[0] == "i"})}
    texts |= {item: np.eye(5)[n].tolist() for n, item in enumerate(COLD)}
    staged_night.refreshed(run, PAIRS, SAMPLED, (*COLD, "no-text"), texts)
    staged_night.publish(run)
    refreshed = run.staging("refresh")
    item_index.export(run, refreshed.read("item_embeddings"), refreshed.read("user_embeddings"))
    return run


def rows_of(lake: Lake, run_id: str) -> list[dict[str, Any]]:
    """What a run left in the table, by user and rank."""
    table = lake.read("recommendations", run_id=run_id)
    return table.sort_by([("user_id", "ascending"), ("rank", "ascending")]).to_pylist()
