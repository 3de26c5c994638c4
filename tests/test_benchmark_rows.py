"""The rows of the quality and LLMInit benchmarks: their settings, encoders that are named, and curves over the dimensions."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jobs import plots
from jobs.benchmark import datasets, llminit, llminit_rows
from jobs.benchmark.choice import Row, chosen, encoders
from jobs.benchmark.datasets import DATA_SETS, DataSet
from jobs.benchmark.quality_rows import ROWS
from jobs.benchmark.quality_rows import rows as quality_rows
from jobs.settings import Settings, load
from schemas.errors import ColdRefreshError
from udfs.llm_init import LLMInit, text_map


def _curve(tmp_path: Path, **given: Any) -> argparse.Namespace:
    usual = {"dataset": ["amazon-toys"], "seeds": [1, 2], "rows": None, "protocols": ["all"], "curve": [32, 64]}
    usual |= {"conf": None, "encoder": [], "patience": 10, "look": 2, "overrides": []}
    return argparse.Namespace(**usual | given, work=str(tmp_path), out=str(tmp_path))


def test_the_curve_is_drawn_as_far_as_texts_are_wide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llminit, "lake_of", lambda data, work: "lake")
    source = SimpleNamespace(texts=lambda settings: np.eye(768 if settings.text.model == "/wide" else 384))
    monkeypatch.setattr(llminit, "Source", lambda data, lake: source)
    monkeypatch.setattr(llminit, "divide", lambda source, protocol, seed: None)

    def trained(settings: Settings, source: Any, *given: Any) -> dict[str, Any]:
        if settings.cf.init == "llminit":
            options = LLMInit(**settings.cf.llminit.model_dump())
            text_map(
                source.texts(settings),
                np.arange(len(source.texts(settings))),
                settings.cf.dimension,
                options,
                settings.seed,
            )
        test = {f"all {metric}": settings.cf.dimension / 1000 for metric in llminit._METRICS}
        return {"test": test, "epoch": 3, "epochs": 5, "seconds": 1.0}

    monkeypatch.setattr(llminit, "measure", trained)
    starts = ["random", "LLMInit random", "LLMInit uniform", "LLMInit variance", "LLMInit PCA"]
    result = llminit.run(_curve(tmp_path))
    assert [row[0] for row in result["tables"][0]["rows"]] == [
        f"{start}, d = {d}" for start in starts for d in (32, 64)
    ]
    text = (tmp_path / "llminit_curve_amazon-toys.svg").read_text()
    assert all(f">{word}</text>" in text for word in (*starts, "dimensions", "64"))

    args = _curve(tmp_path, curve=[64, 768], encoder=["broad=/wide"], rows=["random", "LLMInit PCA"], seeds=[1])
    result = llminit.run(args)
    assert [row[0] for row in result["tables"][0]["rows"]] == [
        "random, d = 64", "random, d = 768", "LLMInit PCA, d = 64", "LLMInit PCA, broad, d = 64", "LLMInit PCA, broad, d = 768",
    ]  # fmt: skip
    assert "LLMInit PCA, d = 768: left out, LLMInit: cf.dimension is 768" in capsys.readouterr().err
    assert "LLMInit PCA, broad" in (tmp_path / "llminit_curve_amazon-toys_broad.svg").read_text()
    assert (tmp_path / "llminit_curve_amazon-toys.svg").read_text() == text


def test_as_many_curves_as_there_are_have_a_line_each() -> None:
    names = [f"start {number}" for number in range(12)]
    text = plots.curves({name: [(32.0, 0.1), (64.0, 0.2)] for name in names}, "d", "ndcg")
    assert all(f">{name}</text>" in text for name in names)


def test_all_of_the_text_is_as_wide_as_the_encoder_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = {"minilm": 384, "/wide": 768, "/mine": 96}
    source: Any = SimpleNamespace(texts=lambda settings: np.zeros((2, widths[settings.text.model])))
    monkeypatch.setattr(llminit, "divide", lambda source, protocol, seed: None)
    monkeypatch.setattr(llminit, "measure", lambda settings, *given: {"dimension": settings.cf.dimension})
    by_name = {row.name: row for row in llminit_rows.rows({"broad": "/wide"})}

    def dimension(name: str, *overrides: str) -> int:
        args = _curve(tmp_path, overrides=list(overrides))
        found: int = llminit._cell(by_name[name], source, DATA_SETS["amazon-toys"], "lake", 1, args)["all"]["dimension"]
        return found

    assert dimension("LightGCN, LLMInit full") == 384
    assert dimension("LightGCN, LLMInit full", "text.model=/mine") == 96
    assert dimension("LightGCN, LLMInit full, broad") == 768
    assert dimension("LightGCN, LLMInit PCA, broad") == 128


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["mpnet"], r"'mpnet': give NAME=FOLDER"),
        (["=./folder"], "give NAME=FOLDER"),
        (["mpnet="], "give NAME=FOLDER"),
        (["a=./x", "a=./y"], r"a is given twice, as \./x and as \./y"),
    ],
)
def test_an_encoder_that_is_not_named_or_nowhere_is_said(given: list[str], message: str) -> None:
    with pytest.raises(ColdRefreshError, match=message):
        encoders(given)


def test_encoders_are_rows_by_the_name_they_are_given() -> None:
    others = encoders(["broad=/some/a=b", "mine=./c"])
    assert others == {"broad": "/some/a=b", "mine": "./c"}
    names = [row.name for row in llminit_rows.rows(others)]
    assert chosen(["LightGCN, LLMInit variance, mine"], names) == ["LightGCN, LLMInit variance, mine"]
    names = [row.name for row in quality_rows(others)]
    assert chosen(["broad", "MiniLM + mine"], names) == ["broad", "MiniLM + mine"]
    with pytest.raises(ColdRefreshError, match=r"two rows each called \['MiniLM \+ words'\]"):
        chosen(None, [row.name for row in quality_rows({"MiniLM": "./c"})])
    with pytest.raises(ColdRefreshError, match=r"two rows each called \['LightGCN, LLMInit variance, raw'\]"):
        chosen(None, [row.name for row in llminit_rows.rows({"raw": "./c"})])


def test_any_folder_of_the_data_folder_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLD_REFRESH_DATA", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "interactions.parquet").touch()

    def named(name: str, conf: str | None = None) -> DataSet:
        (data,) = datasets.chosen(argparse.Namespace(dataset=[name], conf=conf))
        return data

    assert (named("mine").conf, named("mine").split_seed) == ("conf/amazon.yaml", datasets.SPLIT_SEED)
    by_time = named("mine", "conf/demo.yaml")
    assert (by_time.conf, by_time.split_seed, by_time.split) == ("conf/demo.yaml", None, "split as it comes or by time")
    assert named("citeulike-a", "conf/citeulike.yaml") == DATA_SETS["citeulike-a"]
    with pytest.raises(ColdRefreshError, match=r"yours holds no interactions\.parquet"):
        named("yours")
    with pytest.raises(ColdRefreshError, match="the name of a folder"):
        named("../mine")


def test_a_curve_is_of_all_users(tmp_path: Path) -> None:
    with pytest.raises(ColdRefreshError, match="--curve is of all users"):
        llminit.run(_curve(tmp_path, protocols=["cold_users"]))


@pytest.mark.parametrize("row", llminit_rows.rows({"broad": "/some/folder"}), ids=lambda row: row.name)
def test_every_llminit_row_is_a_setting_of_the_confs(row: Row) -> None:
    found = load("conf/amazon.yaml", row.settings())
    assert found.cf.model in ("bpr", "lightgcn", "sgl", "sgcl")
    assert found.cf.init == ("llminit" if "LLMInit" in row.name else "random")
    assert found.text.model == (
        "/some/folder" if "broad" in row.name else "smollm2" if "SmolLM2" in row.name else "minilm"
    )
    assert found.cf.learning_rate == (0.001 if found.cf.model == "sgcl" else 0.005)
    given = row.settings(["cf.learning_rate=0.02"])
    assert load("conf/amazon.yaml", given).cf.learning_rate == 0.02


@pytest.mark.parametrize("row", quality_rows({"broad": "/some/folder"}), ids=lambda row: row.name)
def test_every_row_is_a_setting_of_the_confs(row: Row) -> None:
    given = row.settings()
    assert ("/some/folder" in "".join(given)) == ("broad" in row.name)
    confs = ("conf/citeulike.yaml", "conf/amazon.yaml")
    assert any(load(conf).digest() != load(conf, given).digest() for conf in confs) == bool(row.overrides)


@pytest.mark.parametrize("model", ["BPR", "LightGCN", "SGL", "SGCL"])
@pytest.mark.parametrize(
    ("start", "select"),
    [
        ("", None), (" from LLMInit", "variance"), (" from LLMInit, PCA", "pca"),
        (" from LLMInit, random", "random"), (" from LLMInit, uniform", "uniform"),
    ],
)  # fmt: skip
def test_every_backbone_has_its_own_settings_from_every_start(model: str, start: str, select: str | None) -> None:
    row = next(row for row in ROWS if row.name == f"CF: {model}{start}")

    def given(*overrides: str) -> Settings:
        return load("conf/citeulike.yaml", row.settings(overrides))

    one = given()
    assert (one.cf.model, one.cf.dimension, one.cf.epochs, one.refresh.scale) == (model.lower(), 64, 40, "auto")
    assert (one.cf.learning_rate, one.cf.batch_size) == (0.001 if model == "SGCL" else 0.005, 2048)
    assert (one.cf.init, one.cf.llminit.select if select else None) == ("llminit" if select else "random", select)
    # What is tuned can be changed, what a row is cannot.
    other = given("cf.learning_rate=0.02", "cf.epochs=3", "refresh.scale=2")
    assert (other.cf.model, other.cf.learning_rate, other.cf.epochs, other.refresh.scale) == (
        model.lower(), 0.02, 3, 2,
    )  # fmt: skip
    for key in ("cf.model=als", "seed=8", "lake=elsewhere", "evaluate.part=val"):
        with pytest.raises(ColdRefreshError, match=f"--set {key}: the"):
            given(key)


def test_the_papers_union_is_of_twenty_users_that_count_alike() -> None:
    by_name = {row.name: load("conf/citeulike.yaml", row.overrides) for row in ROWS if "retrained" in row.name}
    ours, papers = by_name.values()
    assert [("the paper's" in name) for name in by_name] == [False, True]
    assert ours.refresh.method == papers.refresh.method == "retrain"
    assert (ours.sampling.k, ours.refresh.by_probability) == (100, True)
    assert (papers.sampling.k, papers.refresh.by_probability) == (20, False)


def test_what_lora_changes_can_be_seen() -> None:
    frozen, lora = (
        load("conf/citeulike.yaml", row.settings()) for row in ROWS if row.name in ("frozen, six epochs", "LoRA")
    )
    assert frozen.filterllm.epochs == 6
    assert lora == frozen.model_copy(update={"filterllm": frozen.filterllm.model_copy(update={"lora": True})})
