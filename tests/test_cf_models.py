"""Every CF model behind the one interface, on a matrix whose answer is known; LightGCN and BPR against dense formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from udfs import bpr, lightgcn
from udfs.cf_model import ENGINES, CfError, CfParams, Pairs, fit
from udfs.vectors import from_column, to_column

MODELS = sorted(ENGINES)
DIMENSION = 4
PARAMS = {
    "als": CfParams(dimension=DIMENSION, epochs=6, alpha=10.0, regularization=0.5, blocks=1),
    "als_cg": CfParams(dimension=DIMENSION, epochs=6, alpha=10.0, regularization=0.5, device="cpu"),
    "lightgcn": CfParams(dimension=DIMENSION, epochs=40, batch_size=512, learning_rate=0.03, device="cpu"),
    "bpr": CfParams(dimension=DIMENSION, epochs=40, batch_size=512, learning_rate=0.03, device="cpu"),
}
BLOCKS, USERS, ITEMS = 3, 20, 12  # users and items a block


pytestmark = pytest.mark.usefixtures("one_thread")


def _block_matrix() -> tuple[Pairs, Pairs]:
    """Users of a block have pairs with its items only; a fifth of the block's cells is held out."""
    rng = np.random.default_rng(3)
    user, item = np.meshgrid(np.arange(BLOCKS * USERS), np.arange(BLOCKS * ITEMS), indexing="ij")
    inside = (user // USERS) == (item // ITEMS)
    held = inside & (rng.random(inside.shape) < 0.2)
    make = lambda mask: Pairs(user[mask], item[mask], np.ones(mask.sum(), np.float32))  # noqa: E731
    return make(inside & ~held), make(held)


@pytest.fixture
def given(spark: Any) -> Callable[[str, Pairs], Any]:
    """The pairs as the model takes them."""

    def convert(model: str, pairs: Pairs) -> Any:
        if ENGINES[model] == "torch":
            return pairs
        columns = {"user_idx": pairs.users, "item_idx": pairs.items, "weight": pairs.weights}
        return spark.createDataFrame(pa.table({k: pa.array(v) for k, v in columns.items()})).selectExpr(
            "int(user_idx) user_idx", "int(item_idx) item_idx", "weight"
        )

    return convert


@pytest.mark.parametrize("model", MODELS)
def test_contract(model: str, given: Callable[[str, Pairs], Any]) -> None:
    train, held = _block_matrix()
    # Two users and three items more than have pairs: the last of each, and one amid the items.
    shifted = Pairs(train.users, np.where(train.items >= 5, train.items + 1, train.items), train.weights)
    n_users, n_items = BLOCKS * USERS + 2, BLOCKS * ITEMS + 3
    users, items = fit(model, given(model, shifted), n_users, n_items, PARAMS[model], seed=5)

    assert (users.shape, items.shape) == ((n_users, DIMENSION), (n_items, DIMENSION))
    assert users.dtype == items.dtype == np.float32
    assert np.isfinite(users).all()
    assert np.isfinite(items).all()
    np.testing.assert_array_equal(np.flatnonzero(~users.any(1)), [60, 61])
    np.testing.assert_array_equal(np.flatnonzero(~items.any(1)), [5, 37, 38])

    scores = users @ np.delete(items, [5, 37, 38], axis=0).T
    scores[train.users, train.items], scores[60:] = -np.inf, -np.inf
    for user in range(BLOCKS * USERS):
        truth = set(held.items[held.users == user])
        assert set(np.argsort(-scores[user])[: len(truth)]) == truth, f"user {user}"

    # The rows' order and a repetition change nothing; another seed does.
    order = np.random.default_rng(0).permutation(len(train.users))
    shuffled = Pairs(shifted.users[order], shifted.items[order], shifted.weights[order])
    again = fit(model, given(model, shuffled), n_users, n_items, PARAMS[model], seed=5)
    np.testing.assert_array_equal(users, again[0])
    np.testing.assert_array_equal(items, again[1])
    other, _ = fit(model, given(model, shifted), n_users, n_items, PARAMS[model], seed=6)
    assert not np.array_equal(users, other)


def test_a_model_refuses_the_other_engines_pairs_and_no_pairs(given: Callable[[str, Pairs], Any]) -> None:
    train, _ = _block_matrix()
    with pytest.raises(TypeError, match="als runs on spark"):
        fit("als", train, 60, 36, PARAMS["als"], 0)
    with pytest.raises(TypeError, match="bpr runs on torch"):
        fit("bpr", given("als", train), 60, 36, PARAMS["bpr"], 0)
    nothing = Pairs(np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32))
    with pytest.raises(CfError, match="no pair to train bpr on: 60 users and 36 items"):
        fit("bpr", nothing, 60, 36, PARAMS["bpr"], 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_asked_for_and_missing_is_an_error() -> None:
    with pytest.raises(CfError, match="device is cuda"):
        CfParams(device="cuda").torch_device()
    assert CfParams(device="auto").torch_device() == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("model", ["als_cg", "lightgcn", "bpr"])
def test_the_gpu_learns_the_blocks_too(model: str) -> None:
    train, held = _block_matrix()
    params = CfParams(dimension=DIMENSION, epochs=40, batch_size=512, learning_rate=0.03, device="cuda")
    users, items = fit(model, train, 60, 36, params, seed=5)
    scores = users @ items.T
    outside = (np.arange(60)[:, None] // USERS) != (np.arange(36) // ITEMS)
    assert scores[held.users, held.items].min() > scores[outside].mean()


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_lightgcn_propagates_as_the_dense_formula(layers: int) -> None:
    rng = np.random.default_rng(1)
    matrix = rng.random((5, 7)) < 0.4
    matrix[2], matrix[:, 4] = False, False  # a user and an item without an edge
    users, items = np.nonzero(matrix)
    ego = rng.standard_normal((12, 3))
    adjacency = np.zeros((12, 12))
    adjacency[:5, 5:], adjacency[5:, :5] = matrix, matrix.T
    with np.errstate(divide="ignore"):
        root = np.where(adjacency.sum(1) > 0, adjacency.sum(1) ** -0.5, 0)
    normalized = root[:, None] * adjacency * root
    operator = sum(np.linalg.matrix_power(normalized, k) for k in range(layers + 1)) / (layers + 1)

    graph = lightgcn.normalized_adjacency(users, items, 5, 7)
    np.testing.assert_allclose(graph.toarray(), normalized, atol=1e-15)
    propagate = lightgcn.Propagation(graph, layers, torch.device("cpu"), torch.float64)
    given = torch.from_numpy(ego).requires_grad_()
    found = propagate(given)
    np.testing.assert_allclose(found.detach().numpy(), operator @ ego, atol=1e-14)
    # The gradient goes back through the same operator.
    direction = rng.standard_normal((12, 3))
    found.backward(torch.from_numpy(direction))
    np.testing.assert_allclose(given.grad.numpy(), operator.T @ direction, atol=1e-14)


def test_the_bpr_loss_and_its_gradient_are_the_papers() -> None:
    rng = np.random.default_rng(2)
    u, i, j = rng.standard_normal((3, 6, 4))
    weights, decay = rng.random(6) + 0.5, 0.3
    tensors = [torch.from_numpy(x).requires_grad_() for x in (u, i, j)]
    loss = bpr.bpr_loss(tuple(tensors), tuple(tensors), torch.from_numpy(weights), decay)  # type: ignore[arg-type]
    loss.backward()
    margin = (u * (i - j)).sum(1)
    slope = (weights / (1 + np.exp(margin)))[:, None]  # 1 - sigma(x)
    expected = (weights * np.log1p(np.exp(-margin))).mean() + decay / 2 * ((u**2 + i**2 + j**2).sum(1)).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    for tensor, gradient in zip(
        tensors, (-slope * (i - j) + decay * u, -slope * u + decay * i, slope * u + decay * j), strict=True
    ):
        np.testing.assert_allclose(tensor.grad.numpy(), gradient / 6, atol=1e-14)


def test_negatives_are_uniform_over_the_items_a_user_has_no_pair_with() -> None:
    users = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    items = torch.tensor([0, 1, 3, 2, 0, 1, 2, 3])
    sampler = bpr.NegativeSampler(users, items, 4, torch.Generator().manual_seed(0))
    drawn, counts = sampler(torch.tensor([0, 1, 2]).repeat_interleave(20000))
    drawn, counts = drawn.view(3, -1), counts.view(3, -1)
    assert not counts[2].any()  # this user has every item: no triple of it counts
    assert set(drawn[0][counts[0]].tolist()) == {2}
    share = torch.bincount(drawn[1][counts[1]], minlength=4) / counts[1].sum()
    np.testing.assert_allclose(share.numpy(), [1 / 3, 1 / 3, 0, 1 / 3], atol=0.02)


def test_als_cg_solves_the_equations_of_als() -> None:
    train, _ = _block_matrix()
    weights = np.random.default_rng(4).uniform(0.5, 2.0, len(train.users)).astype(np.float32)
    params = CfParams(dimension=DIMENSION, epochs=3, alpha=10.0, regularization=0.5, device="cpu")
    users, items = fit("als_cg", Pairs(train.users, train.items, weights), 60, 36, params, seed=1)
    y = items.astype(np.float64)
    for user in (0, 25, 59):
        mine = train.users == user
        rows, confidence = y[train.items[mine]], 1 + params.alpha * weights[mine].astype(np.float64)
        ridge = params.regularization * mine.sum() * np.eye(DIMENSION)
        left = y.T @ y + (rows.T * (confidence - 1)) @ rows + ridge
        np.testing.assert_allclose(users[user], np.linalg.solve(left, rows.T @ confidence), rtol=1e-4, atol=1e-6)


def test_user_negatives_state_which_users_an_item_is_for() -> None:
    train, held = _block_matrix()
    params = CfParams(
        dimension=DIMENSION, epochs=40, batch_size=512, learning_rate=0.03, device="cpu", negatives="user"
    )
    for model in ("bpr", "lightgcn"):
        users, items = fit(model, train, 60, 36, params, seed=5)
        scores = items @ users.T
        scores[train.items, train.users] = -np.inf
        for item in range(36):
            truth = set(held.users[held.items == item])
            assert set(np.argsort(-scores[item])[: len(truth)]) == truth, f"{model}, item {item}"
        assert not np.array_equal(users, fit(model, train, 60, 36, replace(params, negatives="item"), seed=5)[0])


def test_vectors_pass_through_arrow_bit_for_bit() -> None:
    vectors = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    column = to_column(vectors)
    assert column.type == pa.list_(pa.float32())
    assert column.to_pylist() == vectors.tolist()
    np.testing.assert_array_equal(from_column(column), vectors)
    np.testing.assert_array_equal(from_column(column.slice(1, 3)), vectors[1:4])
    assert len(to_column(vectors[:0])) == 0
    assert from_column(to_column(vectors[:0])).shape[0] == 0
    for broken in ([[1.0, 2.0], [3.0]], [[1.0], None]):
        with pytest.raises(ValueError, match="different lengths"):
            from_column(pa.array(broken, pa.list_(pa.float32())))
