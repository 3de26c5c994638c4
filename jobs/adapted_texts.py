"""Texts through a language model with a FilterLLM model's own adapters (filterllm.lora), into the cache of text embeddings."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.filterllm_train import load_adapter
from jobs.run import Run, log
from jobs.text_embeddings import TABLE, app, encoder_spec, rows
from udfs.actor_pool import map_ordered
from udfs.lora import AdaptedEncoderActor


def encode(run: Run, trained: dict[str, Any], shas: pa.Array) -> None:
    """Encode those of the texts with these hashes that the cache lacks under `trained["encoder_version"]`.

    Ray must be initialised. Every shard is committed, in order, when it is done.

    Args:
        trained: facts of the stage filterllm_train.
    """
    version, ray = trained["encoder_version"], run.settings.ray
    cached = run.lake.read(TABLE, columns=["text_sha256"], model_version=version)["text_sha256"].combine_chunks()
    pending = shas.filter(pc.invert(pc.is_in(shas, value_set=cached)))
    pending = pending.take(pc.sort_indices(pending))
    if not len(pending):
        return
    items = run.staging("snapshot").read("items_labelled", ["content", "text_sha256"])
    content = items["content"].take(pc.index_in(pending, value_set=items["text_sha256"].combine_chunks()))
    size = run.settings.text.shard_texts
    shards = [pending.slice(start, size) for start in range(0, len(pending), size)]
    sequences = run.lake.sequences(TABLE, [app(shard, version) for shard in shards])
    log(f"[filterllm_score] {len(pending)} texts through the model's adapters")
    worker = (
        encoder_spec(run.settings.text),
        run.staging("text_embeddings").facts()["model_version"],
        load_adapter(run, trained["model_version"]),
        "cuda" if ray.gpus_per_actor > 0 else "cpu",
    )
    encoded = map_ordered(
        AdaptedEncoderActor,
        worker,
        (content.slice(start, size).to_pylist() for start in range(0, len(pending), size)),
        actors=min(ray.actors, len(shards)),
        cpus=ray.cpus_per_actor,
        gpus=ray.gpus_per_actor,
    )
    for shard, sequence, vectors in zip(shards, sequences, encoded, strict=True):
        run.lake.commit(TABLE, rows(shard, version, vectors), app=app(shard, version), sequence=sequence)
