"""The A-LLMRec benchmark: every row and scenario on a made-up shop, kept results, and the questions that are asked."""

from __future__ import annotations

import argparse
import gc
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from jobs.benchmark import allmrec, allmrec_cells, allmrec_data, allmrec_parts
from jobs.benchmark.allmrec_parts import Parts
from jobs.benchmark.allmrec_rows import ROWS, Options
from schemas.errors import ColdRefreshError
from tests import word_llm
from udfs.sequences import PADDING, Sequences

pytestmark = pytest.mark.usefixtures("one_thread")

ITEMS, USERS, TOPICS = 40, 60, 4
WORDS = ("tea", "yarn", "chess", "bicycle"), ("red", "old", "big", "new", "hot")
TITLES = [f"{WORDS[0][i % TOPICS]} {WORDS[1][i // 8]}" for i in range(ITEMS)]
ID_MODELS = [
    f"{on}{name}"
    for on in ("", "A-LLMRec on ", "stage 1 only, frozen encoder, on ")
    for name in ("NCF", "LightGCN", "ALS")
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets in which a user stays with a topic, and a language model that knows the titles' words."""
    folder = tmp_path_factory.mktemp("shop")
    for seed, name in enumerate(allmrec.DATA_SETS):
        rng = np.random.default_rng(seed)
        rows = []
        for user in range(USERS):
            items = rng.permutation(ITEMS // TOPICS)[: rng.integers(5, 9)] * TOPICS + user % TOPICS
            rows += [(f"u{user}", f"i{item:02}", place) for place, item in enumerate(items)]
        (folder / name).mkdir()
        events = pd.DataFrame(rows, columns=["user_id", "item_id", "seq"]).sample(frac=1, random_state=1)
        events.to_parquet(folder / name / "interactions.parquet")
        items = pd.DataFrame(
            {"item_id": [f"i{item:02}" for item in range(ITEMS)], "title": TITLES, "text": ["", *TITLES[1:]]}
        )
        items.to_parquet(folder / name / "items.parquet")
    word_llm.build(folder / "llm", TITLES)
    return folder


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Peak memory is measured behind a collection of garbage, which is slow among all that a test session has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def arguments(shop: Path, work: Path, *given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    allmrec.add_arguments(parser)
    sizes = {
        "test-users": 8, "cold-users": 5, "train-users": 4, "epochs": 1, "tuned-users": 4, "alignment-epochs": 1, "cf-epochs": 2,
        "dimension": 8, "history": 3, "model": shop / "llm", "text-model": shop / "llm", "work": work,
    }  # fmt: skip
    return parser.parse_args([*(part for name, value in sizes.items() for part in (f"--{name}", str(value))), *given])


def test_every_row_is_measured_once(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLD_REFRESH_DATA", str(shop))
    given = ("--dataset", "amazon-games", "--seeds", "7", "--few-shot", "16")
    args = arguments(shop, tmp_path, *given, "--scenarios", "all")
    result = allmrec.run(args)
    found = {name: one[0]["all"] for name, one in result["results"]["amazon-games"].items()}
    assert list(found) == [row.name for row in ROWS]
    for name, one in found.items():
        known = {"all", "warm items", "cold items", allmrec_data.SELDOM}
        assert set(one["users"]) == (known if name in ID_MODELS else known | {"cold users"})
        check(one)
    titles = [table["title"] for table in result["tables"]]
    assert titles == [f"A-LLMRec on amazon-games: {metric} among 20" for metric in allmrec_cells.METRICS]
    # What rows share is trained once, and what distinguishes them is not shared.
    assert parts(tmp_path) == {"backbone": 6, "alignment": 13, "tuned": 12, "reader": 19}
    # Rows with a reader read what is asked, those that weigh it the validation items too; two of these ask what others have asked.
    rankers = Counter(row.options(Options()).ranker for row in ROWS)
    readings = capsys.readouterr().err.count(": likelihoods [")
    assert readings == rankers["reader"] + 2 * rankers["reader with stage 1"] - 2

    monkeypatch.setattr(allmrec, "cell", lambda *given: pytest.fail("measured again"))
    assert allmrec.run(args) == result
    monkeypatch.setattr(allmrec, "cell", allmrec_cells.cell)
    capsys.readouterr()
    shutil.rmtree(tmp_path / "results")
    again = allmrec.run(arguments(shop, tmp_path, *given, "--scenarios", "all", "--rows", "A-LLMRec on NCF"))
    assert (
        again["results"]["amazon-games"]["A-LLMRec on NCF"][0]["all"]["figures"] == found["A-LLMRec on NCF"]["figures"]
    )
    # Another size of the test is another result, of the same parts.
    args = arguments(shop, tmp_path, *given, "--rows", "SASRec", "--scenarios", "all", "--test-users", "0")
    assert allmrec.run(args)["results"]["amazon-games"]["SASRec"][0]["all"]["users"]["all"] > 8
    assert "epoch" not in capsys.readouterr().err

    # Few users know no user by number; random, LLM and encoder learn nothing from them; CF knows no other domain.
    few, across = "few-shot 16", "cross-domain"
    applies = {
        "random": {across}, "popularity": set(), "SASRec": {few}, "LightGCN": set(), "LLM only": {across},
        "LLM only, candidates not named": {across}, "text encoder only": {across}, "stage 1 only": {few, across},
        "A-LLMRec": {few, across}, "A-LLMRec on NCF": set(),
    }  # fmt: skip
    args = arguments(shop, tmp_path, *given, "--scenarios", "few-shot", "cross-domain", "--rows", *applies)
    for name, seeded in allmrec.run(args)["results"]["amazon-games"].items():
        assert {group for one in seeded[0].values() for group in one["users"]} == applies[name], name
        for one in seeded[0].values():
            check(one)
    # Another domain needs no training.
    assert parts(tmp_path) == {"backbone": 7, "alignment": 14, "tuned": 13, "reader": 20}


def parts(work: Path) -> dict[str, int]:
    kinds = Counter(path.name.split("-")[0] for path in (work / "parts" / "amazon-games").iterdir())
    return {kind: count for kind, count in kinds.items() if kind not in ("texts", "likelihoods")}


def check(one: dict[str, Any]) -> None:
    """A cell's figures lie where they can."""
    assert one["seconds"] >= 0
    assert one["memory"] >= 0
    for group, users in one["users"].items():
        hit, ndcg, hr = (one["figures"][f"{group} {metric}"] for metric in allmrec_cells.METRICS)
        assert 0 <= hit <= ndcg <= hr <= 1
        assert 0 < users <= 8


def test_an_unknown_row_is_an_error(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(ColdRefreshError, match=r"no such row.*SASRec"):
        allmrec.run(arguments(shop, tmp_path, "--rows", "SASRec", "no such row"))


def test_events_of_another_data_set_are_in_the_order_of_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLD_REFRESH_DATA", str(tmp_path))
    (tmp_path / "mine").mkdir()
    pd.DataFrame({"item_id": ["a", "b", "c"], "title": list("ABC")}).to_parquet(tmp_path / "mine" / "items.parquet")
    events = pd.DataFrame({"user_id": [1, 1, 1], "item_id": ["a", "b", "c"]})
    events.assign(event_time=pd.to_datetime(["2026-01-02", "2026-01-03", "2026-01-01"])).to_parquet(
        tmp_path / "mine" / "interactions.parquet"
    )
    corpus = allmrec_data.read("mine")
    assert (corpus.texts, corpus.histories.items.tolist()) == (["A", "B", "C"], [2, 0, 1])
    events.to_parquet(tmp_path / "mine" / "interactions.parquet")
    with pytest.raises(ColdRefreshError, match="neither seq nor event_time"):
        allmrec_data.read("mine")


def test_what_is_asked(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLD_REFRESH_DATA", str(shop))
    data = allmrec_data.read("amazon-beauty")
    assert len(data.titles) == ITEMS
    division = allmrec_data.divide(data, None, 7, 0, 5)
    train, asked = division.split.train, division.asked
    left_out = asked.users[asked.groups["cold users"]]
    assert len(left_out) == 5
    assert not train.lengths[left_out].any()
    assert np.isin(data.histories.lengths[left_out], 5).all()
    for row, user in enumerate(asked.users):
        whole = data.histories.take(np.array([user])).items
        before = asked.histories.take(np.array([row])).items
        known = 2 if user in left_out else len(whole) - 1
        assert list(before) == list(whole[:known])
        assert asked.candidates[row, 0] == whole[known]
        assert not np.isin(asked.candidates[row, 1:], whole).any()
        assert len(set(asked.candidates[row])) == 20
    truth, counts = asked.candidates[:, 0], np.bincount(train.items, minlength=ITEMS)
    assert division.text_side.sum() == int(0.35 * ITEMS)
    assert counts[division.text_side].max() <= counts[~division.text_side].min()
    np.testing.assert_array_equal(asked.groups["cold items"][:-5], division.text_side[truth[:-5]])
    assert counts[truth[asked.groups["warm items"]]].min() >= np.median(counts)
    of_all = np.bincount(data.histories.items, minlength=ITEMS)
    few_of_all = of_all[truth[:-5]] <= np.sort(of_all)[int(0.35 * ITEMS) - 1]
    seldom = asked.groups[allmrec_data.SELDOM][:-5]
    assert seldom.any()
    assert (few_of_all | ~seldom).all()
    assert (seldom | (of_all[truth[:-5]] >= np.sort(of_all)[int(0.35 * ITEMS) - 1])).all()

    few = allmrec_data.divide(data, 16, 7, 0, 5)
    assert (few.split.train.lengths > 0).sum() == (few.split.validation != PADDING).sum() == 16
    assert few.text_side.all()
    np.testing.assert_array_equal(few.asked.candidates, asked.candidates[:-5])
    another = allmrec_data.divide(data, 16, 8, 0, 5)
    assert (another.split.train.indptr != few.split.train.indptr).any()
    np.testing.assert_array_equal(another.asked.candidates, few.asked.candidates)


def test_what_is_trained_finds_the_topic_and_each_weight_is_of_its_own_score(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLD_REFRESH_DATA", str(shop))
    data = allmrec_data.read("amazon-beauty")
    division = allmrec_data.divide(data, None, 7, 0, 5)

    def figures(ranker: Any, *, nearest: bool = False) -> dict[str, float]:
        options = Options(
            ranker=ranker,
            tuned=False,
            dimension=16,
            cf_epochs=60,
            alignment_epochs=60,
            text_model=str(shop / "llm"),
            nearest=nearest,
        )
        found = allmrec_cells.cell(options, tmp_path, data, division, 7, "all", None)
        assert found is not None
        return found["figures"]

    floor = figures("random")["all NDCG@10"]
    for ranker in ("backbone", "stage 1", "stage 1 with text"):
        assert figures(ranker)["all NDCG@10"] > floor + 0.2, ranker
    for alone, weights in (("stage 1", [1.0, 0.0]), ("text", [0.0, 1.0])):
        monkeypatch.setattr(allmrec_cells.conditional_logit, "fit", lambda scores, weights=weights: np.array(weights))
        assert figures("stage 1 with text") == figures(alone)
    monkeypatch.setattr(allmrec_cells.conditional_logit, "fit", lambda scores: np.array([0.0, 0.0, 1.0]))
    assert figures("stage 1 with text", nearest=True) == figures("text", nearest=True)


def test_the_nearest_text_of_a_history() -> None:
    texts = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], np.float32)
    histories = Sequences(np.array([0, 2, 2, 3]), np.array([0, 1, 2]))
    candidates = np.array([[2, 0], [0, 1], [0, 1]])
    found = allmrec_cells._nearest(texts, histories, candidates)
    np.testing.assert_allclose(found, [[0.8, 1.0], [0.0, 0.0], [0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize("model", ["llm", "words", "llm+words-128"])
def test_the_text_encoder_finds_the_topic(
    model: str, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Titles of a topic share a word, so their mean is nearest to another one of it: wiring that mixes items up would show."""
    monkeypatch.setenv("COLD_REFRESH_DATA", str(shop))
    data = allmrec_data.read("amazon-beauty")
    division = allmrec_data.divide(data, None, 7, 0, 5)
    named = "+".join(str(shop / "llm") if name == "llm" else name for name in model.split("+"))
    found = allmrec_cells.cell(Options(ranker="text", text_model=named), tmp_path, data, division, 7, "all", None)
    options = Options(ranker="random")
    floor = allmrec_cells.cell(options, tmp_path, data, division, 7, "all", None)
    assert found is not None
    assert floor is not None
    assert found["figures"]["all NDCG@10"] > floor["figures"]["all NDCG@10"] + 0.2


def _parts(shop: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "amazon-beauty") -> Parts:
    monkeypatch.setenv("COLD_REFRESH_DATA", str(shop))
    data = allmrec_data.read(name)
    return Parts(folder, data, allmrec_data.divide(data, None, 7, 0, 5), 7, "all")


def _options(shop: Path, row: str) -> Options:
    sizes = {"dimension": 8, "cf_epochs": 2, "alignment_epochs": 1, "epochs": 1, "train_users": 4, "history": 3}
    base = Options(**sizes, model=str(shop / "llm"), text_model=str(shop / "llm"))
    return replace(next(one for one in ROWS if one.name == row).options(base), tuned=False)


def test_what_a_row_names_reaches_the_training(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, seen = allmrec_parts.allmrec_alignment_training.train, []

    def spy(joint: Any, texts: Any, items: Any, data: Any, pool: Any, how: Any, *given: Any, **options: Any) -> Any:
        seen.append((joint.config.deep, how))
        return train(joint, texts, items, data, pool, how, *given, **options)

    monkeypatch.setattr(allmrec_parts.allmrec_alignment_training, "train", spy)
    rows = (
        "A-LLMRec",
        "deep alignment",
        "without match",
        "without reconstruction",
        "without recommendation loss",
        "InfoNCE",
    )
    for name in allmrec.DATA_SETS:
        for row in rows:
            _parts(shop, tmp_path / name, monkeypatch, name).alignment(_options(shop, row))
    for name, found in zip(allmrec.DATA_SETS, (seen[: len(rows)], seen[len(rows) :]), strict=True):
        beta = {"amazon-beauty": 0.2}.get(name, 0.5)  # the paper's
        weights = [how.weights for _, how in found]
        assert [(w.alpha, w.beta) for w in weights] == [(0.5, beta)] * 3 + [(0, 0)] + [(0.5, beta)] * 2
        assert [w.match for w in weights] == ["mse", "mse", "none", "mse", "mse", "infonce"]
        assert [w.recommendation for w in weights] == [1, 1, 1, 1, 0, 1]
        assert [deep for deep, _ in found] == [False, True, False, False, False, False]
        of_deep = found[1][1]
        assert (of_deep.optimizer, of_deep.learning_rate, of_deep.weight_decay) == ("adamw", 3e-4, 0.1)


def test_texts_stand_for_cold_items_random_vectors_for_all_and_texts_for_another_domain(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = _parts(shop, tmp_path, monkeypatch)
    options = _options(shop, "A-LLMRec")
    alignment, joint, _, _ = parts.joint(options)
    model, _ = parts.backbone(options)
    texts, _ = parts.texts(options)
    cold = parts.division.text_side
    of_cf = alignment.joint(model.items, texts, np.zeros(ITEMS, np.bool_))
    of_text = alignment.joint(np.zeros_like(model.items), texts, np.ones(ITEMS, np.bool_))
    np.testing.assert_allclose(joint, np.where(cold[:, None], of_text, of_cf), atol=1e-6)
    assert not np.allclose(of_cf, of_text, atol=1e-2)

    np.testing.assert_array_equal(parts.reader(options)[1], joint)
    shuffled = parts.reader(_options(shop, "random joint item"))[1]
    assert not np.isclose(shuffled, joint, atol=1e-3).all(1).any()

    other = allmrec_data.read("amazon-games")
    other = replace(other, titles=other.titles[:30], texts=other.texts[::-1][:30])
    across, decoded, _, _ = allmrec_cells._joined(options, parts, other)
    assert decoded.shape == (30, 8)
    np.testing.assert_array_equal(across.items, decoded)
