"""A-LLMRec's parts on a worker of Ray Train: what the driver would have trained."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from jobs import allmrec_alignment, allmrec_artifacts, cf
from jobs.run import Run, execute
from tests import staged_night
from tests.test_refresh import BPR

pytestmark = pytest.mark.usefixtures("one_thread")

DAY = date(2026, 3, 1)


def night(lake: Path, workers: int) -> Run:
    """A night up to the stage cf."""
    aligned = {"epochs": 3, "joint": 8, "stop_by": "loss"}
    ray = {"training_workers": workers, "cpus_per_actor": 0.5}
    run = staged_night.run_of(lake, DAY, 1 + workers, cf=BPR, ray=ray, allmrec={"alignment": aligned})
    pairs = staged_night.blocks()
    staged_night.snapshot(run, pairs, (), {item: [float(item[1]), 1.0] for _, item in pairs})
    execute(run, "cf", cf.run)
    return run


def aligned(run: Run) -> str:
    return allmrec_alignment.for_space(run, cf.load_space(run, run.staging("cf").facts()["space_version"]))


def test_a_worker_trains_what_the_driver_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # the lake's path is relative, and a worker's working folder is another one
    run = night(Path("lake"), 0)
    version = aligned(run)
    artifact = run.artifact("alignments", version)
    files, facts = allmrec_artifacts.files(run, "alignments", version), artifact.facts()
    artifact.clear()
    capsys.readouterr()
    # As many as FilterLLM may have: this takes one.
    other = night(Path("lake"), 5000)
    assert aligned(other) == version
    told = capsys.readouterr().err
    assert "[allmrec] 1 workers on cpu" in told
    assert "[allmrec] epoch 3/3: loss" in told
    assert allmrec_artifacts.files(run, "alignments", version) == files
    assert {**artifact.facts(), "run_id": run.run_id} == facts
    assert not run.artifact("checkpoints", version).children()
