"""Where a CF model begins by cf.init=llminit, and where that leaves an item that training did not move."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs import text_embeddings
from jobs.run import Run
from jobs.settings import Settings
from jobs.staging import Staging
from udfs import llm_init
from udfs.cf_inputs import Pairs
from udfs.llm_init import LLMInit, TextMap
from udfs.vectors import Matrix, from_column, to_column

_TABLE = "llminit"


def encoder_version(run: Run) -> str | None:
    """Whose text embeddings the start is made of; None for a random start."""
    if run.settings.cf.init == "random":
        return None
    return str(run.staging("text_embeddings").facts()["model_version"])


def texts_digest(run: Run) -> str:
    """Hash of which item has which text tonight; what a text's embedding is, the encoder's version says."""
    items = run.staging("snapshot").read("items_labelled", ["item_id", "text_sha256"]).sort_by("item_id")
    return hashlib.sha256(json.dumps(items.to_pydict()).encode()).hexdigest()


def start(run: Run, pairs: Pairs, n_users: int) -> tuple[tuple[Matrix, Matrix], TextMap]:
    """Users and items of the snapshot as they begin, and the map from texts that places the items.

    The map is chosen by the items that `pairs` train. Items that have no text begin at the mean of the others.

    Raises:
        udfs.llm_init.LLMInitError: the widths do not fit, or no item that is trained has a text.
        jobs.text_embeddings.TextEmbeddingsError: a text has no embedding.
    """
    shas = (
        run.staging("snapshot").read("items_labelled", ["item_idx", "text_sha256"]).sort_by("item_idx")["text_sha256"]
    )
    popularity = np.bincount(pairs.items, minlength=len(shas))
    there = np.flatnonzero(shas.is_valid().to_numpy() & (popularity > 0))
    vectors = text_embeddings.load(run, shas.take(pa.array(there)).to_pylist(), str(encoder_version(run)))
    texts = np.full((len(shas), vectors.shape[1]), np.nan, np.float32)
    texts[there] = vectors
    return of_texts(run.settings, texts, pairs, n_users)


def of_texts(settings: Settings, texts: Matrix, pairs: Pairs, n_users: int) -> tuple[tuple[Matrix, Matrix], TextMap]:
    """As `start`, of the items' text embeddings [items, D], with rows of NaN for items that have none or are not trained."""
    cf = settings.cf
    popularity = np.bincount(pairs.items, minlength=len(texts))
    there = np.isfinite(texts).all(axis=1)
    options = LLMInit(**cf.llminit.model_dump(), std=cf.init_std)
    of_text = llm_init.text_map(texts[there], popularity[there], cf.dimension, options, settings.seed)
    return llm_init.start(texts, pairs.users, pairs.items, n_users, of_text, cf.init_std, settings.seed), of_text


def write(artifact: Staging, of_text: TextMap) -> None:
    """Leave the map with the space."""
    columns = {"mean": of_text.mean, "projection": to_column(of_text.projection)}
    artifact.write(
        _TABLE, pa.table(columns).append_column("length", pa.repeat(float(of_text.length), len(of_text.mean)))
    )


def vectors(run: Run, space: str, facts: dict[str, Any], shas: list[str]) -> npt.NDArray[np.float32]:
    """Where texts lie in the space `space` (of these facts) by its start alone, [len(shas), d]."""
    table = run.artifact("spaces", space).read(_TABLE)
    of_text = TextMap(table["mean"].to_numpy(), from_column(table["projection"]), table["length"][0].as_py())
    return of_text(text_embeddings.load(run, shas, facts["encoder_version"]))
