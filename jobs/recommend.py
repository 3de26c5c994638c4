"""Recommendations for a list of users: candidates from the published embeddings, ranked by a language model (A-LLMRec).

    python -m jobs.recommend --conf conf/demo.yaml --run-date 2017-11-01 --users users.txt --candidates 20 --top 10

The night of --run-date must be published. Each user's candidates are the nearest items of its FAISS index that are not in the
history, cold ones among them; they are ranked by the likelihood of their titles under the frozen causal language model of
allmrec.reader.model (arXiv 2404.11343, second stage) and by their nearness, as much of each as held-out users say. What that needs
(an alignment, a reader, these weights) is made when it is not there. Rows go to the
table `recommendations` past a Great Expectations gate, exactly once; users who cannot be served to `rejected_rows`, with the
reason. Started again it goes on where it was stopped; when it is finished it does nothing. The last line of stdout is JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from jobs import (
    allmrec_alignment,
    allmrec_artifacts,
    allmrec_backbone,
    allmrec_night,
    allmrec_reader,
    cf,
    cli,
    item_index,
    published,
    recommend_shards,
    recommend_users,
    recommend_weights,
    text_embeddings,
)
from jobs.expectations import View, check
from jobs.lake import Lake
from jobs.published import NotPublishedError, Published, require_remakable
from jobs.recommend_shards import TABLE, Work
from jobs.recommend_users import Users
from jobs.run import Run, code_version, execute, log, parse_run_date
from jobs.settings import Settings
from jobs.staging import Staging
from schemas.errors import ColdRefreshError
from udfs import gate_views
from udfs.filesystems import located
from udfs.ids import place
from udfs.vectors import from_column

STAGE = "recommend"
# Of section allmrec, what decides no recommendation.
_MEANS = {"retrain_days": True, "reader": {"shard_users", "batch_tokens"}}


class RecommendError(ColdRefreshError):
    """The list of users cannot be read: the message says why, and what it must hold."""


@dataclass(frozen=True)
class Request:
    """What is wanted: `users` ids, `candidates` of the index a user, the `top` best of them, a title written for each."""

    users: list[str]
    candidates: int = 20
    top: int = 10
    generate: bool = False


def read_users(uri: str) -> list[str]:
    """The user ids of a text file (a path or URI): one a line; empty lines are skipped.

    Raises:
        RecommendError: there is none, it is not UTF-8, or it names nobody.
    """
    filesystem, path = located(uri)
    if filesystem.get_file_info(path).type != fs.FileType.File:
        raise RecommendError(f"--users {uri}: no such file; it must hold one user id a line")
    with filesystem.open_input_stream(path) as stream:
        body = stream.read()
    try:
        ids = [line.strip() for line in body.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise RecommendError(f"--users {uri} is not UTF-8 ({error}): it must hold one user id a line") from error
    ids = [name for name in ids if name]
    if not ids:
        raise RecommendError(f"--users {uri} names nobody: it must hold one user id a line")
    return ids


def recommend(settings: Settings, run_date: date, asked: Request) -> dict[str, Any]:
    """Run the job; its summary.

    Raises:
        NotPublishedError: nothing is published of the date.
        jobs.expectations.GateError: the gate failed; nothing was written.
        ColdRefreshError: a model, the cluster, or a table of the night is not usable.
    """
    begun = time.perf_counter()
    lake = Lake(settings.lake, settings.storage_options)
    night = published.latest(lake, run_date)
    if night.refresh_date != run_date:
        raise NotPublishedError(
            f"nothing is published of {run_date}; the newest before it is of {night.refresh_date}: run the night of "
            f"{run_date} first (jobs/cold_refresh.py), or ask with --run-date {night.refresh_date}"
        )
    run, row = _open(settings, night, asked)
    log(f"run {run.run_id}: {len(asked.users)} users, from the night {night.run_id} of {run_date}")
    facts = run.recorded().get(STAGE)
    if facts is None:
        facts = execute(run, STAGE, lambda run, out: _stage(run, out, night, row, asked))
    else:
        log("these recommendations are finished: nothing is recomputed")
    _prune(run)
    told = {name: value for name, value in facts.items() if name != "seconds"}
    return {
        "run_id": run.run_id,
        "run_date": run_date.isoformat(),
        "lake": settings.lake,
        **told,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _prune(run: Run) -> None:
    """Remove what this run needs no more, and all staged files of finished ones except the newest `keep_runs`."""
    for name in ("snapshot", "shards"):
        run.staging(name).clear()
    rows = [
        r
        for r in run.lake.read("runs", columns=["run_id", "stage", "output_versions"]).to_pylist()
        if r["stage"] == STAGE
    ]
    finished = [r["run_id"] for r in sorted(rows, key=lambda r: json.loads(r["output_versions"])[TABLE])]
    present = set(Staging(run.lake.path("_staging")).children())
    for run_id in (present & set(finished[: -run.settings.keep_runs])) - {run.run_id}:
        Staging(run.lake.path(f"_staging/{run_id}")).clear()


def _open(settings: Settings, night: Published, asked: Request) -> tuple[Run, dict[str, Any]]:
    """The run, named by what it is made of, with the inputs that the night pinned; and the night's row of `runs`."""
    rows = night.lake.read("runs", refresh_date=night.refresh_date).to_pylist()
    row = next(r for r in rows if r["run_id"] == night.run_id and r["stage"] == "publish")
    conf = allmrec_artifacts.conf_digest(settings.allmrec, settings.seed, _MEANS)
    body = {name: value for name, value in vars(asked).items() if name != "users"}
    made_of = [STAGE, night.run_id, conf, settings.digest("text"), code_version(), body, sorted(asked.users)]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    run_id = f"{night.refresh_date:%Y%m%d}-{digest}"
    versions = json.loads(row["input_versions"])
    return Run(settings, night.refresh_date, run_id, night.sequence, versions, conf), row


def _stage(run: Run, out: Staging, published_night: Published, row: dict[str, Any], asked: Request) -> dict[str, Any]:
    before = replace(run, run_id=published_night.run_id)
    night = allmrec_night.read(night_snapshot(run, before, row))
    log(f"[recommend] histories are in the order of {night.order}")
    encoded = before.staging("text_embeddings")
    language_model = (
        encoded.facts()["model_version"] if encoded.is_complete() else text_embeddings.model_version(run.settings.text)
    )
    users, items = published_night.user_embeddings(), published_night.item_embeddings()
    vectors = {
        "users": (users["user_id"].to_pylist(), from_column(users["embedding"])),
        "items": (items["item_id"].to_pylist(), from_column(items["embedding"])),
    }
    space = cf.load_space(run, published_night.space_version)
    published_side = allmrec_backbone.SpaceSide(night, space, vectors)
    if run.settings.allmrec.backbone == "space":
        learnt: allmrec_backbone.Side = allmrec_backbone.SpaceSide(night, space)
        side: allmrec_backbone.Side = published_side
    else:
        side = learnt = allmrec_backbone.trained(run, night)
    alignment = allmrec_alignment.find(run, night, language_model, learnt)
    spoken = allmrec_reader.spoken(run, night, alignment, side)
    nearest = recommend_users.Nearest(item_index.ready(before, items, users), night)
    chosen = recommend_users.choose(
        night, asked.users, side.users_known, spoken.known, vectors["users"], nearest, asked.candidates
    )
    reader, weights, weighed = "", recommend_weights.Weights(), None
    if len(chosen.users):  # otherwise there is nothing to read
        reader = allmrec_reader.find(run, night, alignment, side, spoken)
        weights, weighed = recommend_weights.find(
            run, night, side, published_side, spoken, reader, nearest, asked.candidates
        )
    lineage = {
        "refresh_date": run.run_date,
        "run_id": run.run_id,
        "published_run_id": published_night.run_id,
        "model_version": reader,
        "space_version": published_night.space_version,
    }
    sources = dict(zip(vectors["items"][0], items["source"].to_pylist(), strict=True))
    work = Work(night, side, spoken, reader, weights, sources, lineage, asked.top, asked.generate)
    shards = run.staging("shards")
    rows = recommend_shards.score(run, work, chosen, shards)
    checked = _gate(run, out, work, chosen, asked, rows, items["item_id"], shards)
    facts = {
        "published_run_id": published_night.run_id,
        "space_version": published_night.space_version,
        "backbone": side.version,
        "alignment_version": alignment,
        "model_version": reader or None,
        "weights": {**asdict(weights), "version": weighed},
        "order": night.order,
        "users": {"asked": len(asked.users), "served": len(chosen.users), "rejected": recommend_users.reasons(chosen)},
        "rows": rows.num_rows,
        "cold_rows": int(np.isin(_numbers(night, rows), np.flatnonzero(night.cold)).sum()),
        **checked,
    }
    facts["output_versions"] = _commit(run, chosen, rows, facts)
    return facts


def night_snapshot(run: Run, before: Run, row: dict[str, Any]) -> Staging:
    """The snapshot of the night `before` as it is staged; if that was removed, made again, for `run`, from the input versions
    that the night pinned. `row`: the night's conf_hash and code_version.

    Raises:
        NotPublishedError: it would be another one, since the settings, the code or the input tables are others.
    """
    staged = before.staging("snapshot")
    if staged.is_complete():
        return staged
    require_remakable(before, row)
    log(f"[recommend] the staged snapshot of {before.run_id} is gone: made again from {run.input_versions}")
    execute(run, "snapshot")
    return run.staging("snapshot")


def _numbers(night: allmrec_night.Night, rows: pa.Table) -> np.ndarray:
    return place(rows["item_id"], night.item_ids)


def _gate(
    run: Run,
    out: Staging,
    work: Work,
    users: Users,
    asked: Request,
    rows: pa.Table,
    items: pa.ChunkedArray,
    shards: Staging,
) -> dict[str, Any]:
    """Great Expectations on what the shards left.

    Raises:
        jobs.expectations.GateError: an expectation is not met; nothing is written.
    """
    served = work.night.user_ids.take(pa.array(users.users))
    history = recommend_users.history_of(work.night, users.users)
    rejected = sum(recommend_users.reasons(users).values())
    counts = {"asked": [len(asked.users)], "unaccounted": [abs(len(asked.users) - len(users.users) - rejected)]}
    names = list(work.lineage)
    lineage = gate_views.lineage(rows, names)
    views = [
        View(TABLE, "users", gate_views.recommended_by_user(rows, served, items, history), ("user_id", "rows")),
        View(TABLE, "asked", pa.table(counts).to_pandas(), ("asked",)),
        View(TABLE, "lineage", lineage, ("run_id", "rows")),
    ]
    parameters: dict[str, Any] = {name: [str(value)] for name, value in work.lineage.items()}
    parameters |= {"users_to_serve": len(users.users), "top": asked.top, "lineages": min(len(users.users), 1)}
    facts = check(
        views,
        parameters,
        out,
        name=run.run_id,
        at=run.midnight,
        consequence=f"Nothing was written to '{TABLE}'. What was gated lies in {shards.uri}; mend its cause, remove that "
        "folder and run again.",
    )
    log(f"[recommend] {facts['succeeded']} of {facts['expectations']} expectations are met; {facts['data_docs']}")
    return facts


def _commit(run: Run, users: Users, rows: pa.Table, facts: dict[str, Any]) -> dict[str, int]:
    """Append the rows and the rejected users, each once for this run; table -> version."""
    lineage = {"run_id": run.run_id, "conf_hash": run.conf_hash, "code_version": code_version(), **facts}
    rejected = recommend_users.rejected_rows(users, run.run_id, run.run_date)
    versions = {TABLE: run.lake.commit(TABLE, rows, app=f"{TABLE}/{run.run_id}", lineage=lineage)}
    if rejected.num_rows:
        app = f"rejected_rows/{STAGE}/{run.run_id}"
        versions["rejected_rows"] = run.lake.commit("rejected_rows", rejected, app=app, lineage=lineage)
    for name, version in versions.items():
        log(f"[recommend] {name}: {(rows if name == TABLE else rejected).num_rows} rows, version {version}")
    return versions


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    cli.add_settings(parser)
    parser.add_argument("--run-date", required=True, help="YYYY-MM-DD: a date whose night is published")
    parser.add_argument("--users", metavar="FILE", help="user ids, one a line (a path or URI)")
    parser.add_argument("--user", action="append", default=[], metavar="ID", help="a user id; repeatable")
    parser.add_argument(
        "--candidates", type=int, default=20, help="items of the index to rank for each user (default: %(default)s)"
    )
    parser.add_argument("--top", type=int, default=10, help="best items to keep for each user (default: %(default)s)")
    parser.add_argument("--generate", action="store_true", help="let the model write a title for each user, too")
    args = parser.parse_args(argv)
    if not args.users and not args.user:
        parser.error("name the users: --users FILE or --user ID")
    if not 1 <= args.top <= args.candidates:
        parser.error(f"--top {args.top} must lie between 1 and --candidates {args.candidates}")

    def job() -> dict[str, Any]:
        settings, run_date = cli.settings(args), parse_run_date(args.run_date)
        ids = [*(read_users(args.users) if args.users else []), *args.user]
        summary = recommend(settings, run_date, Request(ids, args.candidates, args.top, args.generate))
        if args.user:
            _tell(settings, run_date, summary["run_id"], args.user)
        return summary

    return cli.main(job)


def _tell(settings: Settings, run_date: date, run_id: str, users: list[str]) -> None:
    """What these users get, for a person."""
    rows = Lake(settings.lake, settings.storage_options).read(TABLE, refresh_date=run_date, run_id=run_id)
    for row in rows.sort_by([("user_id", "ascending"), ("rank", "ascending")]).to_pylist():
        if row["user_id"] in users:
            log(f"{row['user_id']}  {row['rank']:4}  {row['score']:9.4f}  {row['source']:8}  {row['item_id']}")


if __name__ == "__main__":
    sys.exit(main())
