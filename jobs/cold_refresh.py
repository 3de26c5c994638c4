"""One night's cold refresh: the stages in order, each at most once.

    spark-submit jobs/cold_refresh.py --conf conf/demo.yaml --run-date 2017-11-01

Started again it goes on where it was stopped; when the night is finished and its inputs are the same, it does nothing and
says so. `--stage NAME` runs one stage (earlier ones must be complete), `--dry-run` only says what would be done, or what would
stop it before its first stage. `--train` trains a new embedding space and FilterLLM model for the run date and publishes
nothing: refreshes of that date and later use them. The last line of stdout is a summary in JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

from jobs import cli, ray_cluster, text_embeddings
from jobs.run import (
    LATE_DAYS,
    STAGES,
    TRAINING_STAGES,
    Run,
    begun_run,
    execute,
    find_run,
    input_tables,
    log,
    open_run,
    parse_new_run_date,
)
from jobs.settings import Settings, SettingsError
from jobs.staging import Staging

# A backfill's night may be older than the newest keep_runs when it is published, and is then to be measured and reported.
_AT_WORK = timedelta(days=1)


def refresh(settings: Settings, run_date: date, stage: str | None = None, *, training: bool = False) -> dict[str, Any]:
    """Run every stage that is not complete, or only `stage`; returns the summary.

    With `training` the stages end with the trained model, which is left, like the space, where later runs look for them.

    Raises:
        ColdRefreshError: a stage cannot run or a gate failed; nothing of the night is published unless it was before.
    """
    begun = time.perf_counter()
    stages = TRAINING_STAGES if training else STAGES
    if training:
        settings = settings.training()
    if stage in (None, stages[0]):
        run = open_run(settings, run_date, training=training)
    else:
        run = begun_run(settings, run_date, training=training)
    done = run.done(stages[-1])
    log(f"run {run.run_id} of {run_date}, inputs {run.input_versions}")
    computed = []
    if stage is None and stages[-1] in done:
        log("this night is finished and its inputs have not changed: nothing is recomputed")
    else:
        if stage in (None, stages[0]):
            _preflight(settings)
        if stage and (missing := [name for name in stages[: stages.index(stage)] if name not in done]):
            raise SettingsError(f"--stage {stage}: of run {run.run_id} {', '.join(missing)} must be complete first")
        for name in (stage,) if stage else stages:
            if name in done:
                log(f"[{name}] complete already: skipped")
                continue
            if not run.staging(name).is_complete():
                computed.append(name)
            done[name] = execute(run, name)
            if name == "publish":  # what follows may fail for many nights
                prune(run)
    if STAGES[-1] in done:
        prune(run)
    elif training and stages[-1] in done:
        Staging(run.lake.path(f"_staging/{run.run_id}")).clear()  # the space and the model are artifacts
        _tell_younger(run, done["cf"]["space_version"])
    if not training:
        _tell(run, done)
    return _summary(run, done, computed, time.perf_counter() - begun)


def _tell_younger(run: Run, version: str) -> None:
    """Say so if the nights to come have a younger space than `version`, which has been trained now: they go on with that one."""
    conf = run.artifact("spaces", version).facts()["conf"]
    everything = replace(run, run_date=date.max, known={}).trained("spaces")
    for day, younger, facts in everything:
        if day > run.run_date and (facts["kind"], facts["conf"]) == ("cf", conf):
            log(
                f"note: nights from {day} on keep space {younger}, which is younger: to replace it, train for a later date"
            )


def _preflight(settings: Settings) -> str:
    """What would stop the night hours later is found before any compute.

    Returns:
        The version of the text embeddings.

    Raises:
        udfs.model_files.ModelError: the language model is missing or is not the expected one.
        jobs.ray_cluster.ClusterError: no Ray cluster answers at ray.address.
    """
    encoder_version = text_embeddings.model_version(settings.text)
    ray_cluster.require(settings.ray)
    return encoder_version


def _tell(run: Run, done: dict[str, dict[str, Any]]) -> None:
    """The metrics beside their floors, and where everything is, for a person."""
    summary = done.get("evaluate", {}).get("summary") or {}
    if summary:
        names = sorted({metric for systems in summary.values() for values in systems.values() for metric in values})
        log("".join([f"\n{'split':10}{'system':14}", *(f"{name:>12}" for name in names)]))
        for split, systems in summary.items():
            for system, values in systems.items():
                log(
                    f"{split:10}{system:14}" + "".join(f"{values[n]:12.4f}" if n in values else " " * 12 for n in names)
                )
    elif "evaluate" in done:
        log(f"\nno metrics: {done['evaluate'].get('note', 'nothing to measure yet')}")
    if "publish" in done:
        log("\ntables of this night:")
        for name, version in done["publish"]["output_versions"].items():
            log(f"  {run.lake.path(name)} (version {version})")
    if "report" in done:
        log(f"report: {done['report']['path']}")


def _summary(run: Run, done: dict[str, dict[str, Any]], computed: list[str], seconds: float) -> dict[str, Any]:
    snapshot, refreshed = done.get("snapshot", {}), done.get("refresh", {})
    return {
        "run_id": run.run_id,
        "run_date": run.run_date.isoformat(),
        "lake": run.settings.lake,
        "stages_computed": computed,
        "stages_complete": [name for name in STAGES if name in done],
        "rows_in": snapshot.get("rows_in"),
        "rows_rejected": snapshot.get("rows_rejected"),
        "cold_items": snapshot.get("cold"),
        "rows_out": refreshed.get("rows"),
        "sources": refreshed.get("sources"),
        "output_versions": done.get("publish", {}).get("output_versions"),
        "metrics": done.get("evaluate", {}).get("summary"),
        "report": done.get("report", {}).get("path"),
        "seconds": round(seconds, 1),
    }


def prune(run: Run) -> None:
    """Remove the staged files and the index of published runs, except those of the newest `keep_runs`; their rows stay.

    So does the snapshot of a date whose users still have time (evaluate.horizon_days), which it will be measured with, and
    LATE_DAYS beyond; and for a day all that a run without a report may still be reading. What earlier runs of this run's date have
    left goes at once, unless they have published: this one has, and jobs.publish lets no earlier run of the date follow it.
    """
    rows = run.lake.read("runs", columns=["refresh_date", "sequence", "run_id", "stage"]).to_pylist()
    published = sorted((r["refresh_date"], r["sequence"], r["run_id"]) for r in rows if r["stage"] == "publish")
    newest_of = {refresh_date: run_id for refresh_date, _, run_id in published}
    of_date = [r for r in rows if r["refresh_date"] == run.run_date and r["sequence"] < run.sequence]
    opened = [r["run_id"] for r in of_date if r["stage"] == "open"]
    given_up = [run_id for run_id in opened if run_id not in {one for _, _, one in published}]
    reported = {r["run_id"] for r in rows if r["stage"] == STAGES[-1]}
    changed_since = datetime.now(UTC) - _AT_WORK
    evaluate = run.settings.evaluate
    needed = timedelta(days=evaluate.horizon_days + LATE_DAYS if evaluate.protocol == "temporal" else 0)
    for place, what in (("_staging", "staged files"), ("_index", "index")):
        present = set(Staging(run.lake.path(place)).children())
        for run_id in (one for one in given_up if one in present):
            log(f"removing the {what} of run {run_id} (unfinished, and run {run.run_id} of its date is published)")
            Staging(run.lake.path(f"{place}/{run_id}")).clear()
        for refresh_date, _, run_id in published[: -run.settings.keep_runs]:
            if run_id not in present or run_id == run.run_id:
                continue
            gone = [folder := Staging(run.lake.path(f"{place}/{run_id}"))]
            if run_id not in reported and folder.changed() >= changed_since:
                continue
            if place == "_staging" and newest_of[refresh_date] == run_id and refresh_date + needed >= published[-1][0]:
                gone = [Staging(folder.path(name)) for name in folder.children() if name != STAGES[0]]
            if gone:
                log(f"removing the {what} of run {run_id} (keep_runs is {run.settings.keep_runs})")
            for one in gone:
                one.clear()


def plan(settings: Settings, run_date: date, *, training: bool = False) -> dict[str, Any]:
    """What `refresh` would do, without doing it: each stage with whether it would run, and its seconds last time; of those that
    may train (the others, and complete ones: None) whether they would.

    Raises:
        ColdRefreshError: an input table is missing, or the run would be stopped before its first stage.
    """
    names = TRAINING_STAGES if training else STAGES
    settings = settings.training() if training else settings
    existing, new = find_run(settings, run_date, training=training)
    run = existing or new
    done = run.done(names[-1]) if existing else {}
    keeps = {} if names[-1] in done else _keeps(run, _preflight(settings))
    rows = run.lake.read("runs", columns=["refresh_date", "sequence", "stage", "counts", "seconds"]).to_pylist()
    stages = []
    for name in names:
        complete = name in done or (existing is not None and run.staging(name).is_complete())
        trains = None if complete or name not in keeps else keeps[name] is None
        seconds = _seconds(rows, name, trains)
        does = "skip: complete" if complete else "run"
        if trains is not None:
            does = "run: trains" if trains else f"run: keeps {keeps[name]}"
        cost = f"took {seconds:.0f} s last time" if seconds is not None else "never done in this lake"
        log(f"  {name:16} {does} ({cost})")
        stages.append({"stage": name, "run": not complete, "trains": trains, "seconds_last_time": seconds})
    inputs = {}
    for name, version in run.input_versions.items():
        table = run.lake.table(input_tables(settings)[name], version)
        inputs[name] = {
            "version": version,
            "rows": sum(filter(None, table.get_add_actions()["num_records"].to_pylist())),
        }
        log(f"  input {name}: version {version}, {inputs[name]['rows']} rows in its files")
    why = "goes on with a run" if existing else "opens a new run"
    log(f"run {run.run_id} of {run_date} ({why}); nothing was done")
    return {"dry_run": True, "run_id": run.run_id, "run_date": run_date.isoformat(), "inputs": inputs, "stages": stages}


def _keeps(run: Run, encoder_version: str) -> dict[str, str | None]:
    """Stage that may train -> version of the space or model that it would keep, by its age; None where it would train one (unless
    the same data have been trained on before, which only the snapshot can tell).
    """
    from jobs import cf, filterllm_train  # torch, which takes seconds

    texts, staged = run.staging("text_embeddings"), run.staging("cf")
    if texts.is_complete():
        encoder_version = texts.facts()["model_version"]
    if staged.is_complete():
        space = staged.facts()["space_version"]
    else:
        space = cf.kept(run, None if run.settings.cf.init == "random" else encoder_version)
    return {"cf": space, "filterllm_train": space and filterllm_train.kept(run, space, encoder_version)}


def _seconds(rows: list[dict[str, Any]], stage: str, trains: bool | None) -> float | None:
    """How long the stage took last, by `rows` of `runs`: if it `trains` or does not, when it did the same. None: never."""
    rows = [row for row in rows if row["stage"] == stage]
    if trains is not None:
        rows = [row for row in rows if json.loads(row["counts"]).get("trained") is trains]
    return max(rows, key=lambda row: (row["refresh_date"], row["sequence"]), default={"seconds": None})["seconds"]


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    cli.add_settings(parser)
    parser.add_argument("--run-date", required=True, help="YYYY-MM-DD: only what happened before this day is known")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stage", choices=STAGES, help="run this stage only")
    what.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--train", action="store_true", help=f"train for this date: {', '.join(TRAINING_STAGES)} only")
    args: argparse.Namespace = parser.parse_args(argv)
    if args.train and args.stage and args.stage not in TRAINING_STAGES:
        parser.error(f"--train has no stage {args.stage}; it runs {', '.join(TRAINING_STAGES)}")

    def job() -> dict[str, Any]:
        settings, run_date = cli.settings(args), parse_new_run_date(args.run_date)
        if args.dry_run:
            return plan(settings, run_date, training=args.train)
        return refresh(settings, run_date, args.stage, training=args.train)

    return cli.main(job)


if __name__ == "__main__":
    sys.exit(cli.script("jobs.cold_refresh", __file__))
