"""The quality benchmark measures what a night measures of itself, and does not measure it twice."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmark import quality
from jobs.benchmark.datasets import DataSet
from jobs.benchmark.quality_rows import ROWS, overrides
from jobs.lake import Lake
from jobs.settings import load
from tests.small_lake import SmallLake

ROW_NAMES = ["FilterLLM", "random", "popularity", "CF on warm", "TF-IDF"]


def test_the_figures_are_those_of_the_night(
    undisturbed: tuple[SmallLake, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spark: Any
) -> None:
    lake = undisturbed[0]
    monkeypatch.setattr(quality, "DATA_SETS", {"small": DataSet("small", str(lake.conf), lake.run_date)})
    monkeypatch.setattr(quality, "lake_of", lambda data, work: str(lake.lake))
    args = argparse.Namespace(
        dataset=["small"], seeds=[3], rows=ROW_NAMES, encoder=[], overrides=[], run_date=None, work=str(tmp_path)
    )
    result = quality.run(args)
    found = {name: one[0]["test"] for name, one in result["results"]["small"].items()}

    # The same settings and inputs: the night that is there is gone on with, and its own metrics say the same.
    metrics = Lake(str(lake.lake), {}).read("metrics").to_pylist()
    recorded = {(r["system"], f"{r['split']} {r['metric']}"): r["value"] for r in metrics if "@10" in r["metric"]}
    for name in ("cold ndcg@10", "cold recall@10"):  # later events are of new items only
        assert found["FilterLLM"][name] == pytest.approx(recorded["published", name], abs=1e-9)
        assert found["popularity"][name] == pytest.approx(recorded["popularity", name], abs=1e-9)
    assert found["FilterLLM"]["distribution ndcg@10"] == pytest.approx(
        recorded["distribution", "cold ndcg@10"], abs=1e-9
    )

    assert found["CF on warm items only"]["cold ndcg@10"] == 0.0
    assert (
        found["TF-IDF ridge to the CF space"]["cold ndcg@10"] > found["random"]["cold ndcg@10"] + 0.2
    )  # the texts name the topics
    assert [row[0] for row in result["tables"][0]["rows"]] == list(found)

    def nothing(*given: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(quality, "measure", nothing)
    assert quality.run(args) == result
    args.rows = ["no such row"]
    with pytest.raises(quality.ColdRefreshError, match="no such row"):
        quality.run(args)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_a_setting_of_the_confs(row: quality.Row) -> None:
    assert (overrides(row, {}) is None) == bool(row.encoders)
    given = overrides(row, dict.fromkeys(row.encoders, "/some/folder"))
    for conf in ("conf/citeulike.yaml", "conf/amazon.yaml"):
        plain, changed = load(conf), load(conf, given)
        assert (plain.digest() == changed.digest()) == (not row.overrides)
