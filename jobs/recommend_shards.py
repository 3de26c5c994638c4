"""Users' candidates through the language model, shard by shard over Ray actors; a shard that is done is staged and stays.

A shard is named by its users: a run that was killed goes on with those that are not complete.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from jobs import allmrec_artifacts, allmrec_reader
from jobs.allmrec_backbone import Side
from jobs.allmrec_night import Night
from jobs.allmrec_reader import Spoken
from jobs.ray_cluster import cluster
from jobs.recommend_users import Users
from jobs.run import Run, log
from jobs.staging import Staging
from schemas.table import table as schema
from udfs.actor_pool import map_ordered
from udfs.allmrec_actor import NOBODY, Asked, ReaderActor
from udfs.progress import Progress
from udfs.sequences import Ints
from udfs.vectors import Matrix

TABLE = "recommendations"


@dataclass(frozen=True)
class Work:
    """What the shards are made from: the reader's artifact, and the night by it. lineage: constant columns of the table."""

    night: Night
    side: Side
    items: Spoken
    reader_version: str
    sources: dict[str, str]
    lineage: dict[str, object]
    top: int
    generate: bool


def score(run: Run, work: Work, users: Users, folder: Staging) -> pa.Table:
    """The rows of the table (schemas/recommendations.yaml) of `users`, by user and rank; staged in `folder` as they come.

    Raises:
        jobs.ray_cluster.ClusterError, udfs.actor_pool.WorkerError: Ray or a worker failed.
    """
    size = run.settings.allmrec.reader.shard_users
    shards = [np.arange(at, min(at + size, len(users.users))) for at in range(0, len(users.users), size)]
    staged = [Staging(folder.path(_name(number, work.night, users.users[rows]))) for number, rows in enumerate(shards)]
    pending = [number for number, stage in enumerate(staged) if not stage.is_complete()]
    if len(pending) < len(shards):
        log(f"[recommend] {len(shards) - len(pending)} of {len(shards)} shards are complete already")
    if pending:
        _score(run, work, users, [(shards[number], staged[number]) for number in pending])
    for stage in staged:
        stage.verify()
    parts = [stage.read(TABLE) for stage in staged]
    contract = schema(TABLE).arrow_schema
    return pa.concat_tables([part.cast(contract) for part in parts]) if parts else contract.empty_table()


def _score(run: Run, work: Work, users: Users, pending: list[tuple[Ints, Staging]]) -> None:
    settings, ray_settings = run.settings.allmrec.reader, run.settings.ray
    total = sum(len(rows) for rows, _ in pending)
    log(f"[recommend] {total} users in {len(pending)} shards, {users.candidates.shape[1]} candidates each at most")
    model = allmrec_reader.language_model(settings)
    histories = work.items.histories(work.night.histories)

    def asked(rows: Ints) -> Asked:
        own = users.users[rows]
        return Asked(work.side.users(own), histories.take(own), users.candidates[rows])

    with cluster(ray_settings), Progress("recommend", total, "users") as progress:
        import ray

        # Put once: the actors of a machine read the same memory.
        titles, joint = ray.put(work.night.titles), ray.put(work.items.joint)
        arguments = (
            model,
            model.resolve()[1],
            allmrec_artifacts.files(run, allmrec_reader.KIND, work.reader_version),
            titles,
            joint,
            allmrec_reader.prompt_options(settings),
            settings.normalise,
            work.generate,
            "cuda" if ray_settings.gpus_per_actor > 0 else "cpu",
        )
        results = map_ordered(
            ReaderActor,
            arguments,
            (asked(rows) for rows, _ in pending),
            actors=min(ray_settings.actors, len(pending)),
            cpus=ray_settings.cpus_per_actor,
            gpus=ray_settings.gpus_per_actor,
        )
        for (rows, stage), (scores, written) in zip(pending, results, strict=True):
            stage.clear()
            stage.write(TABLE, _rows(work, users, rows, scores, written))
            stage.complete({"users": len(rows)})
            progress.advance(len(rows))


def _rows(work: Work, users: Users, rows: Ints, scores: Matrix, written: list[str] | None) -> pa.Table:
    """Rows of the table: of each user the `top` best by score; of equal ones the better candidate comes first."""
    candidates = users.candidates[rows]
    order = np.argsort(np.where(candidates == NOBODY, np.inf, -scores), axis=1, kind="stable")[:, : work.top]
    there = np.take_along_axis(candidates, order, 1) != NOBODY
    row, rank = np.nonzero(there)
    place = order[row, rank]
    night, item = work.night, candidates[row, place]
    item_id = night.item_ids.take(pa.array(item))
    columns = {
        "user_id": night.user_ids.take(pa.array(users.users[rows][row])),
        "item_id": item_id,
        "rank": rank + 1,
        "score": scores[row, place],
        "candidate_rank": place + 1,
        "retrieval_score": users.retrieval[rows][row, place],
        "source": [work.sources[name] for name in item_id.to_pylist()],
        "generated": pa.array([written[at] for at in row] if written else [None] * len(row), pa.string()),
        **{name: [value] * len(row) for name, value in work.lineage.items()},
    }
    return schema(TABLE).conform(pa.table(columns))


def _name(number: int, night: Night, users: Ints) -> str:
    """What a shard is: the hash of its users."""
    ids = night.user_ids.take(pa.array(users)).to_pylist()
    return f"{number:06d}-{hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]}"
