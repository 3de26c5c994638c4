"""A worker that encodes texts: finds the model on its own machine, loads it once, and makes sure it is the driver's.

Beside language models there is `words` (udfs/hashed_words.py), which needs no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from udfs import hashed_words
from udfs.encoder_recipe import read_recipe, version
from udfs.model_files import ModelError, find_model


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model's files are (None: it has none), the version of its embeddings, and their width."""

    directory: Path | None
    version: str
    width: int


@dataclass(frozen=True)
class EncoderSpec:
    """Which model, and how it is run; `find_model`, `read_recipe` and `TextEncoder` say what the fields mean."""

    model: str
    sha256: str | None = None
    pooling: Literal["auto", "mean", "last_token", "cls"] = "auto"
    max_tokens: int = 128
    batch_tokens: int = 8192
    dtype: Literal["float32", "bfloat16"] = "float32"
    cache: str | None = None

    def resolve(self) -> ResolvedModel:
        """The model on this machine; its weights are hashed, not loaded.

        Raises:
            ModelError: see `find_model` and `read_recipe`.
        """
        if (words := hashed_words.width_of(self.model)) is not None:
            return ResolvedModel(None, hashed_words.version(words, self.max_tokens), words)
        files = find_model(self.model, self.sha256, Path(self.cache) if self.cache else None)
        recipe = read_recipe(files.directory, pooling=self.pooling, max_tokens=self.max_tokens, dtype=self.dtype)
        return ResolvedModel(files.directory, version(files, recipe), recipe.width)


class EncoderActor:
    """A worker for `udfs.actor_pool.map_ordered`: a shard is a list of texts, its result [n, width] float32."""

    def __init__(self, spec: EncoderSpec, expected_version: str, device: str) -> None:
        """Raises ModelError if the model here is another one than where `expected_version` was found."""
        import torch

        from udfs.text_encoder import TextEncoder

        model = spec.resolve()
        if model.version != expected_version:
            raise ModelError(f"a worker finds {model.version} in {model.directory}, the run uses {expected_version}")
        if model.directory is None:
            self._encode = hashed_words.HashedWords(model.width, spec.max_tokens).encode
            return
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ModelError("ray.gpus_per_actor is above 0, but torch finds no usable GPU in the worker")
        self._encode = TextEncoder(
            model.directory,
            pooling=spec.pooling,
            max_tokens=spec.max_tokens,
            batch_tokens=spec.batch_tokens,
            dtype=spec.dtype,
            device=device,
        ).encode

    def work(self, shard: list[str]) -> np.ndarray:
        return self._encode(shard)
