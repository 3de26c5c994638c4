"""A worker that ranks users' candidates with A-LLMRec's second stage: it holds the language model and the catalogue once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from udfs import allmrec_projections
from udfs.allmrec_prompt import PromptOptions
from udfs.allmrec_reader import Reader
from udfs.model_files import ModelError, ModelFiles, find_model
from udfs.sequences import PADDING, Ints, Sequences
from udfs.vectors import Matrix


@dataclass(frozen=True)
class LanguageModel:
    """Which causal language model, and how it is run; the names are those of the settings. `cache`: of converted models."""

    model: str
    sha256: str | None
    dtype: Literal["float32", "bfloat16"]
    batch_tokens: int
    cache: str

    def resolve(self) -> tuple[ModelFiles, str]:
        """Its files on this machine, and what names it: content and dtype; the weights are hashed, not loaded.

        Raises:
            ModelError: it is missing or is not the expected one.
        """
        files = find_model(self.model, self.sha256, Path(self.cache))
        return files, f"{files.identity[:16]}-{self.dtype}"

    def reader(
        self, projections: allmrec_projections.Projections | None, device: str, expected: str | None = None
    ) -> Reader:
        """The model in memory.

        Raises:
            ModelError: it is missing here, or is another one than `expected`.
            AllmrecError: the projections do not fit it.
        """
        files, found = self.resolve()
        if expected not in (None, found):
            raise ModelError(f"a worker found the language model {found}, the run uses {expected}")
        return Reader(files.directory, projections, batch_tokens=self.batch_tokens, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Shard:
    """n users: x_u [n, d], their histories, and candidates [n, C], PADDING behind the last one of each; at least one each."""

    users: Matrix
    histories: Sequences
    candidates: Ints


class ReaderActor:
    """A worker for `udfs.actor_pool.map_ordered`: a shard is a `Shard`.

    Its result is (scores [n, C] float32, NaN for PADDING; what the model writes for each user, or None).
    """

    def __init__(
        self,
        model: LanguageModel,
        expected: str,
        files: dict[str, bytes],
        titles: list[str],
        joint: Matrix,
        options: PromptOptions,
        normalise: bool,
        generate: bool,
        device: str,
    ) -> None:
        """files: of the projections; titles, joint [I, joint]: the catalogue. Raises what `LanguageModel.reader` does."""
        self._reader = model.reader(allmrec_projections.load(files), device, expected)
        self._catalogue = self._reader.catalogue(titles, joint, options)
        self._normalise, self._generate = normalise, generate

    def work(self, shard: Shard) -> tuple[Matrix, list[str] | None]:
        scores = np.full(shard.candidates.shape, np.nan, np.float32)
        written = [""] * len(scores) if self._generate else None
        counts = (shard.candidates != PADDING).sum(1)
        for count in np.unique(counts):
            rows = np.flatnonzero(counts == count)
            own = (
                self._catalogue,
                shard.users[rows],
                shard.histories.take(rows),
                np.ascontiguousarray(shard.candidates[rows, :count]),
            )
            scores[rows, :count] = self._reader.score(*own, normalise=self._normalise)
            if written is not None:
                for row, text in zip(rows, self._reader.generate(*own), strict=True):
                    written[row] = text
        return scores, written
