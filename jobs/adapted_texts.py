"""A language model whose adapters were trained for one model (FilterLLM, or A-LLMRec's alignment): its source of texts while it is
trained, and afterwards texts through it, into the cache of text embeddings under a version of their own."""

from __future__ import annotations

import pyarrow as pa
import torch

from jobs import text_embeddings
from jobs.run import Run
from jobs.settings import Text
from jobs.settings_section import Lora
from jobs.staging import Staging
from udfs import lora
from udfs.lora import AdaptedEncoderActor, LoraTexts
from udfs.text_encoder import TextEncoder

FILES = ("adapter.safetensors", "adapter.json")


def version(of: str) -> str:
    """The version of the text embeddings that model `of` reads: those of adapted weights are its own."""
    return f"lora-{of}"


def model(run: Run, version: str) -> Staging | None:
    """FilterLLM's model whose adapters give the text embeddings `version`; None: there is none."""
    if not version.startswith("lora-"):
        return None
    found = run.artifact("models", version.removeprefix("lora-"))
    return found if found.is_complete() else None


def trainable(
    text: Text, conf: Lora, language_model: str, content: list[str], seed: int, device: str | torch.device
) -> tuple[TextEncoder, LoraTexts]:
    """The language model with new adapters, as `conf` has them, and the texts as it reads them.

    Args:
        language_model: the version that it must have.

    Raises:
        udfs.model_files.ModelError: it has another one.
        udfs.lora.LoraError: it has no layers for adapters.
    """
    encoder = text_embeddings.encoder_spec(text).load(language_model, str(device))
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
        udfs.model_files.ModelError: the language model is another one.
        udfs.lora.LoraError: the adapters do not fit it.
    """
    facts = model.facts()
    own, wanted = facts["encoder_version"], text_embeddings.distinct(shas)
    at, there = text_embeddings.cached(run.lake, own, wanted)
    pending = wanted.filter(pa.array(~there))
    if len(pending):
        files = {name: model.read_bytes(name) for name in FILES}
        arguments = (text_embeddings.encoder_spec(run.settings.text), facts["language_model"], files)
        text_embeddings.encode(run, snapshot, AdaptedEncoderActor, arguments, own, at, pending)
