"""Training FilterLLM on a run's tables: what each worker of stage filterllm_train does.

Every worker reads what it needs from the lake; the first one leaves the model's files in its artifact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from jobs import adapted_texts, cf, text_embeddings
from jobs.run import Run
from udfs import filterllm, filterllm_training, lora, word_map
from udfs.checkpoints import Checkpoints
from udfs.filterllm import FilterLLM, FilterLLMError
from udfs.filterllm_items import held_out
from udfs.filterllm_training import FrozenTexts, Items, Options
from udfs.ids import place
from udfs.worker_group import Group


def fit(
    run: Run,
    identity: dict[str, str],
    version: str,
    folder: str,
    *,
    group: Group,
    device: torch.device,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Train model `version` of this `identity` (see jobs.filterllm_train.run) and leave its files as an artifact, not yet
    complete; returns its facts.

    Args:
        folder: where the state is saved every epoch; a training that was killed goes on from there.
    """
    settings, conf = run.settings, run.settings.filterllm
    space = cf.load_space(run, identity["space_version"])
    items, shas, texts = trainable(run, space)
    if group.rank == 0:
        log(f"training {version} on {len(shas)} items and {len(space.user_ids)} users ({device.type})")
    hidden = text_embeddings.load(run, shas, identity["language_model"])
    users, vectors = space.users, items.embeddings
    if conf.vocabulary == "llm":
        # The same map for both: what CF says of a user and an item, their inner product, stays.
        users = filterllm.widened(users, hidden.shape[1], settings.seed)
        items = Items(
            items.item_ids,
            filterllm.widened(items.embeddings, hidden.shape[1], settings.seed),
            items.indptr,
            items.users,
        )
    model = FilterLLM(
        filterllm.Config(
            width=hidden.shape[1],
            dimension=users.shape[1],
            users=len(users),
            mapper=conf.mapper,
            hidden=conf.hidden,
            dropout=conf.dropout,
            noise=conf.noise,
            user_bias=conf.user_bias,
        )
    )
    popularity = np.bincount(items.users, minlength=len(users))
    start = users if conf.user_init == "cf" else None
    filterllm_training.initialise(model, start, popularity, hidden, settings.seed)
    model.to(device)
    encoder = None
    source: torch.nn.Module
    if conf.lora:
        of = identity["language_model"]
        encoder, source = adapted_texts.trainable(settings.text, conf, of, texts, settings.seed, device)
    else:
        source = FrozenTexts(hidden).to(device)
    options = Options(
        **{name: getattr(conf, name) for name in Options.__dataclass_fields__ if name != "seed"}, seed=settings.seed
    )
    found = filterllm_training.train(model, source, items, options, log, checkpoints=Checkpoints(folder), group=group)
    words = {"words": 0, "words_without_held_out": 0}
    if group.rank == 0:
        artifact = run.artifact("models", version)
        artifact.clear()
        for name, body in {**filterllm.dump(model), **(lora.dump(encoder) if encoder else {})}.items():
            artifact.write_bytes(name, body)
        artifact.write("users", pa.table({"user_id": pa.array(space.user_ids, pa.string())}))
        # What the map is worth is measured on the items that are held out; what places cold items has learnt from these too.
        held = held_out(items.item_ids, conf.validation_share, settings.seed)
        for name, learnt in (("words", np.arange(len(texts))), ("words_without_held_out", np.flatnonzero(~held))):
            found_map = word_map.fit([texts[i] for i in learnt], vectors[learnt], conf.word_ridge)
            if found_map is not None:
                artifact.write(name, word_map.to_table(found_map))
                words[name] = len(found_map.words)
    return {
        "encoder_version": adapted_texts.version(version) if encoder else identity["language_model"],
        "lora": conf.lora,
        "users": len(space.user_ids),
        "config": asdict(model.config),
        **words,
        **found,
    }


def trainable(run: Run, space: cf.Space) -> tuple[Items, list[str], list[str]]:
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
    row_of_user = place(users["user_id"], space.user_ids)
    row_of_item = place(items["item_id"], space.item_ids)
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
