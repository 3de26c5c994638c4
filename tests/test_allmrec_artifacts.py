"""jobs/allmrec_artifacts.py: which trained part a run takes."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

from jobs import allmrec_artifacts, run
from jobs.allmrec_artifacts import Training
from jobs.run import Run
from tests.staged_night import run_of

DAY = date(2026, 3, 1)
OF = {"conf": "a"}


def _train(night: Run, identity: dict[str, str] = OF) -> str:
    def fit(training: Training) -> dict[str, Any]:
        training.artifact.write_bytes("config.json", b"{}")
        return {}

    return allmrec_artifacts.train(night, "alignments", identity, None, (), fit, here=True)


def test_the_newest_part_up_to_the_run_date_is_taken_and_none_of_later_ones(tmp_path: Path) -> None:
    nights = [run_of(tmp_path, DAY + timedelta(days=days)) for days in range(-1, 5)]
    early, late = _train(nights[1]), _train(nights[3])
    _train(nights[4], {"conf": "b"})
    found = [allmrec_artifacts.newest(night, "alignments", OF) for night in nights]
    assert found == [None, early, early, late, late, late]


def test_a_training_run_of_a_date_supersedes_what_was_trained_on_that_date_before(tmp_path: Path) -> None:
    def trained(number: int) -> None:
        training = run_of(tmp_path, DAY, number)
        opened = run._row(training, "open_training", "started", {}, 0.0, {})
        training.lake.commit("runs", opened, app=f"runs/open_training/{number}")
        assert allmrec_artifacts.newest(night, "alignments", OF) is not None  # it has only begun
        training.record(run.TRAINING_STAGES[-1], {}, 0.0, {})

    before, night = run_of(tmp_path, DAY - timedelta(days=1)), run_of(tmp_path, DAY + timedelta(days=1))
    older, wrong = _train(before), _train(run_of(tmp_path, DAY), OF)
    trained(2)
    assert allmrec_artifacts.newest(night, "alignments", OF) == older  # which is of another date
    assert _train(run_of(tmp_path, DAY, 3)) == wrong  # the data were right: it is not trained again, and counts again
    assert allmrec_artifacts.newest(night, "alignments", OF) == wrong
    trained(4)
    assert allmrec_artifacts.newest(night, "alignments", OF) == older


def test_a_part_that_is_as_old_as_the_days_is_not_taken(tmp_path: Path) -> None:
    nights = [run_of(tmp_path, DAY + timedelta(days=days)) for days in range(-1, 4)]
    part = _train(nights[1])
    found = [allmrec_artifacts.newest(night, "alignments", OF, days=2) for night in nights]
    assert found == [None, part, part, None, None]
