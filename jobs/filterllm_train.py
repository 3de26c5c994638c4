"""Stage filterllm_train: the FilterLLM model of the night, an earlier one or one that is trained now.

A model is an artifact (`_artifacts/models/<version>`): model.safetensors and config.json (udfs/filterllm.py), the table
`users` (user_id, in the order of the vocabulary), with LoRA also the adapters (udfs/lora.py). It belongs to one embedding
space and one language model, and its version is a hash of what it was made from.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from jobs import cf, text_embeddings
from jobs.run import Run, log
from jobs.settings import Settings
from jobs.staging import Staging
from udfs import filterllm, filterllm_training, lora
from udfs.filterllm import FilterLLM, FilterLLMError
from udfs.filterllm_training import FrozenTexts, Items, Options

_FILES = ("model.safetensors", "config.json")
_ADAPTER = ("adapter.safetensors", "adapter.json")


def conf_digest(settings: Settings) -> str:
    """Hash of the settings and the seed that decide a model, beside its space and language model."""
    return hashlib.sha256(f"{settings.digest('filterllm', 'text')} {settings.seed}".encode()).hexdigest()[:16]


def run(run: Run, out: Staging) -> dict[str, Any]:
    """Choose the night's model: the newest of the last filterllm.retrain_days days for this space, language model and
    settings, or train one.

    Returns:
        model_version; space_version; encoder_version (whose text embeddings it reads); trained: whether this run trained
        it; trained_on, users, items, validation_items, best_epoch, validation_nll, calibrated_nll, scale.

    Raises:
        FilterLLMError: no warm item of the space has a text.
    """
    identity = {
        "space_version": run.staging("cf").facts()["space_version"],
        "language_model": run.staging("text_embeddings").facts()["model_version"],
        "conf": conf_digest(run.settings),
    }
    days = run.settings.filterllm.retrain_days
    fresh = [v for day, v in _models(run, identity) if (run.run_date - day).days < days]
    if fresh:
        version = fresh[-1]
        log(f"[filterllm_train] model {version} is younger than {days} days: kept")
    else:
        version = _train(run, identity)
    facts = run.artifact("models", version).facts()
    told = ["space_version", "encoder_version", "trained_on", "users", "items", "validation_items", "best_epoch"]
    told += ["validation_nll", "calibrated_nll", "scale"]
    return {
        "model_version": version,
        "trained": facts["run_id"] == run.run_id,
        **{name: facts[name] for name in told},
    }


def load_model(run: Run, version: str) -> FilterLLM:
    """The model `version`.

    Raises:
        jobs.staging.StagingError: it is not there, or not complete.
        FilterLLMError: its files do not fit together.
    """
    artifact = run.artifact("models", version)
    artifact.facts()
    return filterllm.load({name: artifact.read_bytes(name) for name in _FILES})


def load_adapter(run: Run, version: str) -> dict[str, bytes]:
    """The files of the adapters of model `version`, for `udfs.lora`."""
    return {name: run.artifact("models", version).read_bytes(name) for name in _ADAPTER}


def _models(run: Run, identity: dict[str, str]) -> list[tuple[date, str]]:
    """(trained_on, version) of the complete models of this identity up to the run date, oldest first."""
    found = []
    for version in Staging(run.lake.path("_artifacts/models")).children():
        artifact = run.artifact("models", version)
        if artifact.is_complete():
            facts = artifact.facts()
            trained_on = date.fromisoformat(facts["trained_on"])
            if trained_on <= run.run_date and all(facts.get(name) == value for name, value in identity.items()):
                found.append((trained_on, version))
    return sorted(found)


def _train(run: Run, identity: dict[str, str]) -> str:
    """Train a model and leave it as an artifact; returns its version."""
    settings, conf = run.settings, run.settings.filterllm
    space = cf.load_space(run, identity["space_version"])
    items, shas, texts = _items(run, space)
    content = [*identity.values(), run.staging("snapshot").facts()["training_digest"], items.item_ids, shas]
    version = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    artifact = run.artifact("models", version)
    if artifact.is_complete():
        return version
    device = "cuda" if settings.ray.gpus_per_actor > 0 and torch.cuda.is_available() else "cpu"
    log(f"[filterllm_train] training {version} on {len(shas)} items and {len(space.user_ids)} users ({device})")
    hidden = text_embeddings.load(run, shas, identity["language_model"])
    model = FilterLLM(
        filterllm.Config(
            width=hidden.shape[1],
            dimension=space.users.shape[1],
            users=len(space.user_ids),
            mapper=conf.mapper,
            hidden=conf.hidden,
            dropout=conf.dropout,
            noise=conf.noise,
            user_bias=conf.user_bias,
        )
    )
    start = space.users if conf.user_init == "cf" else None
    popularity = np.bincount(items.users, minlength=len(space.user_ids))
    filterllm_training.initialise(model, start, popularity, hidden, settings.seed)
    model.to(device)
    encoder = None
    if conf.lora:
        spec = text_embeddings.encoder_spec(settings.text)
        encoder = lora.encoder_of(spec, identity["language_model"], device)
        lora.attach(encoder, rank=conf.lora_rank, alpha=conf.lora_alpha, dropout=conf.lora_dropout, seed=settings.seed)
        source: torch.nn.Module = lora.LoraTexts(encoder, texts)
    else:
        source = FrozenTexts(hidden).to(device)
    options = Options(
        **{name: getattr(conf, name) for name in Options.__dataclass_fields__ if name != "seed"}, seed=settings.seed
    )
    found = filterllm_training.train(model, source, items, options, lambda line: log(f"[filterllm_train] {line}"))
    artifact.clear()
    for name, body in {**filterllm.dump(model), **(lora.dump(encoder) if encoder else {})}.items():
        artifact.write_bytes(name, body)
    artifact.write("users", pa.table({"user_id": pa.array(space.user_ids, pa.string())}))
    facts = {
        **identity,
        "run_id": run.run_id,
        "trained_on": run.run_date.isoformat(),
        # Text embeddings of adapted weights are this model's own; otherwise they are everybody's.
        "encoder_version": f"lora-{version}" if encoder else identity["language_model"],
        "lora": conf.lora,
        "users": len(space.user_ids),
        "config": asdict(model.config),
        **found,
    }
    artifact.complete(facts)
    return version


def _items(run: Run, space: cf.Space) -> tuple[Items, list[str], list[str]]:
    """The warm items with a text and a vector in the space, with their users in the space; their text hashes and texts.

    Raises:
        FilterLLMError: there is none.
    """
    snapshot = run.staging("snapshot")
    columns = ["item_id", "item_idx", "label", "content", "text_sha256"]
    items = snapshot.read("items_labelled", columns).sort_by("item_idx")
    users = snapshot.read("users", ["user_id", "user_idx"]).sort_by("user_idx")
    pairs = snapshot.read("training_interactions", ["user_idx", "item_idx"]).sort_by(
        [("item_idx", "ascending"), ("user_idx", "ascending")]
    )
    row_of_user = _place(users["user_id"], space.user_ids)
    row_of_item = _place(items["item_id"], space.item_ids)
    user, item = row_of_user[pairs["user_idx"].to_numpy()], pairs["item_idx"].to_numpy()
    warm, with_text = pc.equal(items["label"], "warm").to_numpy(), pc.is_valid(items["text_sha256"]).to_numpy()
    counts = np.bincount(item[user >= 0], minlength=items.num_rows)
    usable = warm & with_text & (row_of_item >= 0) & (counts > 0)
    if not usable.any():
        raise FilterLLMError(
            f"FilterLLM has nothing to learn from: of {items.num_rows} items {int(warm.sum())} are warm, "
            f"{int((warm & with_text).sum())} of them have a text, and none of these has a vector and users in space "
            f"{space.version}. Add titles or texts to the table of items, or lower snapshot.warm_interactions"
        )
    kept = np.flatnonzero(usable)
    chosen = items.take(pa.array(kept))
    indptr = np.concatenate([[0], np.cumsum(counts[kept])]).astype(np.int64)
    targets = user[(user >= 0) & usable[item]].astype(np.int64)
    found = Items(chosen["item_id"].to_pylist(), space.items[row_of_item[kept]], indptr, targets)
    return found, chosen["text_sha256"].to_pylist(), chosen["content"].to_pylist()


def _place(ids: pa.ChunkedArray, among: list[str]) -> np.ndarray:
    """Where each id is in `among`, -1 where it is not."""
    return pc.fill_null(pc.index_in(ids, value_set=pa.array(among, pa.string())), -1).to_numpy()
