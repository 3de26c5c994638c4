"""Stage cf: which space a night uses, what a new one is made of, and how it lies to the one before."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import cf, cf_start
from jobs.run import Run, execute
from jobs.staging import Staging, StagingError
from tests.staged_night import Pair, blocks, run_of, snapshot
from udfs.cf_inputs import CfError

BPR = {"model": "bpr", "epochs": 30, "batch_size": 256, "learning_rate": 0.03}
DAY = date(2026, 3, 1)


def _stage(
    run: Run, pairs: dict[Pair, float], cold: tuple[str, ...] = (), texts: Any = None, *, published: bool = True
) -> dict[str, Any]:
    snapshot(run, pairs, cold, texts)
    facts = execute(run, "cf", cf.run)
    if published:
        run.record("publish", {}, 0.0, {})
    return facts


@pytest.mark.parametrize("model", ["als", "bpr", "lightgcn"])
def test_a_space_holds_the_warm_items_and_their_users(model: str, spark: Any, tmp_path: Path) -> None:
    pairs = blocks()
    pairs[("u0-0", "few")] = pairs[("only-few", "few")] = 1.0  # an item below warm_interactions, and a user of it only
    extra = {**BPR, "model": model} if model != "als" else {}
    run = run_of(tmp_path, DAY, cf=extra, snapshot={"warm_interactions": 3})
    facts = _stage(run, pairs, cold=("few", "new"))
    space = cf.load_space(run, facts["space_version"])

    assert facts["trained"] is True
    assert (facts["model"], facts["dimension"], facts["trained_on"]) == (model, 3, "2026-03-01")
    assert (facts["aligned_to"], facts["residual"]) == (None, None)
    assert space.user_ids == sorted({u for u, _ in pairs} - {"only-few"})
    assert space.item_ids == sorted({i for _, i in pairs} - {"few"})
    assert (facts["users"], facts["items"]) == (space.users.shape[0], space.items.shape[0]) == (24, 18)
    assert space.users.dtype == space.items.dtype == np.float32
    assert space.interactions.tolist() == [sum(i == x for _, i in pairs) for x in space.item_ids]
    scores = space.users @ space.items.T
    same = np.array([[u[1] == i[1] for i in space.item_ids] for u in space.user_ids])
    assert scores[same].mean() > scores[~same].mean() + 0.5
    # ALS' own objective folds in; in the others' spaces lengths are scaled.
    assert (space.facts["item_scale"] == 1.0) == (model == "als")
    assert space.facts["item_scale"] > 0
    run.artifact("spaces", space.version).verify()
    assert run.staging("cf").children() == []  # Spark's checkpoints are gone


def test_a_space_is_kept_until_it_is_old_and_never_taken_from_the_future(tmp_path: Path) -> None:
    pairs = blocks()
    first = _stage(run_of(tmp_path, DAY, cf={**BPR, "retrain_days": 7}), pairs)
    more = {**pairs, ("u0-0", "i1-0"): 1.0}
    kept = _stage(run_of(tmp_path, date(2026, 3, 7), cf={**BPR, "retrain_days": 7}), more)
    assert (kept["space_version"], kept["trained"], kept["trained_on"]) == (first["space_version"], False, "2026-03-01")
    # On the seventh day it is too old, and the new one is laid onto it.
    week = _stage(run_of(tmp_path, date(2026, 3, 8), cf={**BPR, "retrain_days": 7}), more)
    assert (week["trained"], week["aligned_to"]) == (True, first["space_version"])
    assert 0 < week["residual"] < 0.9
    # A backfill of a day before them all sees none of them.
    past = _stage(run_of(tmp_path, date(2026, 2, 1), cf={**BPR, "retrain_days": 7}), pairs)
    assert (past["trained"], past["trained_on"], past["aligned_to"]) == (True, "2026-02-01", None)
    # A shorter life trains anew (the weekly DAG's way), and nights of the longer one take the result up.
    weekly = _stage(run_of(tmp_path, date(2026, 3, 10), cf={**BPR, "retrain_days": 1}), pairs)
    assert weekly["trained"] is True
    nightly = _stage(run_of(tmp_path, date(2026, 3, 11), cf={**BPR, "retrain_days": 7}), pairs)
    assert (nightly["space_version"], nightly["trained"]) == (weekly["space_version"], False)
    # Other settings or another seed are another space; one of another model is not laid onto it.
    other = _stage(run_of(tmp_path, date(2026, 3, 12), cf={**BPR, "weight_decay": 0.01}), pairs)
    assert (other["trained"], other["aligned_to"]) == (True, weekly["space_version"])
    seeded = _stage(run_of(tmp_path, date(2026, 3, 12), 2, cf=BPR, seed=8), pairs)
    assert seeded["trained"] is True
    # Nor is any onto one that no night was published with.
    refused = _stage(run_of(tmp_path, date(2026, 3, 12), 3, cf=BPR, seed=9), pairs, published=False)
    after = _stage(run_of(tmp_path, date(2026, 3, 13), 2, cf=BPR, seed=10), pairs)
    assert refused["trained"]
    assert after["aligned_to"] in {other["space_version"], seeded["space_version"]}
    graph = _stage(run_of(tmp_path, date(2026, 3, 13), cf={**BPR, "model": "lightgcn"}), pairs)
    assert (graph["trained"], graph["aligned_to"]) == (True, None)


def test_mended_data_are_trained_on_again_and_later_nights_take_that_space(tmp_path: Path) -> None:
    data = blocks(seed=1), blocks(seed=2)
    for lake, order in (("a", (0, 1)), ("b", (1, 0))):  # whichever way their hashes are ordered
        for number, which in enumerate(order, 1):
            run = run_of(tmp_path / lake, DAY, number, cf=BPR)
            trained = _stage(replace(run, settings=run.settings.training()), data[which])
            assert trained["trained"] is True
            night = _stage(run_of(tmp_path / lake, date(2026, 3, 2), number, cf=BPR), data[which])
            assert (night["space_version"], night["trained"]) == (trained["space_version"], False)


def test_data_that_are_restored_are_the_newest_again(tmp_path: Path) -> None:
    good, damaged = blocks(seed=1), blocks(seed=2)
    versions = []
    for number, data in enumerate((good, damaged, good, good), 1):
        run = run_of(tmp_path, DAY, number, cf=BPR)
        versions.append(_stage(replace(run, settings=run.settings.training()), data)["space_version"])
        night = _stage(run_of(tmp_path, date(2026, 3, 2), number, cf=BPR), data)
        assert (night["space_version"], night["trained"]) == (versions[-1], False)
    assert versions == [versions[0], versions[1], versions[0], versions[0]]
    assert len(set(versions)) == 2


def test_a_space_that_another_run_trained_meanwhile_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = cf._fit

    def slow(*args: Any) -> Any:
        monkeypatch.setattr(cf, "_fit", fit)
        _stage(run_of(tmp_path, DAY, 2, cf=BPR), blocks())
        monkeypatch.setattr(Staging, "clear", lambda folder: pytest.fail(f"{folder.uri} is complete and was cleared"))
        return fit(*args)

    monkeypatch.setattr(cf, "_fit", slow)
    facts = _stage(run_of(tmp_path, DAY, cf=BPR), blocks())
    assert cf.load_space(run_of(tmp_path, DAY, cf=BPR), facts["space_version"]).users.any()


def test_the_version_is_the_content_and_alignment_changes_no_score(tmp_path: Path) -> None:
    pairs, more = blocks(), {**blocks(), ("u0-0", "i1-0"): 1.0}
    versions, spaces = [], []
    for name in ("a", "b"):
        lake = tmp_path / name
        versions.append(_stage(run_of(lake, DAY, cf=BPR), pairs)["space_version"])
        run = run_of(lake, date(2026, 4, 1), cf=BPR)
        versions.append(_stage(run, dict(reversed(more.items())))["space_version"])
        spaces.append(cf.load_space(run, versions[-1]))
    assert versions[:2] == versions[2:]
    assert versions[0] != versions[1]
    np.testing.assert_array_equal(spaces[0].items, spaces[1].items)
    # The same pairs on the same day without a space before: the same scores, other axes.
    alone_run = run_of(tmp_path / "c", date(2026, 4, 1), cf=BPR)
    alone = cf.load_space(alone_run, _stage(alone_run, more)["space_version"])
    np.testing.assert_allclose(alone.users @ alone.items.T, spaces[0].users @ spaces[0].items.T, atol=1e-5)
    assert not np.allclose(alone.items, spaces[0].items, atol=1e-3)


def test_a_space_that_a_kill_left_half_written_is_made_again(tmp_path: Path) -> None:
    run = run_of(tmp_path, DAY, cf=BPR)
    version = _stage(run, blocks())["space_version"]
    whole = cf.load_space(run, version)
    (tmp_path / "_artifacts/spaces" / version / "manifest.json").unlink()
    (tmp_path / "_artifacts/spaces" / version / "items/part-1.parquet").write_bytes(b"half")
    with pytest.raises(StagingError, match="is not complete"):
        cf.load_space(run, version)
    run.staging("cf").clear()
    again = execute(run, "cf", cf.run)
    assert (again["space_version"], again["trained"]) == (version, True)
    np.testing.assert_array_equal(cf.load_space(run, version).items, whole.items)
    # Killed between the space and the stage's own manifest: the same facts.
    run.staging("cf").clear()
    facts = execute(run, "cf", cf.run)
    assert {**facts, "seconds": 0} == {**again, "seconds": 0}


def test_a_space_that_began_with_texts(tmp_path: Path) -> None:
    """Nothing is learnt (the rate is next to nothing), so the space is its start."""
    rng = np.random.default_rng(0)
    pairs = blocks()
    items = sorted({item for _, item in pairs})
    texts = {item: rng.standard_normal(6).astype(np.float32).tolist() for item in [*items[1:], "new"]}
    still = {**BPR, "init": "llminit", "llminit": {"select": "uniform", "scale": "raw"}, "learning_rate": 1e-9}
    run = run_of(tmp_path, DAY, cf=still)
    facts = _stage(run, pairs, ("new",), texts)
    space = cf.load_space(run, facts["space_version"])
    assert space.facts["encoder_version"] == "encoder"
    own = np.array([texts[item][::2] for item in items[1:]])
    found = dict(zip(space.item_ids, space.items, strict=True))
    np.testing.assert_allclose([found[item] for item in items[1:]], own, atol=1e-5)
    np.testing.assert_allclose(found[items[0]], own.mean(axis=0), atol=1e-5)  # it has no text
    mine = [found[item] for user, item in pairs if user == space.user_ids[3]]
    np.testing.assert_allclose(space.users[3], np.mean(mine, axis=0), atol=1e-5)
    # Rotated onto another space, the start of a text turns with it.
    later = run_of(tmp_path, date(2026, 4, 1), cf={**still, "llminit": {"select": "variance", "scale": "raw"}})
    facts = _stage(later, pairs, ("new",), texts)
    assert facts["aligned_to"] == space.version
    turned = cf.load_space(later, facts["space_version"])
    shas = [f"sha-{item}" for item in (*turned.item_ids[1:], "new")]
    by_text = cf_start.vectors(later, turned.version, turned.facts, shas)
    np.testing.assert_allclose(by_text[:-1], turned.items[1:], atol=1e-5)
    assert by_text[-1].any()
    # Other texts are another space.
    del texts[items[1]]
    other = _stage(run_of(tmp_path / "other", DAY, cf=still), pairs, ("new",), texts)
    assert other["space_version"] != space.version


def test_without_warm_items_it_says_what_to_change(tmp_path: Path) -> None:
    run = run_of(tmp_path, DAY, snapshot={"warm_interactions": 5})
    snapshot(run, {("u", "a"): 1.0, ("v", "b"): 1.0}, cold=("a", "b", "c"))
    with pytest.raises(CfError, match=r"none of the 3 items has snapshot.warm_interactions \(5\) users .* 2 pairs"):
        execute(run, "cf", cf.run)
    assert not run.staging("cf").is_complete()


def test_nothing_is_shared_with_the_space_before(tmp_path: Path) -> None:
    _stage(run_of(tmp_path, DAY, cf=BPR), blocks())
    renamed = {(f"new-{u}", f"new-{i}"): w for (u, i), w in blocks().items()}
    facts = _stage(run_of(tmp_path, date(2026, 4, 1), cf=BPR), renamed)
    assert (facts["trained"], facts["aligned_to"], facts["residual"]) == (True, None, None)


def test_what_of_an_item_is_encoded_decides_a_space_that_begins_at_texts_only(tmp_path: Path) -> None:
    one, other = (run_of(tmp_path, DAY, text={"prompt": prompt}).settings for prompt in ("{title}", "{content}"))
    assert cf.conf_digest(one) == cf.conf_digest(other)
    assert cf.conf_digest(one, "encoder") != cf.conf_digest(other, "encoder")
