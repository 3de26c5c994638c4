"""jobs/benchmark/judgment.py: ColdLLM's two stages on items of four topics, and the command over the data folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.benchmark import judgment
from schemas.errors import ColdRefreshError
from tests import small_llm
from tests.test_two_tower import SMALL, topics


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llm.build(tmp_path_factory.mktemp("small"))


def test_the_filter_keeps_users_of_the_topic_and_the_judge_scores_them(small: Path) -> None:
    states, centres, indptr, indices = topics()
    cold_topics = np.repeat(np.arange(4), 3)
    rng = np.random.default_rng(5)
    states = np.concatenate([states, (centres[cold_topics] + 0.4 * rng.normal(size=(12, 10))).astype(np.float32)])
    cold = np.arange(60, 72)
    users = judgment.candidates(states, indptr, indices, cold, 5, SMALL)
    assert users.shape == (12, 5)
    assert (users % 4 == cold_topics[:, None]).mean() > 0.9
    titles = [f"paper number {i}" for i in range(72)]
    options = judgment.JudgeOptions(model=str(small), history=3, fit_users=10, fit_items=2)
    scores, facts = judgment.judge(titles, indptr, indices, cold, users, options)
    assert scores.shape == (12, 5)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert len(np.unique(scores)) > 30
    assert (facts["pairs"], facts["fitted_pairs"]) == (60, 40)
    again, _ = judgment.judge(titles, indptr, indices, cold, users, options)
    np.testing.assert_array_equal(again, scores)
    as_it_comes = judgment.JudgeOptions(model=str(small), history=3, fit_users=0)
    assert "auc" not in judgment.judge(titles, indptr, indices, cold, users, as_it_comes)[1]


def test_speed_is_measured_for_every_way(small: Path) -> None:
    try:
        judgment.data_folder()
    except ColdRefreshError as error:
        pytest.skip(str(error))
    found = judgment.measure_speed(3, model=str(small), history=2, dtype="float32", rounds=2)
    assert json.loads(json.dumps(found)) == found
    assert (found["items"], found["k"]) == (3, 20)
    ways = ["distribution", "distribution, task in the prompt", "judgment", "judgment, shared prefix"]
    ways.append("judgment, shared prefix, question first")
    assert list(found["ratio"]) == list(found["tokens_an_item"]) == ways
    assert found["ratio"]["distribution"] == 1
    assert all(seconds > 0 for seconds in found["seconds_an_item"].values())
    # A judge reads K prompts where the distribution reads one title; a shared prefix saves some of it.
    tokens = found["tokens_an_item"]
    assert tokens["judgment"] > tokens["judgment, shared prefix"] > tokens[ways[-1]] > 20 * tokens["distribution"]
    assert found["pairs_of_shared"] >= 60
    assert len(found["tables"][0]["rows"]) == 5


def test_without_the_data_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLD_REFRESH_DATA", str(tmp_path))
    with pytest.raises(ColdRefreshError, match="COLD_REFRESH_DATA"):
        judgment.data_folder()
