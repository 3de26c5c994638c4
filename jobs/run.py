"""One run: settings, a run date, the pinned versions of the input tables, and where its stages leave their results.

The first row of a run in `runs` (stage `open`) pins the input versions, and which trained spaces and models there are to
choose from. A run that is started again goes on with that row as long as it is not finished, so every stage, in whatever
process, reads the same tables and takes the same model, though another was trained meanwhile. Only where a contract or a gate
refused what it read, and the tables have been mended or a model was trained since, or where a pinned version is not there any
more (cleaned up, or of a table that was made anew), it is given up for a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from importlib import import_module
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from jobs.lake import Lake, LakeError
from jobs.settings import Settings, SettingsError
from jobs.staging import Staging, StagingError
from schemas.errors import ColdRefreshError, ContractError

STAGES = (
    "snapshot",
    "text_embeddings",
    "cf",
    "filterllm_train",
    "filterllm_score",
    "refresh",
    "gates",
    "publish",
    "evaluate",
    "report",
)
TRAINING_STAGES = STAGES[:4]
OUTPUTS = ("sampled_interactions", "item_embeddings", "user_embeddings")
LATE_DAYS = 7  # how long a date that is due can still be measured with its own snapshot
# Ids and texts come from outside: a terminal would obey what it is only to show.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
# Kinds of what is trained: the folders under `_artifacts/`.
KINDS = frozenset({"spaces", "models", "backbones", "alignments", "readers", "reader_weights", "checkpoints"})
# Of these, what a night chooses from: the parts of a reader are for its published vectors.
_CHOSEN = ("spaces", "models", "backbones", "alignments")
_RUN_ID = re.compile(r"[0-9]{8}-[0-9a-f]{12}")


def parse_run_date(text: str, option: str = "--run-date") -> date:
    """`text` (YYYY-MM-DD), the value of `option`, as a date.

    Raises:
        SettingsError: it is none.
    """
    try:
        return datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise SettingsError(f"{option} {text!r} is no date; expected YYYY-MM-DD, such as 2026-01-31") from None


def parse_new_run_date(text: str, option: str = "--run-date") -> date:
    """`text` as the date of a run that may publish. Raises SettingsError as `parse_run_date` does, and for a date to come."""
    run_date = parse_run_date(text, option)
    if run_date > datetime.now(UTC).date() + timedelta(days=1):
        raise SettingsError(
            f"{option} {run_date} is still to come: published, it would hide every night before it from the readers"
        )
    return run_date


def is_run_id(text: str) -> bool:
    """`text` is of the form of a run's id."""
    return _RUN_ID.fullmatch(text) is not None


def log(message: str) -> None:
    """One line to stderr; stdout is left to the summary."""
    print(message.translate(_CONTROLS), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Run:
    """A run that is open: what a stage is given. Build it with `open_run`."""

    settings: Settings
    run_date: date
    run_id: str
    sequence: int
    input_versions: dict[str, int]
    conf_hash: str
    # Of the input tables, where the run is to know its own again.
    table_ids: dict[str, str] = field(default_factory=dict)
    # Kind -> versions of the artifacts that it chooses from beside its own, in the order of `trained`; of other kinds, all.
    known: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The id names folders: nothing but this form may reach a path.
        if not is_run_id(self.run_id):
            raise ColdRefreshError(f"run id {self.run_id!r} is not of the form YYYYMMDD-<12 hex digits>")

    @property
    def lake(self) -> Lake:
        return Lake(self.settings.lake, self.settings.storage_options)

    def anywhere(self) -> Run:
        """The same run, as another process can read it, whose working folder may be another one."""
        if "://" in self.settings.lake:
            return self
        return replace(self, settings=self.settings.model_copy(update={"lake": os.path.abspath(self.settings.lake)}))

    @property
    def midnight(self) -> datetime:
        """The run's only clock: what happened before this instant is known, nothing else."""
        return datetime(self.run_date.year, self.run_date.month, self.run_date.day, tzinfo=UTC)

    def staging(self, stage: str) -> Staging:
        return Staging(self.lake.path(f"_staging/{self.run_id}/{stage}"))

    def artifact(self, kind: str, name: str) -> Staging:
        """A content-named result that outlives the run. Raises ValueError for a kind that is none of KINDS."""
        if kind not in KINDS:
            raise ValueError(f"{kind} is none of {sorted(KINDS)}: what nobody knows is never pruned")
        return Staging(self.lake.path(f"_artifacts/{kind}/{name}"))

    def trained(self, kind: str) -> list[tuple[date, str, dict[str, Any]]]:
        """(trained_on, version, facts) of the artifacts of `kind` that the run may choose: complete and up to its date, oldest
        first; those of one date in the order in which they were trained, where their facts say it. What was superseded is left
        out: a part that was trained before the training run of its date, if its facts (`training`) know of such runs.
        """
        found = self._complete(kind)
        if kind in self.known:
            place = {version: at for at, version in enumerate(self.known[kind])}
            found = [one for one in found if one[1] in place or one[2]["run_id"] == self.run_id]
            return sorted(found, key=lambda one: place.get(one[1], len(place)))
        if any("training" in facts for _, _, facts in found):
            trainings = self.trainings()
            found = [one for one in found if one[2].get("training", ...) in (..., trainings.get(one[0]))]
        return found

    def _complete(self, kind: str) -> list[tuple[date, str, dict[str, Any]]]:
        """All complete artifacts up to the run date, as `trained` orders them."""
        found = []
        for name in Staging(self.lake.path(f"_artifacts/{kind}")).children():
            artifact = self.artifact(kind, name)
            if artifact.is_complete():
                facts = artifact.facts()
                trained_on = date.fromisoformat(facts["trained_on"])
                if trained_on <= self.run_date:
                    found.append((trained_on, name, facts))
        return sorted(found, key=lambda one: (one[0], one[2].get("nth", 0), one[1]))

    def trained_since(self) -> bool:
        """Another run has trained since this one was opened: one that is opened now would choose from others."""
        now = replace(self, known={})
        return any(
            [version for _, version, _ in now.trained(kind)] != [version for _, version, _ in self.trained(kind)]
            for kind in self.known
        )

    def trainings(self) -> dict[date, str]:
        """Date -> id of its newest finished training run."""
        rows = self.lake.read("runs", columns=["refresh_date", "run_id", "sequence", "stage"]).to_pylist()
        finished = {row["run_id"] for row in rows if row["stage"] == TRAINING_STAGES[-1]}
        begun = [row for row in rows if row["stage"] == _opening(True) and row["run_id"] in finished]
        return {row["refresh_date"]: row["run_id"] for row in sorted(begun, key=lambda row: row["sequence"])}

    def nth(self, kind: str) -> int:
        """The number of an artifact of `kind` that is trained on this date now: the newest of a date has the highest. 0 where
        another run has trained on this date since this one was opened: what that one read is newer.
        """
        known = self.known.get(kind, ())
        of_date = [(version, facts) for day, version, facts in self._complete(kind) if day == self.run_date]
        if kind in self.known and any(v not in known and facts["run_id"] != self.run_id for v, facts in of_date):
            return 0
        return 1 + max((facts.get("nth", 0) for _, facts in of_date), default=0)

    def renew(self, kind: str, version: str) -> None:
        """Let a complete artifact of this date be its newest: what was trained since was trained on data that are gone again."""
        artifact, nth = self.artifact(kind, version), self.nth(kind)
        if artifact.facts().get("nth", 0) < nth - 1:
            artifact.complete({**artifact.facts(), "nth": nth})

    def record(self, stage: str, counts: dict[str, Any], seconds: float, output_versions: dict[str, int]) -> None:
        """Add the row of a completed stage to `runs`, once."""
        row = _row(self, stage, "complete", counts, seconds, output_versions)
        self.lake.commit("runs", row, app=f"runs/{self.run_id}/{stage}", lineage={"run_id": self.run_id})

    def refused(self) -> bool:
        """A stage ended with a ContractError, and has not been run since."""
        return any(self.staging(stage).is_refused() for stage in STAGES)

    def recorded(self) -> dict[str, dict[str, Any]]:
        """Stage -> facts, of the stages that `runs` knows to be complete."""
        rows = self.lake.read("runs", refresh_date=self.run_date).to_pylist()
        own = (r for r in rows if r["run_id"] == self.run_id and r["status"] == "complete")
        return {r["stage"]: json.loads(r["counts"]) for r in own}

    def done(self, last: str) -> dict[str, dict[str, Any]]:
        """Stage -> facts, of the stages that need not run: what `runs` knows of a finished run (its `last` stage is complete),
        and otherwise what is also still there to be read.
        """
        found = self.recorded()
        if last in found:
            return found
        return {stage: facts for stage, facts in found.items() if self.staging(stage).is_complete()}


def _row(
    run: Run, stage: str, status: str, counts: dict[str, Any], seconds: float, output_versions: dict[str, int]
) -> pa.Table:
    values = {
        "refresh_date": run.run_date,
        "run_id": run.run_id,
        "sequence": run.sequence,
        "stage": stage,
        "status": status,
        "input_versions": json.dumps(run.input_versions, sort_keys=True),
        "output_versions": json.dumps(output_versions, sort_keys=True),
        "conf_hash": run.conf_hash,
        "code_version": code_version(),
        "counts": json.dumps(counts, sort_keys=True, default=str),
        "seconds": seconds,
        "seed": run.settings.seed,
    }
    return pa.Table.from_pylist([values])


def code_version() -> str:
    return version("cold-refresh")


def input_tables(settings: Settings) -> dict[str, str]:
    """Our name of each input table -> its name or URI in the lake."""
    tables = {"interactions": settings.inputs.interactions.table, "items": settings.inputs.items.table}
    if settings.snapshot.split is not None:
        tables["split"] = settings.snapshot.split.table
    return tables


def find_run(settings: Settings, run_date: date, *, training: bool = False) -> tuple[Run | None, Run]:
    """The run of `run_date` to go on with, if there is one, and the new one that would be opened otherwise.

    A run is gone on with if it was begun with these settings and this code and its input tables have not changed since, or
    if it is neither finished nor refused and the versions that it pinned are there still. One that was refused is not gone on
    with once another run has trained, either. Training runs and refreshes of a date do not see each other: a refresh that was
    killed is gone on with although a training run was opened since.

    Raises:
        jobs.lake.LakeError: an input table is missing.
    """
    lake = Lake(settings.lake, settings.storage_options)
    pins = {name: lake.pin(table) for name, table in input_tables(settings).items()}
    current, ids = {name: pin[0] for name, pin in pins.items()}, {name: pin[1] for name, pin in pins.items()}
    # Where the date's rows were deleted since, the table still knows how often it was begun. Asked first: what another driver
    # begins meanwhile is among the rows.
    (begins,) = lake.sequences("runs", [_app(_opening(training), run_date)])
    begun = _begun(settings, run_date, training=training)
    existing = _of(settings, run_date, begun[-1:])
    sequence = max(begun[-1]["sequence"] + 1 if begun else 1, begins)
    if existing is not None:
        last = TRAINING_STAGES[-1] if training else STAGES[-1]
        if (existing.input_versions, existing.table_ids) != (current, ids):
            given_up = last in existing.recorded() or existing.refused() or not _pinned(existing)
        else:
            given_up = existing.refused() and existing.trained_since()
        existing = None if given_up else existing
    opening, conf_hash = _opening(training), settings.digest()
    facts = json.dumps([opening, run_date.isoformat(), conf_hash, code_version(), current, sequence], sort_keys=True)
    run_id = f"{run_date:%Y%m%d}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
    return existing, Run(settings, run_date, run_id, sequence, current, conf_hash, ids)


def _pinned(run: Run) -> bool:
    """The versions that the run pinned can be read, and are of the tables that they were of."""
    tables = input_tables(run.settings)
    try:
        pins = {name: run.lake.pin(tables[name], version)[1] for name, version in run.input_versions.items()}
    except LakeError:
        return False
    return pins == run.table_ids


def has_its_inputs(run: Run) -> bool:
    """The versions that the run pinned when it was opened are still there, in the same tables: its snapshot can be made again."""
    rows = run.lake.read("runs", refresh_date=run.run_date).to_pylist()
    opened = [r for r in rows if r["run_id"] == run.run_id and r["stage"] in (_opening(False), _opening(True))]
    return any(_pinned(replace(run, table_ids=json.loads(row["counts"])["table_ids"])) for row in opened)


def begun_run(settings: Settings, run_date: date, *, training: bool = False) -> Run:
    """The newest run of `run_date` with these settings and this code, whatever has become of its input tables and whoever has
    begun another since: what a single later stage belongs to.

    Raises:
        SettingsError: there is none.
    """
    begun = _begun(settings, run_date, training=training)
    found = _of(settings, run_date, begun)
    if found is None:
        why = "was begun with other settings or other code" if begun else "is not there: its first stage begins it"
        raise SettingsError(
            f"the {'training' if training else 'run'} of {run_date} {why}; start with stage {STAGES[0]}"
        )
    return found


def _opening(training: bool) -> str:
    return "open_training" if training else "open"


def _app(opening: str, run_date: date) -> str:
    """The transaction whose number is the sequence of a date's newest run."""
    return f"runs/{opening}/{run_date}"


def _begun(settings: Settings, run_date: date, *, training: bool) -> list[dict[str, Any]]:
    """The opening rows of the runs of `run_date`, oldest first."""
    rows = Lake(settings.lake, settings.storage_options).read("runs", refresh_date=run_date).to_pylist()
    return sorted((r for r in rows if r["stage"] == _opening(training)), key=lambda r: r["sequence"])


def _of(settings: Settings, run_date: date, begun: list[dict[str, Any]]) -> Run | None:
    """The newest of the runs `begun` that has these settings and this code."""
    own = [r for r in begun if (r["conf_hash"], r["code_version"]) == (settings.digest(), code_version())]
    if not own:
        return None
    row = own[-1]
    pinned, opened = json.loads(row["input_versions"]), json.loads(row["counts"])
    more = (opened["table_ids"], opened.get("known", {}))
    return Run(settings, run_date, row["run_id"], row["sequence"], pinned, row["conf_hash"], *more)


def open_run(settings: Settings, run_date: date, *, training: bool = False) -> Run:
    """The run of `run_date` to go on with (see `find_run`), or a new one, whose input versions and models
    to choose from are pinned in `runs`.

    Raises:
        jobs.lake.LakeError: an input table is missing.
    """
    while True:
        existing, new = find_run(settings, run_date, training=training)
        if existing is not None:
            return existing
        known = {kind: [version for _, version, _ in new.trained(kind)] for kind in _CHOSEN}
        # Two drivers that start at once agree through this transaction: one row wins, and the other reads it.
        opening = _opening(training)
        row = _row(new, opening, "started", {"table_ids": new.table_ids, "known": known}, 0.0, {})
        app, lineage = _app(opening, run_date), {"run_id": new.run_id}
        new.lake.commit("runs", row, app=app, sequence=new.sequence, lineage=lineage)


Stage = Callable[[Run, Staging], dict[str, Any]]


def execute(run: Run, name: str, stage: Stage | None = None) -> dict[str, Any]:
    """Run a stage (`jobs.<name>.run` if none is given) unless it is complete; its facts either way.

    A stage is `run(run, out) -> facts`: it leaves its tables in `out`, and its facts (JSON: row counts, versions, ...)
    go into the manifest and into `runs`.

    Raises:
        StagingError: another process has begun the stage meanwhile.
    """
    out = run.staging(name)
    if out.is_complete():
        log(f"[{name}] complete already: skipped")
        facts = out.facts()
    else:
        log(f"[{name}] started")
        attempt = out.claim()
        begun = time.perf_counter()
        try:
            # Its engine is imported when it runs: a process that needs no Spark starts none.
            facts = (stage or import_module(f"jobs.{name}").run)(run, out)
        except ContractError as error:
            out.refuse(str(error))
            raise
        facts = {**facts, "seconds": round(time.perf_counter() - begun, 3)}
        if not out.is_claimed(attempt):
            raise StagingError(
                f"[{name}] another process has begun this stage of run {run.run_id} since, and removed what this one left: "
                "let it end, then start this one again"
            )
        out.complete(facts)
        brief = {k: v for k, v in facts.items() if not isinstance(v, dict | list)}
        log(f"[{name}] done: {json.dumps(brief, default=str)}")
    run.record(name, facts, facts["seconds"], facts.get("output_versions", {}))
    return facts
