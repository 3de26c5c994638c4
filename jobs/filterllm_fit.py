"""Training FilterLLM on a run's tables: what each worker of stage filterllm_train does.

Every worker reads what it needs from the lake; the first one leaves the model's files in its artifact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from jobs import adapted_texts, cf, stranded, text_embeddings
from jobs.run import Run
from udfs import filterllm, filterllm_training, lora, word_map
from udfs.checkpoints import Checkpoints
from udfs.filterllm import FilterLLM, FilterLLMError
from udfs.filterllm_items import FrozenTexts, Items, held_out
from udfs.filterllm_training import Options
from udfs.ids import large, place
from udfs.worker_group import Group

_PIECE = 1 << 24


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
    popularity = items.popularity(len(users))
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
    artifact = run.artifact("models", version)
    if group.rank == 0 and not artifact.is_complete():  # unless another run trained it meanwhile
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

    The users of an item are in the order of their user_idx.

    Raises:
        FilterLLMError: there is none.
    """
    chosen, row_of_user = _chosen(run, space)
    kept, counts = chosen["item_idx"].to_numpy(), chosen["users"].to_numpy()
    number = np.full(kept.max() + 1, -1)
    number[kept] = np.arange(len(kept))
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    users = _by_item(run, row_of_user >= 0, number, indptr)
    # In pieces: the pairs may take most of the memory.
    for start in range(0, len(users), _PIECE):
        users[start : start + _PIECE] = row_of_user[users[start : start + _PIECE]]
    found = Items(chosen["item_id"].to_pylist(), space.items[chosen["row"].to_numpy()], indptr, users)
    return found, chosen["text_sha256"].to_pylist(), _texts(run, kept)


def listed(run: Run, space: cf.Space) -> tuple[list[str], list[str]]:
    """The ids of the items that `trainable` gives and their text hashes; raises as it does."""
    chosen, _ = _chosen(run, space)
    return chosen["item_id"].to_pylist(), chosen["text_sha256"].to_pylist()


def _chosen(run: Run, space: cf.Space) -> tuple[pa.Table, np.ndarray]:
    """The items to train on by item_idx (item_id, text_sha256, item_idx; row: in the space; users: how many), and the row in the
    space of each user_idx, -1 for none, [U] int64; raises as `trainable` does."""
    snapshot = run.staging("snapshot")
    items = large(snapshot.read("items_labelled", ["item_id", "item_idx", "label", "text_sha256"])).sort_by("item_idx")
    users = large(snapshot.read("users", ["user_id", "user_idx"])).sort_by("user_idx")
    row_of_user = place(users["user_id"], space.user_ids)
    row_of_item = place(items["item_id"], space.item_ids)
    counts = np.zeros(items.num_rows, np.int64)
    for user, item in stranded.pairs(run):
        np.add.at(counts, item[row_of_user[user] >= 0], 1)
    warm, with_text = pc.equal(items["label"], "warm").to_numpy(), pc.is_valid(items["text_sha256"]).to_numpy()
    usable = warm & with_text & (row_of_item >= 0) & (counts > 0)
    if not usable.any():
        raise FilterLLMError(
            f"FilterLLM has nothing to learn from: of {items.num_rows} items {int(warm.sum())} are warm, "
            f"{int((warm & with_text).sum())} of them have a text, and none of these has a vector and users in space "
            f"{space.version}. Add titles or texts to the table of items, or lower snapshot.warm_interactions"
        )
    chosen = items.drop_columns("label").append_column("row", pa.array(row_of_item))
    return chosen.append_column("users", pa.array(counts)).filter(pa.array(usable)), row_of_user


def _by_item(run: Run, known: np.ndarray, number: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """The `known` users ([U] bool) of each item, user_idx int32 in ascending order: item i's stand from indptr[i] to indptr[i + 1].

    Args:
        number: i of each item_idx, -1 for an item that is not wanted; what is beyond its end is not either.
    """
    users, free = np.empty(indptr[-1], np.int32), indptr[:-1].copy()
    for user, idx in stranded.pairs(run):
        wanted = known[user] & (idx < len(number))
        user, item = user[wanted], number[idx[wanted]]
        order = np.argsort(item, kind="stable")[np.count_nonzero(item < 0) :]
        user, item = user[order], item[order]
        first = np.flatnonzero(np.diff(item, prepend=-1))
        counts = np.diff(first, append=len(item))
        users[np.repeat(free[item[first]] - first, counts) + np.arange(len(item))] = user
        free[item[first]] += counts
    for start, end in pairwise(indptr.tolist()):
        users[start:end].sort()
    return users


def _texts(run: Run, item_idx: np.ndarray) -> list[str]:
    """The texts of these items, whose indices ascend."""
    items = run.staging("snapshot").read("items_labelled", ["item_idx", "content"])
    # A sort makes one array of all texts it is given.
    items = large(items.filter(pc.is_in(items["item_idx"], value_set=pa.array(item_idx))))
    return items["content"].take(pc.sort_indices(items["item_idx"])).to_pylist()
