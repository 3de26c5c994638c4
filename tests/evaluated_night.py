"""What `jobs.evaluate` finds: stages of a night that leave made-up vectors, a model and a snapshot; its truth as pairs, and
the rule of the temporal one in plain pandas."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from schemas.table import table as schema
from tests import small_lake as small
from udfs.filterllm import Config, FilterLLM, dump
from udfs.vectors import to_column

TOPICS = list(small.TOPICS)


def vector(name: str) -> np.ndarray:
    """The topic as a unit vector, and a little that differs from name to name."""
    rng = np.random.default_rng(sum(map(ord, name)))
    return np.eye(4)[TOPICS.index(name.split("-")[0])] + 0.05 * rng.normal(size=4)


def publish(run, out):
    """What a night's publishing leaves: vectors that know the topics; one user and one item have none."""
    staged = run.staging("snapshot")
    users = sorted(staged.read("users")["user_id"].to_pylist())[:-1]
    items = sorted(staged.read("items_labelled")["item_id"].to_pylist())[:-1]
    same = {"refresh_date": run.run_date, "run_id": run.run_id, "model_version": "m", "space_version": "s"}

    def table(key, ids, **more):
        body = {name: pa.array([value] * len(ids)) for name, value in {**same, **more}.items()}
        rng = np.random.default_rng(7)
        vectors = np.array([vector(i) if i.split("-")[0] in TOPICS else rng.normal(size=4) for i in ids])
        return pa.table({**body, key: ids, "embedding": to_column(vectors)})

    users_table = table("user_id", users)
    items_table = table("item_id", items, source="cf", interactions=1, updated_at=run.midnight)
    sampled = schema("sampled_interactions").arrow_schema.empty_table()
    versions = {
        "user_embeddings": run.lake.commit("user_embeddings", users_table, app="t/users"),
        "item_embeddings": run.lake.commit("item_embeddings", items_table, app="t/items"),
        "sampled_interactions": run.lake.commit("sampled_interactions", sampled, app="t/sampled"),
    }
    return {"output_versions": versions, "space_version": "s"}


def train(run, out):
    """What stage filterllm_train leaves: a model whose mapper is the identity, for the users but the first, and its texts."""
    users = sorted(run.staging("snapshot").read("users")["user_id"].to_pylist())[1:]
    model = FilterLLM(Config(width=4, dimension=4, users=len(users), mapper="linear"))
    with torch.no_grad():
        model.mapper.weight.copy_(torch.eye(4))
        model.mapper.bias.zero_()
        model.vocabulary.copy_(torch.tensor(np.array([vector(user) for user in users])))
        model.bias.copy_(torch.linspace(-1, 1, len(users)))
    artifact = run.artifact("models", "0123456789abcdef")
    for name, body in dump(model).items():
        artifact.write_bytes(name, body)
    artifact.write("users", pa.table({"user_id": users}))
    artifact.complete({})
    items = run.staging("snapshot").read("items_labelled").to_pylist()
    texts = {"text_sha256": [i["text_sha256"] for i in items], "model_version": ["encoder"] * len(items)}
    vectors = 2 * np.array([vector(i["item_id"]) for i in items])
    run.lake.commit("text_embeddings", pa.table({**texts, "embedding": to_column(vectors)}), app="t/texts")
    return {"model_version": "0123456789abcdef", "encoder_version": "encoder", "trained": True}


def stage_snapshot(train: pd.DataFrame, items: dict[str, str]):
    """A stage that leaves what `snapshot` does, of training pairs (user_id, item_id) and item -> text."""
    user_ids, item_ids = sorted(train["user_id"].unique()), sorted(items)
    degree = train.groupby("item_id")["user_id"].nunique().reindex(item_ids).fillna(0).astype(int).tolist()

    def index(column, ids):
        return pa.array(column.map({name: i for i, name in enumerate(ids)}).to_numpy(np.int32))

    def stage(run, out):
        out.write("users", pa.table({"user_id": user_ids, "user_idx": pa.array(range(len(user_ids)), pa.int32())}))
        texts = [items[item] for item in item_ids]
        labelled = {"item_id": item_ids, "label": ["warm" if n else "cold" for n in degree], "interactions": degree}
        labelled |= {"title": texts, "content": texts, "text_sha256": texts}
        out.write("items_labelled", pa.table({**labelled, "item_idx": pa.array(range(len(item_ids)), pa.int32())}))
        pairs = {"user_id": list(train["user_id"]), "item_id": list(train["item_id"])}
        pairs |= {"user_idx": index(train["user_id"], user_ids), "item_idx": index(train["item_id"], item_ids)}
        out.write("training_interactions", pa.table(pairs))
        return {"users": len(user_ids)}

    return stage


def changed(run, seed=None, **changes):
    """The same run with other settings of evaluate."""
    settings = run.settings.evaluate.model_copy(update=changes)
    more = {"evaluate": settings, "seed": run.settings.seed if seed is None else seed}
    return replace(run, settings=run.settings.model_copy(update=more))


def pairs_of(task, catalog):
    """The task's truth as {(user_id, item_id)}."""
    true = task.truth.tocoo()
    users, items = task.users[true.row], task.candidates[true.col]
    return {(catalog.user_ids[u], catalog.item_ids[i]) for u, i in zip(users, items, strict=True)}


def temporal(events: pd.DataFrame, at: datetime, horizon_days: int) -> pd.DataFrame:
    """What was known at `at`, and what happened within `horizon_days` from then.

    An item is cold if nobody had it before `at`. Test pairs are new ones of users who were known then.

    Args:
        events: columns user_id, item_id, event_time (UTC); an event without a time is taken as past.

    Returns:
        user_id, item_id, part (train, warm_test or cold_test), one row a pair; sorted by user and item.
    """
    times = pd.to_datetime(events["event_time"], utc=True)
    until = at + timedelta(days=horizon_days)

    def distinct(rows: pd.Series) -> pd.DataFrame:
        return events.loc[rows, ["user_id", "item_id"]].drop_duplicates()

    train = distinct(times.isna() | (times < at)).assign(part="train")
    later = distinct((times >= at) & (times < until))
    later = later[later["user_id"].isin(train["user_id"])]
    later = later.merge(train, on=["user_id", "item_id"], how="left")
    later = later[later["part"].isna()]
    later["part"] = np.where(later["item_id"].isin(train["item_id"]), "warm_test", "cold_test")
    return pd.concat([train, later]).sort_values(["user_id", "item_id"], ignore_index=True)
