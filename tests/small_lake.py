"""A small lake of made-up shops whose right answer is known: users buy within their topic, texts name the topic."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml
from deltalake import write_deltalake

RUN_DATE = date(2026, 3, 1)
TOPICS = {
    "tea": "green tea leaves, loose, organic, from the garden",
    "chess": "chess board with wooden pieces and a clock",
    "yarn": "merino wool yarn for knitting warm socks",
    "bike": "bicycle tyre and inner tube for the road",
}


# On a few rows most of Spark's time would go to compiling and planning again what runs once.
SPARK_CONF = {
    "spark.driver.memory": "1g",
    "spark.sql.shuffle.partitions": "2",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.adaptive.enabled": "false",
    "spark.ui.enabled": "false",
}


@dataclass(frozen=True)
class SmallLake:
    """Where the lake and its settings are."""

    lake: Path
    conf: Path
    run_date: date = RUN_DATE

    @property
    def cold_items(self) -> set[str]:
        """The items that nobody bought before the run date."""
        return {f"{topic}-new-{i}" for topic in TOPICS for i in range(3)}


def tables(seed: int = 11, new_items: int = 3) -> tuple[pa.Table, pa.Table]:
    """(interactions, items): 20 users and 12 warm items a topic, and new ones that are first bought from RUN_DATE on."""
    rng = np.random.default_rng(seed)
    events, items = [], []
    first = datetime(RUN_DATE.year, RUN_DATE.month, RUN_DATE.day, tzinfo=UTC)
    for topic, text in TOPICS.items():
        names = [f"{topic}-{i}" for i in range(12)]
        new = [f"{topic}-new-{i}" for i in range(new_items)]
        sizes = ["small", "large", "plain", "fancy", "cheap", "gift"]
        for i, name in enumerate([*names, *new]):
            items.append({"item_id": name, "title": f"{sizes[i % 6]} {topic} no. {i}", "text": text})
        for u in range(20):
            user = f"{topic}-user-{u:02d}"
            for name in rng.choice(names, 6, replace=False):
                events.append((user, str(name), first - timedelta(days=float(rng.integers(2, 60)), hours=1)))
            for name in rng.choice(new, min(2, new_items), replace=False) if new else ():
                events.append((user, str(name), first + timedelta(days=float(rng.integers(1, 9)), hours=1)))
        # A few buy in another topic, so that the graph is one piece.
        other = list(TOPICS)[(list(TOPICS).index(topic) + 1) % len(TOPICS)]
        for u in range(3):
            events.append((f"{topic}-user-{u:02d}", f"{other}-{u}", first - timedelta(days=5)))
    # The nights of a week are whole: what follows them is known for longer than evaluate.horizon_days.
    events.append(("tea-user-00", "tea-0", first + timedelta(days=15)))
    user_id, item_id, event_time = zip(*events, strict=True)
    when = pa.array(event_time, pa.timestamp("us", tz="UTC"))
    interactions = pa.table({"user_id": list(user_id), "item_id": list(item_id), "event_time": when})
    return interactions, pa.Table.from_pylist(items)


def build(folder: Path, new_items: int = 3, **overrides: object) -> SmallLake:
    """Write the lake and a settings file into `folder`; `new_items` a topic are cold; `overrides` are top-level settings."""
    lake, conf = folder / "lake", folder / "small.yaml"
    interactions, items = tables(new_items=new_items)
    write_deltalake(str(lake / "interactions"), interactions)
    write_deltalake(str(lake / "items"), items)
    settings: dict[str, object] = {
        "lake": str(lake),
        "seed": 3,
        "text": {"model": "minilm", "max_tokens": 32, "shard_texts": 16},
        "cf": {"model": "als", "dimension": 8, "epochs": 8, "blocks": 1},
        "filterllm": {"epochs": 15, "hidden": 64, "batch_size": 16, "validation_share": 0.1},
        "sampling": {"k": 10, "shard_items": 4},
        "evaluate": {"protocol": "temporal", "k": [10], "bootstrap": 50, "horizon_days": 9},
        "spark": {"conf": SPARK_CONF},
    }
    conf.write_text(yaml.safe_dump({**settings, **overrides}))
    return SmallLake(lake, conf)


def copied(lake: Path, folder: Path) -> SmallLake:
    """The lake at `lake` copied into `folder`, with a settings file of its own."""
    copy = build(folder)
    shutil.rmtree(copy.lake)
    shutil.copytree(lake, copy.lake)
    return copy
