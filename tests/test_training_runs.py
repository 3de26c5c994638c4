"""A training run of a date lives beside the night's own run and leaves a space and model that the night finds."""

from __future__ import annotations

from jobs.run import find_run, open_run
from jobs.settings import load
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
    assert settings.training().cf.retrain_days == 1
    assert settings.training().digest("cf", "filterllm") == settings.digest("cf", "filterllm")
    other = load(small_lake.conf, ["cf.dimension=9"])
    assert other.digest("cf", "filterllm") != settings.digest("cf", "filterllm")
