"""A worker that encodes texts: finds the model on its own machine, loads it once, and makes sure it is the driver's.

Beside language models there is `words` (udfs/hashed_words.py), which needs no files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from udfs import hashed_words
from udfs.encoder_recipe import read_recipe, version
from udfs.model_files import ModelError, find_model

if TYPE_CHECKING:
    from udfs.text_encoder import TextEncoder


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

    def resolve(self, expected_version: str | None = None) -> ResolvedModel:
        """The model on this machine; its weights are hashed, not loaded.

        Raises:
            ModelError: see `find_model` and `read_recipe`; or it is another one than `expected_version`.
        """
        if (words := hashed_words.width_of(self.model)) is not None:
            found = ResolvedModel(None, hashed_words.version(words, self.max_tokens), words)
        else:
            files = find_model(self.model, self.sha256, Path(self.cache) if self.cache else None)
            recipe = read_recipe(files.directory, pooling=self.pooling, max_tokens=self.max_tokens, dtype=self.dtype)
            found = ResolvedModel(files.directory, version(files, recipe), recipe.width)
        if expected_version not in (None, found.version):
            raise ModelError(f"found {found.version} in {found.directory}, the run uses {expected_version}")
        return found

    def load(self, expected_version: str, device: str) -> TextEncoder:
        """The language model in memory.

        Raises:
            ModelError: see `resolve` and `TextEncoder`; it has no weights; or torch finds no GPU for `device`.
        """
        import torch  # as the class below: only where something is encoded

        from udfs.text_encoder import TextEncoder

        model = self.resolve(expected_version)
        if model.directory is None:
            raise ModelError(f"{self.model} is no language model: it has no weights")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ModelError("ray.gpus_per_actor is above 0, but torch finds no usable GPU in the worker")
        return TextEncoder(
            model.directory,
            pooling=self.pooling,
            max_tokens=self.max_tokens,
            batch_tokens=self.batch_tokens,
            dtype=self.dtype,
            device=device,
        )


class EncoderActor:
    """A worker for `udfs.actor_pool.map_ordered`: a shard is a list of texts, its result [n, width] float32."""

    def __init__(self, spec: EncoderSpec, expected_version: str, device: str) -> None:
        """Raises ModelError as `EncoderSpec.load` does."""
        self._encode: Callable[[list[str]], np.ndarray]
        if (words := hashed_words.width_of(spec.model)) is None:
            self._encode = spec.load(expected_version, device).encode
        else:
            spec.resolve(expected_version)
            self._encode = hashed_words.HashedWords(words, spec.max_tokens).encode

    def work(self, shard: list[str]) -> np.ndarray:
        return self._encode(shard)
