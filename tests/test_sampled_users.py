"""Words beside the sampled users of cold items: how much of each is measured on the items that were held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs import sampled_users
from jobs.staging import Staging
from tests.staged_night import blocks, refreshed, run_of
from tests.test_refresh import BPR, DAY, SAMPLED, _by_id, _reference
from udfs.blend import measured
from udfs.fold_in import gram
from udfs.word_map import WordMap


@pytest.mark.parametrize(("scale", "words"), [("auto", "auto"), (2.0, "auto"), ("auto", 0.25), ("auto", 0.0)])
def test_words_stand_beside_the_sampled_users(scale: Any, words: Any, tmp_path: Path) -> None:
    run = run_of(tmp_path, DAY, cf=BPR, refresh={"scale": scale, "words": words})
    names = sorted({item for _, item in blocks()})
    told = {name: [(f"u{name[1]}-{k}", p) for k, p in ((0, 0.4), (1, 0.1))] for name in names}
    # An item's text is its id: i0-3 is of the words i0 and (too short to be one) 3. new-1 has the word new, other-2 no known one.
    blocks_words = ["i0", "i1", "i2", "new"]
    vectors = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    of_words = WordMap(blocks_words, np.array([1.0, 1.5, 2.0, 1.2]), vectors)
    # What has learnt from the held-out items places cold ones, and does not say what words are worth.
    more = WordMap(blocks_words, of_words.idf, vectors + 1)
    sampled = {"new-1": SAMPLED["new-1"], "other-2": SAMPLED["new-0"]}
    facts, space = refreshed(
        run, blocks(), {**sampled, **told}, tuple(sampled), held_out=tuple(names), words=more, unseen=of_words
    )
    items = _by_id(run.staging("refresh").read("item_embeddings"))

    def folded(users: list[tuple[str, float]]) -> np.ndarray:
        whole = sum(p for _, p in users)
        return _reference(space, {user: 15 * p / whole for user, p in users})

    trained = np.stack([space.items[space.item_ids.index(name)] for name in names])
    both = (np.stack([folded(told[name]) for name in names]), np.stack([vectors[int(name[1])] for name in names]))
    counts = np.array([space.interactions[space.item_ids.index(name)] for name in names])
    given = (None if scale == "auto" else scale, None if words == "auto" else words)
    expected = measured(trained, *both, gram(space.users), counts, *given)
    assert (facts["scale"], facts["words"]) == pytest.approx((expected.scale, expected.words if words else 0), rel=1e-4)
    users_alone = folded(SAMPLED["new-1"])
    placed = (
        expected.folded * users_alone + expected.worded * (vectors[3] + 1) if words else expected.scale * users_alone
    )
    np.testing.assert_allclose(items["new-1"]["embedding"], placed, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        items["other-2"]["embedding"], expected.scale * folded(SAMPLED["new-0"]), rtol=1e-3, atol=1e-5
    )


def test_words_that_no_held_out_item_has_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path, DAY, cf=BPR, refresh={"scale": 2.0})
    names = sorted({item for _, item in blocks()})
    told = {name: [(f"u{name[1]}-0", 0.4)] for name in names}
    words, unseen = (WordMap([word], np.ones(1), np.ones((1, 3), np.float32)) for word in ("new", "other"))
    sampled = {"new-1": SAMPLED["new-1"]}
    facts, _ = refreshed(
        run, blocks(), {**sampled, **told}, tuple(sampled), held_out=tuple(names), words=words, unseen=unseen
    )
    assert (facts["scale"], facts["words"]) == (2.0, 0.0)
    assert "too few held-out items have a word" in capsys.readouterr().err


def test_the_texts_of_other_items_may_be_more_than_an_array_can_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3 << 28
    # Memory that nobody writes to takes none.
    offsets, zeros = pa.py_buffer(np.array([0, size], np.int32)), pa.py_buffer(np.zeros(size, np.uint8))
    long = pa.StringArray.from_buffers(1, offsets, zeros)
    contents = pa.chunked_array([long, ["short"], long, pa.array([None], pa.string()), long])
    items = pa.table({"item_id": ["a", "b", "c", "d", "e"], "content": contents})
    monkeypatch.setattr(Staging, "read", lambda *_: items)
    run = run_of(tmp_path, DAY)
    assert sampled_users.texts(run, pa.array(["d", "gone", "b"], pa.large_string())) == ["", "", "short"]
