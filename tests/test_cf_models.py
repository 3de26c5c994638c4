"""Every CF model behind the one interface, on a matrix whose answer is known; graphs and losses against dense formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from udfs import bpr, lightgcn, llm_init, pair_training, sgl
from udfs.cf_inputs import CfError, CfParams, Pairs
from udfs.cf_model import ENGINES, STARTABLE, fit, without_pairs
from udfs.llm_init import LLMInit
from udfs.vectors import from_column, to_column

MODELS = sorted(ENGINES)
DIMENSION = 4
PARAMS = {
    "als": CfParams(dimension=DIMENSION, epochs=6, alpha=10.0, regularization=0.5, blocks=1),
    "als_cg": CfParams(dimension=DIMENSION, epochs=6, alpha=10.0, regularization=0.5, device="cpu"),
    "lightgcn": CfParams(dimension=DIMENSION, epochs=40, batch_size=512, learning_rate=0.03, device="cpu"),
    "bpr": CfParams(dimension=DIMENSION, epochs=40, batch_size=512, learning_rate=0.03, device="cpu"),
    "sgl": CfParams(dimension=DIMENSION, epochs=60, batch_size=512, learning_rate=0.03, device="cpu"),
    "sgcl": CfParams(dimension=DIMENSION, epochs=30, batch_size=512, learning_rate=0.03, device="cpu"),
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
@pytest.mark.parametrize("model", [m for m in MODELS if ENGINES[m] == "torch"])
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
    # Some rows of it: the same rows, the same gradient.
    rows = torch.tensor([0, 2, 6, 11])
    given.grad = None
    found, own = propagate.at(given, rows)
    np.testing.assert_allclose(found.detach().numpy(), (operator @ ego)[rows], atol=1e-14)
    np.testing.assert_array_equal(own.detach().numpy(), ego[rows])
    if layers:  # as on a GPU: the whole products, and rows of what comes out
        whole, _ = lightgcn._MeanOfLayers.apply(propagate, None, None, given, rows)
        torch.testing.assert_close(whole, found)
        weights = torch.from_numpy(direction)[rows]
        gradients = [
            torch.autograd.grad((one * weights).sum(), given)[0] for one in (whole, propagate.at(given, rows)[0])
        ]
        torch.testing.assert_close(*gradients)
    # Both may be used, and more than once before the gradient is asked for.
    other = torch.tensor([1, 11])
    again, _ = propagate.at(given, other)
    weight = torch.from_numpy(direction)
    ((found * weight[rows]).sum() + 3 * (own * weight[rows]).sum() + (again * weight[other]).sum()).backward()
    expected = operator.T[:, rows] @ direction[rows] + operator.T[:, other] @ direction[other]
    expected[rows] += 3 * direction[rows]
    np.testing.assert_allclose(given.grad.numpy(), expected, atol=1e-14)


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


def test_sgls_views_leave_edges_out_anew_each_epoch() -> None:
    train, _ = _block_matrix()
    params = CfParams(dimension=DIMENSION, edge_dropout=0.3, contrast_weight=0.5, temperature=0.3, device="cpu")
    tensors = (torch.from_numpy(side.astype(np.int64)) for side in (train.users, train.items))
    data = pair_training.Data(*tensors, torch.ones(len(train.users)), 60, 36, torch.Generator().manual_seed(1))
    objective = sgl.Sgl(data, params)
    objective.begin_epoch()
    operators = [view(torch.eye(96)) for view in (*objective._views, objective._bpr.embeddings)]
    edges = [int((operator[:60, 60:] != 0).sum()) for operator in operators]
    assert not torch.equal(operators[0], operators[1])
    one_layer = [view.graph.to_dense()[:60, 60:] != 0 for view in objective._views]
    assert all(0.6 < float(view.sum()) / len(train.users) < 0.8 for view in one_layer)
    assert max(edges[:2]) <= edges[2]
    before = objective._views
    objective.begin_epoch()
    assert not torch.equal(before[0](torch.eye(96)), objective._views[0](torch.eye(96)))


@pytest.mark.parametrize("model", STARTABLE)
def test_a_training_begins_where_it_is_told_and_ends_when_it_is_told(model: str) -> None:
    train, _ = _block_matrix()
    rng = np.random.default_rng(6)
    start = tuple(rng.standard_normal((n, DIMENSION)).astype(np.float32) for n in (62, 39))
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def look(epoch: int, embeddings: Callable[[], tuple[np.ndarray, np.ndarray]]) -> bool:
        assert epoch == len(seen) + 1
        seen.append(embeddings())
        return epoch == 2

    still = replace(PARAMS[model], learning_rate=1e-9, layers=0)
    users, items = fit(model, train, 62, 39, still, 1, start=start, on_epoch=look)
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[1][0], users)
    np.testing.assert_array_equal(seen[1][1], items)
    expected = [x / np.linalg.norm(x, axis=1, keepdims=True) if model == "sgcl" else x for x in start]
    np.testing.assert_allclose(users[:60], expected[0][:60], atol=1e-5)
    np.testing.assert_allclose(items[:36], expected[1][:36], atol=1e-5)
    assert not users[60:].any()
    assert not items[36:].any()


def test_als_takes_no_start() -> None:
    train, _ = _block_matrix()
    start = (np.zeros((60, DIMENSION), np.float32), np.zeros((36, DIMENSION), np.float32))
    with pytest.raises(TypeError, match="als_cg begins and ends by itself"):
        fit("als_cg", train, 60, 36, PARAMS["als_cg"], 1, start=start)


@pytest.mark.parametrize("model", STARTABLE)
def test_an_item_without_pairs_is_scored_as_the_model_would(model: str) -> None:
    """A node that no edge reaches keeps its start; what the model scores for it is what its operator makes of that."""
    rng = np.random.default_rng(7)
    texts = rng.standard_normal((4, DIMENSION)).astype(np.float32)
    of_text = llm_init.text_map(texts, np.ones(4, int), DIMENSION, LLMInit(select="full", scale="raw"), 0)
    params = replace(PARAMS[model], layers=3)
    found = without_pairs(model, params, of_text)(texts)
    if model == "bpr":
        expected = texts
    else:
        graph = lightgcn.normalized_adjacency(np.array([0]), np.array([0]), 1, 5)
        operator = lightgcn.Propagation(graph, 3, torch.device("cpu"), torch.float32)
        ego = torch.from_numpy(np.concatenate([np.ones((2, DIMENSION), np.float32), texts]))
        expected = operator(ego)[2:].numpy()
        if model == "sgcl":
            expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


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
