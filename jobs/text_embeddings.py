"""Stage text_embeddings: each distinct text of the snapshot through the language model, once.

Vectors are kept in the table `text_embeddings`, by the text's SHA-256 and the model's version. Texts that are not in it
are sorted by hash and encoded in shards on Ray, and every shard is committed, in order, when it is done: a killed run goes
on behind its last finished shard with the very shards and batches that were to come.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.lake import Lake
from jobs.ray_cluster import cluster
from jobs.run import Run, log
from jobs.settings import Text
from jobs.staging import Staging
from schemas.errors import ColdRefreshError
from schemas.table import table as schema
from udfs.actor_pool import map_ordered
from udfs.encoder_actor import EncoderActor, EncoderSpec
from udfs.ids import Places, plain
from udfs.model_files import default_cache
from udfs.progress import Progress

TABLE = "text_embeddings"


class TextEmbeddingsError(ColdRefreshError):
    """A text's vector is missing, or vectors do not fit together: the message says how many and the remedy."""


def encoder_spec(text: Text, also: str | None = None) -> EncoderSpec:
    """The model that the settings name, or `also`, one of text.also, as workers and `udfs.text_encoder.TextEncoder` want it."""
    return EncoderSpec(
        model=also or text.model,
        sha256=None if also else text.sha256,
        pooling=text.pooling,
        max_tokens=text.max_tokens,
        batch_tokens=text.batch_tokens,
        dtype=text.dtype,
        cache=str(default_cache()),
    )


def _specs(text: Text) -> list[EncoderSpec]:
    return [encoder_spec(text), *(encoder_spec(text, name) for name in text.also)]


def model_version(text: Text) -> str:
    """The version of the embeddings that these settings give; the weights are hashed, not loaded.

    Of several models it is theirs with a + between: the name of no row, but what `load` takes.

    Raises:
        udfs.model_files.ModelError: a model is missing or is not the expected one.
    """
    return "+".join(spec.resolve().version for spec in _specs(text))


def run(run: Run, out: Staging) -> dict[str, Any]:
    """Facts: model_version, width, texts (distinct), and of all models together encoded (now), cached (before).

    Raises:
        udfs.model_files.ModelError: a model is missing or is not the expected one.
        jobs.ray_cluster.ClusterError, udfs.actor_pool.WorkerError: Ray or a worker failed.
        TextEmbeddingsError: vectors are missing after all.
    """
    specs = _specs(run.settings.text)
    models = [spec.resolve() for spec in specs]
    wanted = distinct(run.staging("snapshot").read("items_labelled", ["text_sha256"])["text_sha256"])
    encoded = sum(_complete(run, spec, model.version, wanted) for spec, model in zip(specs, models, strict=True))
    return {
        "model_version": "+".join(model.version for model in models),
        "width": sum(model.width for model in models),
        "texts": len(wanted),
        "encoded": encoded,
        "cached": len(models) * len(wanted) - encoded,
    }


def _complete(run: Run, spec: EncoderSpec, version: str, wanted: pa.Array) -> int:
    """Encode those of the texts `wanted` that the table lacks under `version`; how many they were."""
    at, there = cached(run.lake, version, wanted)
    pending = wanted.filter(pa.array(~there))
    if not len(pending):
        log(f"[{TABLE}] all {len(wanted)} texts have their vectors under {version}: nothing is encoded")
        return 0
    encode(run, run.staging("snapshot"), EncoderActor, (spec, version), version, at, pending)
    lost = int((~cached(run.lake, version, wanted)[1]).sum())
    if lost:
        raise TextEmbeddingsError(f"table '{TABLE}' lacks {lost} of {len(wanted)} texts of {version}; run again")
    return len(pending)


def load(run: Run, shas: list[str], model_version: str) -> np.ndarray:
    """The vectors of texts, [len(shas), width] float32, in the order of `shas` (which may repeat).

    Of several models ("a+b") the vectors of each stand one behind the other. The table is streamed: beside the result, one
    batch of it is in memory. Texts of the run's own snapshot that jobs.prune has deleted since are encoded again, on Ray. Of no
    texts: [0, 0].

    Raises:
        TextEmbeddingsError: a text has no vector under `model_version`, or vectors differ in width.
        udfs.model_files.ModelError, jobs.ray_cluster.ClusterError, udfs.actor_pool.WorkerError: a text cannot be encoded again.
    """
    if "+" in model_version:
        return np.concatenate([load(run, shas, version) for version in model_version.split("+")], axis=1)
    asked = pa.array(shas, pa.large_string())
    names = asked.unique()
    places = Places(names)
    vectors, seen = _read(run, places, len(names), model_version)
    if not seen.all() and _encode_again(run, names.filter(pa.array(~seen)), model_version):
        vectors, seen = _read(run, places, len(names), model_version)
    if not seen.all():
        missing = np.flatnonzero(~seen)
        raise TextEmbeddingsError(
            f"table '{TABLE}' lacks {len(missing)} of {len(names)} texts under {model_version} "
            f"(the first: {names[int(missing[0])]}); run the stage text_embeddings"
        )
    # `names` are in the order of their first appearance: without repetitions they are `asked`.
    return vectors if len(names) == len(asked) else vectors[places(asked)]


def _read(run: Run, places: Places, n: int, model_version: str) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of the `n` texts that `places` knows, [n, width] float32, and which of them the table has [n]."""
    vectors, seen = np.empty((n, 0), np.float32), np.zeros(n, bool)
    for batch in run.lake.batches(TABLE, columns=["text_sha256", "embedding"], model_version=model_version):
        place = places(batch["text_sha256"])
        rows = place[place >= 0]
        if not len(rows):
            continue
        part = _matrix(batch["embedding"].filter(pa.array(place >= 0)))
        if not vectors.shape[1]:
            vectors = np.empty((n, part.shape[1]), np.float32)
        if part.shape[1] != vectors.shape[1]:
            raise TextEmbeddingsError(
                f"table '{TABLE}' holds vectors of {vectors.shape[1]} and {part.shape[1]} numbers under {model_version}"
            )
        vectors[rows], seen[rows] = part, True
    return vectors, seen


def _encode_again(run: Run, missing: pa.Array, model_version: str) -> bool:
    """Encode the texts `missing`, if the run's snapshot has them and its settings or an artifact the model; whether they have."""
    from jobs import adapted_texts  # which needs this module, and torch

    snapshot = run.staging("snapshot")
    if not snapshot.is_complete():
        return False
    there = Places(distinct(snapshot.read("items_labelled", ["text_sha256"])["text_sha256"]))
    if (there(missing) < 0).any():
        return False
    adapted = adapted_texts.model(run, model_version)
    if adapted is not None:
        adapted_texts.encode(run, adapted, snapshot, missing)
        return True
    for spec in _specs(run.settings.text):
        if spec.resolve().version == model_version:
            _complete(run, spec, model_version, distinct(missing))
            return True
    return False


def cached(lake: Lake, model_version: str, wanted: pa.Array) -> tuple[int | None, np.ndarray]:
    """The newest version of the table (None: there is no table yet), and which of the distinct hashes `wanted` it holds: bool [n].

    What it holds of the model may be many times what a night wants, so it is streamed.
    """
    at = lake.version(TABLE) if lake.exists(TABLE) else None
    there, places = np.zeros(len(wanted), bool), Places(wanted)
    if len(wanted):
        for batch in lake.batches(TABLE, columns=["text_sha256"], version=at, model_version=model_version):
            place = places(batch["text_sha256"])
            there[place[place >= 0]] = True
    return at, there


def encode(
    run: Run,
    snapshot: Staging,
    actor: type,
    arguments: tuple[Any, ...],
    version: str,
    at: int | None,
    pending: pa.Array,
) -> None:
    """Encode texts on Ray, and commit every shard of them under `version`, in order, when it is done.

    Args:
        snapshot: which has the texts.
        actor, arguments: what encodes (see `udfs.actor_pool.map_ordered`), made of these arguments and the device.
        at: the version of the table by which they are missing (see `cached`).
        pending: their hashes, sorted; one at least.

    Raises:
        jobs.ray_cluster.ClusterError, udfs.actor_pool.WorkerError: Ray or a worker failed.
        udfs.model_files.ModelError: a worker finds no model, or another one.
    """
    text, ray = run.settings.text, run.settings.ray
    size = text.shard_texts
    shards = [pending.slice(start, size) for start in range(0, len(pending), size)]
    apps = [_app(shard, version) for shard in shards]
    sequences = run.lake.sequences(TABLE, apps, at) if at is not None else [0] * len(apps)
    content = texts(snapshot, pending, text.max_tokens)
    log(f"[{TABLE}] {len(pending)} texts in {len(shards)} shards through {version}")
    worker = (*arguments, "cuda" if ray.gpus_per_actor > 0 else "cpu")
    actors = min(ray.actors, len(shards))
    lists = (content.slice(start, size).to_pylist() for start in range(0, len(pending), size))
    with cluster(ray), Progress(TABLE, len(pending), "texts") as progress:
        encoded = map_ordered(actor, worker, lists, actors=actors, cpus=ray.cpus_per_actor, gpus=ray.gpus_per_actor)
        for shard, one, sequence, vectors in zip(shards, apps, sequences, encoded, strict=True):
            run.lake.commit(TABLE, _rows(shard, version, vectors), app=one, sequence=sequence)
            progress.advance(len(shard))


def distinct(shas: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The distinct hashes, sorted, with 64-bit offsets; nulls (items without any text) left out."""
    found = pc.unique(shas.drop_null().cast(pa.large_string()))
    return found.take(pc.sort_indices(found))


def texts(snapshot: Staging, shas: pa.Array, max_tokens: int) -> pa.Array:
    """The texts with these hashes, in their order, cut to what an encoder of `max_tokens` can read."""
    from udfs.text_encoder import CHARACTERS_A_TOKEN  # torch and transformers: only where something is encoded

    items = snapshot.read("items_labelled", ["content", "text_sha256"])
    first = pc.index_in(shas, value_set=items["text_sha256"])
    # 64-bit offsets: all texts of a shop may be more than 2 GB.
    content = items["content"].cast(pa.large_string()).take(first)
    return pc.utf8_slice_codeunits(content, 0, max_tokens * CHARACTERS_A_TOKEN).combine_chunks()


def _app(shard: pa.Array, version: str) -> str:
    """The transaction that commits a shard of texts, given by their hashes, under a model's version."""
    return f"{TABLE}/{version}/{hashlib.sha256(''.join(shard.to_pylist()).encode()).hexdigest()[:32]}"


def _rows(shard: pa.Array, version: str, vectors: np.ndarray) -> pa.Table:
    """Rows of the table from `vectors` [len(shard), width] float32."""
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    columns = {"text_sha256": shard, "model_version": [version] * len(shard), "embedding": embedding}
    return schema(TABLE).conform(plain(pa.table(columns)))


def _matrix(embedding: pa.ChunkedArray) -> np.ndarray:
    """[rows, width] float32 from a column of lists, without a Python object for any number."""
    lengths = pc.unique(pc.list_value_length(embedding))
    if len(lengths) != 1 or not lengths[0].as_py():
        raise TextEmbeddingsError(f"table '{TABLE}' holds vectors of different widths {lengths.to_pylist()}")
    return pc.list_flatten(embedding).to_numpy().reshape(len(embedding), lengths[0].as_py())
