"""jobs/allmrec_artifacts.py: which trained part a run takes."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

from jobs import allmrec_artifacts
from jobs.allmrec_artifacts import Training
from jobs.run import Run
from tests.staged_night import run_of

DAY = date(2026, 3, 1)
OF = {"conf": "a"}


def _train(run: Run, identity: dict[str, str] = OF) -> str:
    def fit(training: Training) -> dict[str, Any]:
        training.artifact.write_bytes("config.json", b"{}")
        return {}

    return allmrec_artifacts.train(run, "alignments", identity, None, (), fit, here=True)


def test_the_newest_part_up_to_the_run_date_is_taken_and_none_of_later_ones(tmp_path: Path) -> None:
    nights = [run_of(tmp_path, DAY + timedelta(days=days)) for days in range(-1, 5)]
    early, late = _train(nights[1]), _train(nights[3])
    _train(nights[4], {"conf": "b"})
    found = [allmrec_artifacts.newest(night, "alignments", OF) for night in nights]
    assert found == [None, early, early, late, late, late]


def test_a_part_that_is_as_old_as_the_days_is_not_taken(tmp_path: Path) -> None:
    nights = [run_of(tmp_path, DAY + timedelta(days=days)) for days in range(-1, 4)]
    part = _train(nights[1])
    found = [allmrec_artifacts.newest(night, "alignments", OF, days=2) for night in nights]
    assert found == [None, part, part, None, None]
