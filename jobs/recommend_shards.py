"""The rows of `recommendations`, shard by shard of users; a shard that is done is staged and stays.

A shard is named by its users: a run that was killed goes on with those that are not complete.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from jobs.allmrec_backbone import Side
from jobs.allmrec_night import Night
from jobs.allmrec_reader import Spoken
from jobs.recommend_reading import likelihoods
from jobs.recommend_users import Users
from jobs.recommend_weights import Weights
from jobs.run import Run, log
from jobs.staging import Staging
from schemas.table import table as schema
from udfs.allmrec_actor import Shard
from udfs.sequences import PADDING, Ints
from udfs.vectors import Matrix

TABLE = "recommendations"


@dataclass(frozen=True)
class Work:
    """What the shards are made from: the reader's artifact, the night by it, and what ranks. lineage: constant columns."""

    night: Night
    side: Side
    items: Spoken
    reader_version: str
    weights: Weights
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
    total = sum(len(rows) for rows, _ in pending)
    log(f"[recommend] {total} users in {len(pending)} shards, {users.candidates.shape[1]} candidates each at most")
    histories = work.items.histories(work.night.histories)

    def shard(rows: Ints) -> Shard:
        own = users.users[rows]
        return Shard(work.side.users(own), histories.take(own), users.candidates[rows])

    shards = (shard(rows) for rows, _ in pending)
    read = likelihoods(run, work.night, work.items, work.reader_version, shards, total, work.generate)
    for (rows, stage), (found, written) in zip(pending, read, strict=True):
        stage.clear()
        stage.write(TABLE, _rows(work, users, rows, found, written))
        stage.complete({"users": len(rows)})


def _rows(work: Work, users: Users, rows: Ints, found: Matrix, written: list[str] | None) -> pa.Table:
    """Rows of the table: of each user the `top` best by score; of equal ones the better candidate comes first.

    Args:
        found: [len(rows), C], the log-likelihoods of the candidates.
    """
    candidates, retrieval = users.candidates[rows], users.retrieval[rows]
    scores = work.weights(found, retrieval)
    order = np.argsort(np.where(candidates == PADDING, np.inf, -scores), axis=1, kind="stable")[:, : work.top]
    there = np.take_along_axis(candidates, order, 1) != PADDING
    row, rank = np.nonzero(there)
    place = order[row, rank]
    night, item = work.night, candidates[row, place]
    item_id = night.item_ids.take(pa.array(item))
    columns = {
        "user_id": night.user_ids.take(pa.array(users.users[rows][row])),
        "item_id": item_id,
        "rank": rank + 1,
        "score": scores[row, place],
        "likelihood": found[row, place],
        "candidate_rank": place + 1,
        "retrieval_score": retrieval[row, place],
        "source": [work.sources[name] for name in item_id.to_pylist()],
        "generated": pa.array([written[at] for at in row] if written else [None] * len(row), pa.string()),
        **{name: [value] * len(row) for name, value in work.lineage.items()},
    }
    return schema(TABLE).conform(pa.table(columns))


def _name(number: int, night: Night, users: Ints) -> str:
    """What a shard is: the hash of its users."""
    ids = night.user_ids.take(pa.array(users)).to_pylist()
    return f"{number:06d}-{hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]}"
