"""Stage filterllm_score: tonight's cold items to their K users, out of all users of the vocabulary.

Warm items that nothing else can place (jobs/stranded.py) are read with them.
What was found for an item is kept in the table `item_scores` until its text, the model, how users are drawn or the users
who may be drawn change: a night scores new and changed items only. Items that are not in it are sorted by id and scored in
shards on Ray, and every shard is committed, in order, when it is done: a killed run goes on behind its last finished one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import adapted_texts, stranded, text_embeddings
from jobs.filterllm_train import load_model
from jobs.ray_cluster import cluster
from jobs.run import Run, log
from jobs.staging import Staging
from schemas.table import table as schema
from udfs import user_sampling
from udfs.actor_pool import map_ordered
from udfs.filterllm import FilterLLM, FilterLLMError
from udfs.filterllm_items import held_out
from udfs.ids import large, plain
from udfs.progress import Progress
from udfs.scorer_actor import Sampling, Scorer

TABLE = "item_scores"
_STAGED = ["item_id", "user_id", "rank", "probability", "propensity"]
# Held-out items that tell how long vectors should be, and what words are worth.
_PROBES = 1000
# Shards whose text embeddings are read at a time.
_READ_AHEAD = 32


def run(run: Run, out: Staging) -> dict[str, Any]:
    """Leaves the table `sampled` (item_id, user_id, rank, probability, propensity), sorted by item and rank; and `held_out`,
    the same of warm items that the model was not trained on, if the refresh measures by them (refresh.scale auto, refresh.words).

    Returns:
        items, rows: of `sampled`; scored: of them now, reused: before; held_out: items; users: who could be drawn;
        model_version, space_version, scoring_version.

    Raises:
        FilterLLMError: no user of the model exists tonight.
        jobs.ray_cluster.ClusterError, udfs.actor_pool.WorkerError: Ray or a worker failed.
    """
    trained = run.staging("filterllm_train").facts()
    vocabulary = large(run.artifact("models", trained["model_version"]).read("users"))["user_id"].combine_chunks()
    allowed = _allowed(run, vocabulary)
    version = _scoring_version(run, trained["model_version"], vocabulary.filter(pa.array(allowed)))
    items = run.staging("snapshot").read("items_labelled", ["item_id", "label", "text_sha256"])
    of_strangers = stranded.items(run)
    if len(of_strangers):
        log(
            f"[filterllm_score] {len(of_strangers)} items that only users without a vector have are scored as cold ones"
        )
    asked = pc.or_(pc.equal(items["label"], "cold"), pc.is_in(items["item_id"], value_set=of_strangers))
    cold = items.filter(pc.and_(asked, pc.is_valid(items["text_sha256"])))
    held = _held_out(run, items.filter(pc.invert(asked)))
    wanted = pa.concat_tables([cold, held] if cold.num_rows else [cold])
    wanted = large(wanted.select(["item_id", "text_sha256"])).sort_by("item_id").combine_chunks()
    done = _cached(run, version, wanted)
    pending = wanted.filter(pc.invert(pc.is_in(wanted["item_id"], value_set=done["item_id"])))
    if not cold.num_rows:
        log("[filterllm_score] no cold item with a text tonight: nothing to score")
    elif not pending.num_rows:
        log(f"[filterllm_score] all {wanted.num_rows} items have their users from before: nothing is scored")
    else:
        _score(run, trained, vocabulary, allowed, version, pending)
        done = _cached(run, version, wanted)
        lost = wanted.num_rows - pc.count_distinct(done["item_id"]).as_py()
        if lost:
            raise FilterLLMError(f"table '{TABLE}' lacks {lost} of {wanted.num_rows} items of {version}; run again")
    is_cold = pc.is_in(done["item_id"], value_set=cold["item_id"])
    sampled = done.filter(is_cold)
    out.write("sampled", plain(sampled.select(_STAGED)))
    out.write("held_out", plain(done.filter(pc.invert(is_cold)).select(_STAGED)))
    scored = pc.sum(pc.is_in(pending["item_id"], value_set=cold["item_id"])).as_py() or 0
    return {
        "items": cold.num_rows,
        "rows": sampled.num_rows,
        "held_out": wanted.num_rows - cold.num_rows,
        "scored": scored,
        "reused": cold.num_rows - scored,
        "users": int(allowed.sum()),
        "model_version": trained["model_version"],
        "space_version": trained["space_version"],
        "scoring_version": version,
    }


def _held_out(run: Run, items: pa.Table) -> pa.Table:
    """Those of the warm items that training the model leaves out, a thousand or so at most; none if nobody asks for them."""
    refresh, conf = run.settings.refresh, run.settings.filterllm
    warm = items.filter(pc.and_(pc.equal(items["label"], "warm"), pc.is_valid(items["text_sha256"])))
    if (refresh.scale != "auto" and refresh.words == 0) or refresh.method != "fold_in":
        return warm.slice(0, 0)
    # Who is held out is decided by a hash of the item below a share: a smaller share gives some of them.
    share = min(conf.validation_share, _PROBES / max(1, warm.num_rows))
    return warm.filter(pa.array(held_out(warm["item_id"].to_pylist(), share, run.settings.seed)))


def _allowed(run: Run, vocabulary: pa.Array) -> np.ndarray:
    """[U] bool: users of the vocabulary who still exist; the others must never be drawn.

    Raises:
        FilterLLMError: nobody is left.
    """
    users = run.staging("snapshot").read("users", ["user_id"])["user_id"]
    allowed = pc.is_in(vocabulary, value_set=users).to_numpy(zero_copy_only=False)
    if not allowed.any():
        raise FilterLLMError(
            f"none of the model's {len(vocabulary)} users is among tonight's {len(users)}: train a model for this date "
            "(--train), or check that the table of interactions is the right one"
        )
    return allowed


def _scoring_version(run: Run, model_version: str, users: pa.Array) -> str:
    """What decides an item's users beside its text; tiles and shards do not."""
    sampling = run.settings.sampling
    digest = hashlib.sha256()
    for user_id in users.to_pylist():
        digest.update(user_id.encode("utf-8", "surrogatepass") + b"\0")
    facts = [model_version, sampling.k, sampling.draw, sampling.temperature, run.settings.seed, digest.hexdigest()]
    facts.append(user_sampling.DEFINITION)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _cached(run: Run, version: str, cold: pa.Table) -> pa.Table:
    """The rows of `cold` items (item_id, text_sha256; large) in the table, large too, sorted by item and rank; each once."""
    rows = large(run.lake.read(TABLE, scoring_version=version))
    rows = rows.join(cold, ["item_id", "text_sha256"], join_type="left semi")
    rows = rows.sort_by([("item_id", "ascending"), ("rank", "ascending")]).combine_chunks()
    # Two runs that scored at once may both have written an item.
    item, rank = rows["item_id"], rows["rank"]
    if rows.num_rows < 2:
        return rows
    again = pc.and_(pc.equal(item[1:], item[:-1]), pc.equal(rank[1:], rank[:-1])).to_numpy()
    return rows.filter(pa.array(np.concatenate([[True], ~again])))


def _score(
    run: Run, trained: dict[str, Any], vocabulary: pa.Array, allowed: np.ndarray, version: str, pending: pa.Table
) -> None:
    """Score and commit the items `pending` (item_id, text_sha256; sorted)."""
    settings, size = run.settings, run.settings.sampling.shard_items
    model = load_model(run, trained["model_version"])
    shards = [pending.slice(start, size) for start in range(0, pending.num_rows, size)]
    log(f"[filterllm_score] {pending.num_rows} items in {len(shards)} shards over {int(allowed.sum())} users")
    sampling = Sampling(
        k=settings.sampling.k,
        draw=settings.sampling.draw,
        temperature=settings.sampling.temperature,
        user_tile=settings.sampling.user_tile,
        seed=settings.seed,
    )
    apps = [f"{TABLE}/{version}/{_digest(shard)}" for shard in shards]
    sequences = run.lake.sequences(TABLE, apps)
    with cluster(settings.ray), Progress("filterllm_score", pending.num_rows, "items") as progress:
        import ray

        if settings.filterllm.lora:
            of = run.artifact("models", trained["model_version"])
            shas = pending["text_sha256"].combine_chunks()
            adapted_texts.encode(run, of, run.staging("snapshot"), shas)
        keys, bias = model.keys()
        # Put once: the actors of a machine read the same memory.
        shared = tuple(ray.put(array) for array in (keys, bias, allowed))
        results = map_ordered(
            Scorer,
            (*shared, sampling, "cuda" if settings.ray.gpus_per_actor > 0 else "cpu"),
            _queries(run, model, trained["encoder_version"], shards),
            actors=min(settings.ray.actors, len(shards)),
            cpus=settings.ray.cpus_per_actor,
            gpus=settings.ray.gpus_per_actor,
        )
        for shard, app, sequence, (users, probabilities) in zip(shards, apps, sequences, results, strict=True):
            rows = _rows(shard, version, vocabulary, users, probabilities, sampling.draw)
            run.lake.commit(TABLE, rows, app=app, sequence=sequence, lineage={"run_id": run.run_id})
            progress.advance(shard.num_rows)


def _queries(
    run: Run, model: FilterLLM, encoder_version: str, shards: list[pa.Table]
) -> Iterator[tuple[list[str], np.ndarray]]:
    """(item ids, queries [n, d]) of each shard; the text embeddings of a few shards are in memory at a time."""
    for start in range(0, len(shards), _READ_AHEAD):
        group = shards[start : start + _READ_AHEAD]
        shas = [sha for shard in group for sha in shard["text_sha256"].to_pylist()]
        hidden, at = text_embeddings.load(run, shas, encoder_version), 0
        for shard in group:
            yield shard["item_id"].to_pylist(), model.queries(hidden[at : at + shard.num_rows])
            at += shard.num_rows


def _rows(
    shard: pa.Table, version: str, vocabulary: pa.Array, users: np.ndarray, probabilities: np.ndarray, draw: str
) -> pa.Table:
    """Rows of the table from users and probabilities [n, K]."""
    n, k = users.shape
    of_item = np.repeat(np.arange(n), k)
    columns = {
        "scoring_version": [version] * (n * k),
        "item_id": shard["item_id"].take(pa.array(of_item)),
        "text_sha256": shard["text_sha256"].take(pa.array(of_item)),
        "user_id": vocabulary.take(pa.array(users.reshape(-1))),
        "rank": np.tile(np.arange(1, k + 1, dtype=np.int32), n),
        "probability": probabilities.reshape(-1),
        "propensity": [draw] * (n * k),
    }
    return schema(TABLE).conform(pa.table(columns))


def _digest(shard: pa.Table) -> str:
    """What a shard is: the hash of its items and texts."""
    return hashlib.sha256(json.dumps(shard.to_pydict()).encode()).hexdigest()[:32]
