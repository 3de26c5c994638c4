"""jobs/benchmark/coldllm.py: both stages on items of four topics, and a judging that is stopped."""

from __future__ import annotations

from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.benchmark import coldllm
from tests.test_two_tower import SMALL, topics


def test_the_filter_keeps_users_of_the_topic_and_the_judge_scores_them(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, centres, indptr, indices = topics()
    cold_topics = np.repeat(np.arange(4), 3)
    rng = np.random.default_rng(5)
    states = np.concatenate([states, (centres[cold_topics] + 0.4 * rng.normal(size=(12, 10))).astype(np.float32)])
    cold = np.arange(60, 72)
    users = coldllm.candidates(states, indptr, indices, cold, 5, SMALL)
    assert users.shape == (12, 5)
    assert (users % 4 == cold_topics[:, None]).mean() > 0.9
    titles = [f"paper number {i}" for i in range(72)]
    options = coldllm.JudgeOptions(model=str(small_model), history=3, fit_users=10, fit_items=2)
    scores, facts = coldllm.judge(titles, indptr, indices, cold, users, options)
    assert scores.shape == (12, 5)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert len(np.unique(scores)) > 30
    assert (facts["pairs"], facts["fitted_pairs"]) == (60, 40)

    # Stopped amid the pairs and started again, it goes on behind what was judged, and ends the same.
    monkeypatch.setattr(coldllm, "_PART", 4)
    score, judged = coldllm.Judge.score, list[int]()

    def counted(*given: Any, stop_at: int) -> Any:
        if len(judged) == stop_at:
            raise KeyboardInterrupt
        judged.append(len(given[3]))
        return score(*given)

    monkeypatch.setattr(coldllm.Judge, "score", partialmethod(counted, stop_at=2))
    with pytest.raises(KeyboardInterrupt):
        coldllm.judge(titles, indptr, indices, cold, users, options, tmp_path)
    assert len(judged) == 2
    monkeypatch.setattr(coldllm.Judge, "score", partialmethod(counted, stop_at=-1))
    monkeypatch.setattr(coldllm, "fit_answer", lambda *given: pytest.fail("fitted again"))
    again, told = coldllm.judge(titles, indptr, indices, cold, users, options, tmp_path)
    assert sum(judged) == told["pairs"] == 60
    assert told["auc"] == facts["auc"]
    np.testing.assert_allclose(again, scores, atol=1e-5)
    monkeypatch.undo()
    as_it_comes = coldllm.JudgeOptions(model=str(small_model), history=3, fit_users=0)
    assert "auc" not in coldllm.judge(titles, indptr, indices, cold, users, as_it_comes)[1]
    tuned, _ = coldllm.judge(titles, indptr, indices, cold, users, replace(options, tune_steps=2))
    assert tuned.shape == scores.shape
    assert np.abs(tuned - scores).max() > 1e-4
