"""The CF backbones behind their one interface, on walks whose next item is known; what a sequence model may not depend on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.killed import Killed, kill_at
from udfs import backbone, ncf, sequence_training
from udfs.backbone import SEQUENCE_MODELS, MatrixBackbone
from udfs.cf_inputs import CfError, CfParams, Pairs
from udfs.cf_model import fit
from udfs.checkpoints import CheckpointError, Checkpoints
from udfs.sampled_ranking import candidates, ndcg, ranks, validation
from udfs.sequences import PADDING, Sequences, batches, leave_one_out

pytestmark = pytest.mark.usefixtures("one_thread")

CIRCLES, ITEMS, USERS = 4, 12, 240  # circles of items, items of a circle, users
ALL = CIRCLES * ITEMS
SMALL = {"items": ALL, "dimension": 16, "max_length": 8, "dropout": 0.1}
QUICK = sequence_training.Options(epochs=9, learning_rate=1e-2, batch_positions=256, seed=5)


def walks(seed: int = 0) -> Sequences:
    """Each user walks round one circle of items, from anywhere, 7 to 11 items: circle c is items c * ITEMS ... in order."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(7, 12, USERS)
    users = np.repeat(np.arange(USERS), lengths)
    step = np.concatenate([np.arange(n) for n in lengths])
    first = rng.integers(0, ITEMS, USERS)[users]
    shuffled = rng.permutation(len(users))
    items = users % CIRCLES * ITEMS + (first + step) % ITEMS
    return Sequences.of(users[shuffled], items[shuffled], step[shuffled], USERS)


def trained(kind: str, options: Any = QUICK, **given: Any) -> tuple[Any, dict[str, Any]]:
    """The model after training, and the facts of it."""
    histories = leave_one_out(walks()).train
    if kind == "ncf":
        model = backbone.build("ncf", 3, users=USERS, items=ALL, dimension=8)
        fields = {"epochs": options.epochs, "patience": options.patience, "seed": options.seed}
        return model, ncf.train(model, histories, ncf.Options(**fields, learning_rate=1e-2, batch_size=256), **given)
    model = backbone.build(kind, 3, **SMALL)
    return model, sequence_training.train(model, histories, options, **given)


def silent(line: str) -> None:
    """No log."""


@pytest.mark.parametrize("kind", [*SEQUENCE_MODELS, "ncf", "als_cg", "lightgcn"])
def test_contract(kind: str) -> None:
    split = leave_one_out(walks())
    if kind in ("als_cg", "lightgcn"):
        pairs = Pairs(split.train.rows, split.train.items, np.ones(len(split.train.items), np.float32))
        params = CfParams(dimension=4, epochs=30, alpha=10.0, learning_rate=0.03, batch_size=512, device="cpu")
        found: Any = MatrixBackbone(*fit(kind, pairs, USERS, ALL, params, seed=5))
    else:
        options = replace(QUICK, epochs=20 if kind == "ncf" else 60)
        found = backbone.of(trained(kind, options, log=silent)[0])
    users, known = np.arange(USERS), split.before_test()
    vectors, items = found.users(users, known), found.items
    assert vectors.dtype == items.dtype == np.float32
    assert vectors.shape == (USERS, items.shape[1])
    assert len(items) == ALL

    circle = np.arange(ALL).reshape(CIRCLES, ITEMS)
    others = np.stack([np.delete(circle, user % CIRCLES, axis=0).ravel() for user in users])
    asked = np.concatenate([split.test[:, None], others], 1)
    scores = found.score(users, known, asked)
    assert scores.shape == asked.shape
    assert (ranks(scores) == 0).mean() > 0.95  # 1 of 37 at random
    products = backbone.inner_products(vectors, items, asked)
    np.testing.assert_allclose(products[3], items[asked[3]] @ vectors[3], rtol=1e-5, atol=1e-6)
    assert (ranks(products) == 0).mean() > 0.95
    if kind != "ncf":
        np.testing.assert_array_equal(scores, products)

    some = np.array([7, 2, 150])  # a user's row depends on nobody else
    np.testing.assert_allclose(found.users(some, known.take(some)), vectors[some], atol=1e-5)
    if kind in SEQUENCE_MODELS:
        # Among all that are not in the history, the next one of the circle: its order was learnt.
        fresh = walks(seed=9)
        last = leave_one_out(fresh)
        everything = np.concatenate([last.test[:, None], np.tile(np.arange(ALL), (USERS, 1))], 1)
        scores = found.score(users, last.before_test(), everything)
        seen = np.zeros((USERS, ALL), np.bool_)
        seen[fresh.rows, fresh.items] = True
        scores[:, 1:][seen] = -np.inf  # the test item too, which is in the first column
        assert (ranks(scores) == 0).mean() > 0.9
        # An empty history says nothing; one item is enough to say something.
        short = Sequences(np.array([0, 0, 1]), np.array([4]))
        empty, one = found.users(np.array([0, 1]), short)
        assert not empty.any()
        assert np.isfinite(one).all()
        assert one.any()


@pytest.mark.parametrize("kind", SEQUENCE_MODELS)
def test_neither_padding_nor_what_comes_later_changes_a_position(kind: str) -> None:
    model = backbone.build(kind, 1, **SMALL | {"max_length": 30}).eval()
    history = torch.tensor([[5, 9, 40, 9, 17, 30]])
    with torch.no_grad():
        states = model(history)[0]
        padded = model(torch.cat([torch.full((1, 19), PADDING), history], 1))[0]
        assert not padded[:19].any()
        torch.testing.assert_close(padded[19:], states, rtol=1e-4, atol=1e-6)
        # Beside a longer history, and an empty one, in a batch.
        batch = torch.full((3, 25), PADDING)
        batch[0], batch[2, -6:] = torch.arange(25), history
        found = model(batch)
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found[2, -6:], states, rtol=1e-4, atol=1e-6)
        for place in range(6):
            changed = history.clone()
            changed[0, place] = 2
            other = model(changed)[0]
            torch.testing.assert_close(other[:place], states[:place], rtol=1e-4, atol=1e-6)
            assert (other[place:] - states[place:]).abs().amax(1).gt(1e-5).all()  # and everything behind it reads it
        # Items before the last max_length are not read.
        long = torch.arange(40)[None]
        torch.testing.assert_close(model(long), model(long[:, 10:]))


@pytest.mark.parametrize("kind", [*SEQUENCE_MODELS, "ncf"])
def test_the_seed_decides_and_a_killed_training_ends_as_an_undisturbed_one(kind: str, tmp_path: Path) -> None:
    options = replace(QUICK, epochs=4)
    model, facts = trained(kind, options, log=silent)
    expected = backbone.dump(model)
    other = backbone.dump(trained(kind, replace(options, seed=6), log=silent)[0])
    assert other["model.safetensors"] != expected["model.safetensors"]

    torch.manual_seed(99)  # what others drew before does not matter
    state = torch.get_rng_state()
    checkpoints = Checkpoints(str(tmp_path))
    lines: list[str] = []
    for epoch in (1, 3):  # epoch 3 is lost and done again
        with pytest.raises(Killed):
            trained(kind, options, log=kill_at(epoch), checkpoints=checkpoints)
    model, found = trained(kind, options, log=lines.append, checkpoints=checkpoints)
    assert lines[0] == "goes on behind epoch 2, which was saved"
    assert lines[1].startswith("epoch 3/4: loss ")
    assert backbone.dump(model) == expected
    assert found == facts
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(CheckpointError, match="another training"):
        trained(kind, replace(options, seed=6), log=silent, checkpoints=checkpoints)


def test_the_best_epoch_is_kept_and_patience_ends_training(tmp_path: Path) -> None:
    def measured(values: list[float]) -> Any:
        return lambda: values.pop(0)

    options = replace(QUICK, patience=2)
    model, facts = trained("gru4rec", options, log=silent, validate=measured([0.1, 0.3, 0.3, 0.2, 0.9]))
    assert (facts["epochs"], facts["best_epoch"], facts["validation"]) == (4, 2, 0.3)
    second, _ = trained("gru4rec", replace(options, epochs=2), log=silent)
    assert backbone.dump(model) == backbone.dump(second)
    checkpoints = Checkpoints(str(tmp_path))
    values = measured([0.1, 0.3, 0.3, 0.2])
    with pytest.raises(Killed):  # when epoch 2, the best, is no more the last
        trained("gru4rec", options, log=kill_at(4), validate=values, checkpoints=checkpoints)
    resumed, found = trained("gru4rec", options, log=silent, validate=measured([0.2]), checkpoints=checkpoints)
    assert backbone.dump(resumed) == backbone.dump(model)
    assert found == facts


@pytest.mark.parametrize("kind", [*SEQUENCE_MODELS, "ncf"])
def test_saved_and_loaded(kind: str) -> None:
    fields = {"users": 3, "items": 5, "dimension": 4} if kind == "ncf" else {"items": 5, "dimension": 4}
    model = backbone.build(kind, 1, **fields)
    files = backbone.dump(model)
    loaded = backbone.load(files)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert not loaded.training
    assert backbone.dump(loaded) == files
    with pytest.raises(CfError, match=r"cannot be read.*train again"):
        backbone.load({**files, "model.safetensors": files["model.safetensors"][:-4]})
    with pytest.raises(CfError, match=r"is not what its config\.json says"):
        backbone.load({**files, "config.json": files["config.json"].replace(b'"items": 5', b'"items": 6')})
    with torch.no_grad():
        next(model.parameters())[0] = math.nan
    with pytest.raises(CfError, match="not finite"):
        backbone.load(backbone.dump(model))


def test_items_of_the_own_history_are_no_negatives() -> None:
    # Everybody has every item: only the positives' half of the loss is left.
    histories = Sequences(np.arange(0, 61, 6), np.tile(np.arange(6), 10))
    for items, expected in ((6, math.log(2)), (600, 2 * math.log(2))):
        model = backbone.build("sasrec", 1, **SMALL | {"items": items})
        facts = sequence_training.train(model, histories, replace(QUICK, epochs=1, learning_rate=1e-9), silent)
        assert facts["history"][0]["loss"] == pytest.approx(expected, rel=0.05)


def test_trainings_that_cannot_be_say_so() -> None:
    short = Sequences(np.array([0, 1, 2]), np.array([0, 1]))
    with pytest.raises(CfError, match="no history of two items or more among 2"):
        sequence_training.train(backbone.build("sasrec", 1, **SMALL), short, QUICK, silent)
    with pytest.raises(CfError, match=r"diverged in epoch 1.*lower the learning rate"):
        trained("sasrec", replace(QUICK, learning_rate=1e30), log=silent)


def test_neumf_is_the_papers() -> None:
    model = backbone.build("ncf", 1, users=3, items=5, dimension=4, layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    weights = {name: value.detach().double().numpy() for name, value in model.named_parameters()}
    user, item = 2, 3
    gmf = weights["gmf_weights"] @ (weights["gmf_users"][user] * weights["gmf_items"][item])
    x = np.concatenate([weights["mlp_users"][user], weights["mlp_items"][item]])
    assert len(x) == 16
    for layer in (0, 2):
        x = np.maximum(weights[f"mlp.{layer}.weight"] @ x + weights[f"mlp.{layer}.bias"], 0)
    mlp = weights["mlp.4.weight"] @ x + weights["mlp.4.bias"]
    found = backbone.of(model)
    empty = Sequences(np.zeros(2, np.int64), np.zeros(0, np.int64))
    np.testing.assert_allclose(found.score(np.array([user]), empty, np.array([[item]])), [(gmf + mlp) / 2], rtol=1e-5)
    np.testing.assert_allclose(found.users(np.array([user]), empty)[0] @ found.items[item], gmf, rtol=1e-5)


def test_ncf_users_without_an_event_are_zero() -> None:
    histories = walks().where(np.arange(USERS) != 3)
    model = backbone.build("ncf", 1, users=USERS, items=ALL, dimension=8)
    ncf.train(model, histories, ncf.Options(epochs=2, batch_size=256), silent)
    vectors = backbone.of(model).users(np.arange(USERS), histories)
    np.testing.assert_array_equal(np.flatnonzero(~vectors.any(1)), [3])


def test_histories() -> None:
    users, items = np.array([2, 0, 2, 0, 0, 2, 0]), np.array([7, 1, 3, 5, 1, 9, 2])
    times = np.array([3, 2, 1, 9, 4, 3, 2]).astype("datetime64[s]")
    found = Sequences.of(users, items, times, 4)
    np.testing.assert_array_equal(found.lengths, [4, 0, 3, 0])
    np.testing.assert_array_equal(found.items, [1, 2, 1, 5, 3, 7, 9])  # equal times: by item
    np.testing.assert_array_equal(found.rows, users[np.lexsort((items, times, users))])
    rows = np.array([2, 1, 0])
    np.testing.assert_array_equal(found.padded(rows, 3), [[3, 7, 9], [-1, -1, -1], [2, 1, 5]])
    np.testing.assert_array_equal(found.take(rows).padded(np.arange(3), 4), found.padded(rows, 4))
    np.testing.assert_array_equal(found.where(np.array([False, True, True, True])).items, [3, 7, 9])
    for wrong in ((users, items[1:], times, 4), (users, items, times, 2), (users, -items, times, 4)):
        with pytest.raises(ValueError, match="events of"):
            Sequences.of(*wrong)


def test_leave_one_out() -> None:
    lengths = np.array([0, 1, 2, 3, 6])
    histories = Sequences(np.concatenate([[0], np.cumsum(lengths)]), np.arange(12))
    split = leave_one_out(histories)
    np.testing.assert_array_equal(split.train.lengths, [0, 1, 2, 1, 4])
    np.testing.assert_array_equal(split.train.items, [0, 1, 2, 3, 6, 7, 8, 9])
    np.testing.assert_array_equal(split.validation, [-1, -1, -1, 4, 10])
    np.testing.assert_array_equal(split.test, [-1, -1, -1, 5, 11])
    known = split.before_test()
    np.testing.assert_array_equal(known.lengths, [0, 1, 2, 2, 5])
    np.testing.assert_array_equal(known.items, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10])


def test_batches_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(0, 30, 500)
    found = batches(lengths, 100)
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(500))
    assert all(len(group) * max(1, lengths[group].max()) <= 100 for group in found)
    assert len(found) < 1.3 * lengths.sum() / 100
    assert [list(group) for group in batches(np.array([500, 1]), 100)] == [[1], [0]]
    assert batches(np.zeros(0, np.int64), 100) == []


def test_candidates_and_their_ndcg() -> None:
    split = leave_one_out(walks())
    known = split.before_test()
    found = candidates(split.test, known, ALL, 30, seed=1)
    assert found.shape == (USERS, 31)
    np.testing.assert_array_equal(found[:, 0], split.test)
    for user in range(USERS):
        assert len(set(found[user])) == 31
        assert not set(found[user]) & set(known.padded(np.array([user]), ITEMS)[0])
    np.testing.assert_array_equal(found, candidates(split.test, known, ALL, 30, seed=1))
    assert set(found[:, 1:].ravel()) == set(range(ALL))
    with pytest.raises(ValueError, match="45 items that are not known cannot be drawn from 48"):
        candidates(split.test, known, ALL, 45, seed=1)

    scores = np.array([[1, 3, 0], [2, 1, 0], [0, 0, 0]], np.float32)
    np.testing.assert_array_equal(ranks(scores), [1, 0, 2])
    with pytest.raises(ValueError, match="1 of 2 rows have scores that are NaN"):
        ranks(np.array([[np.nan, 1.0], [0.0, 1.0]], np.float32))
    np.testing.assert_allclose(ndcg(ranks(scores), 2), [1 / math.log2(3), 1.0, 0.0])
    # Of vectors that know nothing: all scores are equal, the true item counts as the last.
    nothing = MatrixBackbone(np.zeros((USERS, 2), np.float32), np.ones((ALL, 2), np.float32))
    assert validation(nothing, split, 1)() == 0.0
    right = np.zeros((USERS, ALL), np.float32)
    right[np.arange(USERS), split.validation] = 1.0
    assert validation(MatrixBackbone(right, np.eye(ALL, dtype=np.float32)), split, 1, max_users=20)() == 1.0
    with pytest.raises(CfError, match="nothing to validate on: 0 users"):
        validation(nothing, leave_one_out(split.train.where(np.zeros(USERS, np.bool_))), 1)
