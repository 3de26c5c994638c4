"""Which run a command goes on with, and what of it need not run; a training run lives beside the night's own run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from deltalake import DeltaTable, write_deltalake

from jobs.cold_refresh import _tell_younger, plan, refresh
from jobs.run import STAGES, Run, begun_run, execute, find_run, open_run
from jobs.settings import SettingsError, load
from tests.small_lake import SmallLake


def test_a_training_run_and_the_night_of_a_date_do_not_see_each_other(small_lake: SmallLake) -> None:
    settings = load(small_lake.conf)
    night = open_run(settings, small_lake.run_date)
    training = open_run(settings.training(), small_lake.run_date, training=True)
    assert training.run_id != night.run_id
    # Both are unfinished, and each is gone on with, whichever was opened last.
    for options in ({}, {"training": True}):
        found, _ = find_run(settings.training() if options else settings, small_lake.run_date, **options)
        assert found is not None
        assert found.run_id == (training if options else night).run_id


def test_what_is_trained_does_not_depend_on_when_it_is_due(small_lake: SmallLake) -> None:
    settings = load(small_lake.conf)
    assert settings.training().cf.retrain_days == settings.training().filterllm.retrain_days == 0
    assert settings.training().digest("cf", "filterllm") == settings.digest("cf", "filterllm")
    other = load(small_lake.conf, ["cf.dimension=9"])
    assert other.digest("cf", "filterllm") != settings.digest("cf", "filterllm")


def _touch(lake: SmallLake) -> None:
    table = DeltaTable(str(lake.lake / "interactions")).to_pyarrow_table()
    write_deltalake(str(lake.lake / "interactions"), table.slice(0, 1), mode="append")


def test_a_later_stage_alone_belongs_to_the_run_that_was_begun(small_lake: SmallLake) -> None:
    settings, day = load(small_lake.conf), small_lake.run_date
    with pytest.raises(SettingsError, match=r"is not there.* start with stage snapshot"):
        begun_run(settings, day)
    run = open_run(settings, day)
    run.record(STAGES[-1], {}, 0.0, {})
    _touch(small_lake)
    assert begun_run(settings, day) == run
    assert find_run(settings, day)[0] is None  # the whole night would read what was added
    other = load(small_lake.conf, ["seed=4"])
    with pytest.raises(SettingsError, match="other settings"):
        begun_run(other, day)
    # Whoever tries other settings by hand meanwhile is not in the way of the night that is running.
    assert open_run(other, day).run_id != run.run_id
    assert begun_run(settings, day) == run


def test_a_stage_alone_needs_those_before_it(small_lake: SmallLake) -> None:
    settings = load(small_lake.conf)
    run = open_run(settings, small_lake.run_date)
    execute(run, "snapshot", lambda run, out: {})
    with pytest.raises(
        SettingsError, match=f"{run.run_id} text_embeddings, cf, filterllm_train must be complete first"
    ):
        refresh(settings, small_lake.run_date, "filterllm_score")


def test_what_was_removed_is_computed_again_until_the_run_is_finished(small_lake: SmallLake) -> None:
    settings, calls = load(small_lake.conf), []
    run = open_run(settings, small_lake.run_date)

    def stage(run: Any, out: Any) -> dict[str, Any]:
        calls.append(out.uri)
        return {"calls": len(calls)}

    for _ in range(2):
        execute(run, "snapshot", stage)
    assert len(calls) == 1
    run.staging("snapshot").clear()
    assert run.done(STAGES[-1]) == {}
    assert plan(settings, small_lake.run_date)["stages"][0]["run"] is True
    execute(run, "snapshot", stage)
    assert list(run.done(STAGES[-1])) == ["snapshot"]
    run.record(STAGES[-1], {}, 0.0, {})
    run.staging("snapshot").clear()
    assert set(run.done(STAGES[-1])) == {"snapshot", STAGES[-1]}


def _train(run: Run, version: str) -> None:
    """Leave a space, as stage cf of `run` would."""
    facts = {"trained_on": run.run_date.isoformat(), "run_id": run.run_id, "nth": run.nth("spaces")}
    run.artifact("spaces", version).complete(facts)


def _spaces(run: Run) -> list[str]:
    return [version for _, version, _ in run.trained("spaces")]


def test_a_run_that_is_started_again_chooses_from_what_was_trained_when_it_was_opened(small_lake: SmallLake) -> None:
    settings, day = load(small_lake.conf), small_lake.run_date
    _train(open_run(settings, day - timedelta(days=1)), "before")
    night = open_run(settings, day)
    training = open_run(settings.training(), day, training=True)
    _train(training, "meanwhile")
    again = open_run(settings, day)
    assert again == night
    assert _spaces(again) == _spaces(begun_run(settings, day)) == ["before"]
    assert _spaces(training) == ["before", "meanwhile"]
    # What it trains itself is chosen too, and does not outdo for later nights what was trained on newer data.
    _train(again, "alone")
    assert _spaces(open_run(settings, day)) == ["before", "alone"]
    assert _spaces(open_run(settings, day + timedelta(days=1))) == ["before", "alone", "meanwhile"]


def test_a_refused_run_is_given_up_once_another_run_has_trained(small_lake: SmallLake) -> None:
    settings, day = load(small_lake.conf), small_lake.run_date
    night = open_run(settings, day)
    _train(night, "refused")
    night.staging("gates").refuse("a space unlike the one before")
    assert open_run(settings, day) == night  # it alone has trained
    _train(open_run(settings.training(), day, training=True), "mended")
    anew = open_run(settings, day)
    assert anew.run_id != night.run_id
    assert _spaces(anew) == ["refused", "mended"]


def test_what_is_trained_for_a_date_before_a_younger_space_is_said_to_wait(
    small_lake: SmallLake, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, day = load(small_lake.conf), small_lake.run_date
    runs = [open_run(settings, day + timedelta(days=days)) for days in (0, 3)]
    for run, version, conf in zip([*runs, runs[1]], ("older", "younger", "other"), ("a", "a", "b"), strict=True):
        facts = {"trained_on": run.run_date.isoformat(), "run_id": run.run_id, "kind": "cf", "conf": conf}
        run.artifact("spaces", version).complete(facts)
    _tell_younger(runs[1], "younger")
    assert capsys.readouterr().err == ""
    _tell_younger(runs[0], "older")
    (line,) = capsys.readouterr().err.splitlines()
    assert f"nights from {day + timedelta(days=3)} on keep space younger" in line
