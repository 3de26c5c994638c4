"""jobs/benchmark/judgment.py: the command over the data folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.benchmark import judgment
from schemas.errors import ColdRefreshError

CEILINGS = {"float32 FLOP/s": 1e9, "memory bytes/s": 1e8}


def test_speed_is_measured_for_every_way(small_model: Path) -> None:
    try:
        judgment.filter_folder()
    except ColdRefreshError as error:
        pytest.skip(str(error))
    found = judgment.measure_speed(3, ceilings=CEILINGS, model=str(small_model), history=2, dtype="float32", rounds=2)
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
    # Two rounds, one batch of titles each; a judge needs more passes than that.
    passes = found["passes_an_item"]
    assert passes["distribution"] == pytest.approx(2 / 3)
    assert all(passes[way] > passes["distribution"] for way in ways[2:])
    rows = found["tables"][0]["rows"]
    assert len(rows) == 5
    # Of the small model's 17 thousand weights of layers; its head is not one of them.
    weights = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    for (way, *_, matmul, memory), seconds in zip(rows, found["seconds_an_item"].values(), strict=True):
        assert matmul == pytest.approx(2 * weights * found["tokens_an_item"][way] / seconds / 1e9)
        assert memory == pytest.approx(4 * weights * passes[way] / seconds / 1e8)


def test_without_the_data_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLD_REFRESH_DATA", str(tmp_path))
    for absent in ("interactions", "coldllm_filter"):
        with pytest.raises(ColdRefreshError, match=rf"{absent}\.parquet: name the data folder in COLD_REFRESH_DATA"):
            judgment.filter_folder()
        (tmp_path / "citeulike-a").mkdir(exist_ok=True)
        (tmp_path / "citeulike-a" / f"{absent}.parquet").touch()
