"""A language model whose adapters were trained for one model (FilterLLM, or A-LLMRec's alignment): its source of texts while it is
trained, and afterwards texts through it, into the cache of text embeddings under a version of their own."""

from __future__ import annotations

import pyarrow as pa
import torch

from jobs.ray_cluster import cluster
from jobs.run import Run, log
from jobs.settings import Text
from jobs.settings_section import Lora
from jobs.staging import Staging
from jobs.text_embeddings import TABLE, app, cached, distinct, encoder_spec, rows, texts
from udfs import lora
from udfs.actor_pool import map_ordered
from udfs.lora import AdaptedEncoderActor, LoraTexts
from udfs.text_encoder import TextEncoder

FILES = ("adapter.safetensors", "adapter.json")


def version(of: str) -> str:
    """The version of the text embeddings that model `of` reads: those of adapted weights are its own."""
    return f"lora-{of}"


def trainable(
    text: Text, conf: Lora, language_model: str, content: list[str], seed: int, device: str | torch.device
) -> tuple[TextEncoder, LoraTexts]:
    """The language model with new adapters, as `conf` has them, and the texts as it reads them.

    Args:
        language_model: the version that it must have.

    Raises:
        udfs.lora.LoraError: it has another one, or no layers for adapters.
    """
    encoder = lora.encoder_of(encoder_spec(text), language_model, str(device))
    lora.attach(
        encoder,
        rank=conf.lora_rank,
        alpha=conf.lora_alpha,
        dropout=conf.lora_dropout,
        seed=seed,
        targets=conf.lora_targets,
    )
    return encoder, LoraTexts(encoder, content)


def encode(run: Run, model: Staging, snapshot: Staging, shas: pa.Array) -> None:
    """Encode those of the texts with these hashes that the cache lacks under the model's `encoder_version`, on Ray.

    Every shard is committed, in order, when it is done.

    Args:
        model: the artifact, with the adapters; of its facts `language_model` says what they were trained in.
        snapshot: which has the texts.

    Raises:
        jobs.ray_cluster.ClusterError, udfs.actor_pool.WorkerError: Ray or a worker failed.
        udfs.lora.LoraError: the language model is another one.
    """
    facts, ray = model.facts(), run.settings.ray
    own = facts["encoder_version"]
    wanted = distinct(shas)
    pending = wanted.filter(pa.array(~cached(run.lake, own, wanted)[1]))
    if not len(pending):
        return
    content = texts(snapshot, pending, run.settings.text.max_tokens)
    size = run.settings.text.shard_texts
    shards = [pending.slice(start, size) for start in range(0, len(pending), size)]
    sequences = run.lake.sequences(TABLE, [app(shard, own) for shard in shards])
    log(f"[{TABLE}] {len(pending)} texts in {len(shards)} shards through {own}")
    worker = (
        encoder_spec(run.settings.text),
        facts["language_model"],
        {name: model.read_bytes(name) for name in FILES},
        "cuda" if ray.gpus_per_actor > 0 else "cpu",
    )
    with cluster(ray):
        encoded = map_ordered(
            AdaptedEncoderActor,
            worker,
            (content.slice(start, size).to_pylist() for start in range(0, len(pending), size)),
            actors=min(ray.actors, len(shards)),
            cpus=ray.cpus_per_actor,
            gpus=ray.gpus_per_actor,
        )
        for shard, sequence, vectors in zip(shards, sequences, encoded, strict=True):
            run.lake.commit(TABLE, rows(shard, own, vectors), app=app(shard, own), sequence=sequence)
