"""What LightGCN, SGL and SGCL minimise, of a small graph in float64, against the papers' equations over dense matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from udfs import bpr, lightgcn, pair_training, sgcl, sgl
from udfs.cf_inputs import CfParams

USERS, ITEMS, WIDTH = 4, 6, 3
PAIRS = np.array([(0, 0), (0, 1), (1, 1), (1, 2), (2, 0), (2, 2), (2, 3), (3, 4)])
BATCH = np.array([0, 2, 3, 6])
WEIGHTS = np.array([0.5, 1.0, 1.5, 1.0, 0.75, 1.25, 1.0, 1.0])


def data() -> pair_training.Data:
    users, items = (torch.from_numpy(PAIRS[:, side].copy()) for side in (0, 1))
    return pair_training.Data(users, items, torch.from_numpy(WEIGHTS), USERS, ITEMS, torch.Generator().manual_seed(3))


def propagated(pairs: np.ndarray, ego: np.ndarray, layers: int) -> np.ndarray:
    """The mean of E, A E, A^2 E, ... with A = D^-1/2 (pairs both ways) D^-1/2 (LightGCN, equations 3, 4 and 8)."""
    adjacency = np.zeros((USERS + ITEMS, USERS + ITEMS))
    adjacency[pairs[:, 0], USERS + pairs[:, 1]] = 1
    adjacency += adjacency.T
    degree = adjacency.sum(1)
    root = np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    found, layer = ego.copy(), ego
    for _ in range(layers):
        layer = (root[:, None] * adjacency * root) @ layer
        found += layer
    return found / (layers + 1)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T) / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))


def bpr_over_graph(ego: np.ndarray, params: CfParams, negatives: np.ndarray) -> float:
    """-ln sigmoid(e_u . e_i - e_u . e_j) over the propagated rows, and L2 of the rows that are learnt (LightGCN, equation 15)."""
    rows = propagated(PAIRS, ego, params.layers)
    triples = PAIRS[BATCH, 0], USERS + PAIRS[BATCH, 1], USERS + negatives
    u, i, j = (rows[part] for part in triples)
    ranking = (WEIGHTS[BATCH] * np.log1p(np.exp(-(u * (i - j)).sum(1)))).mean()
    return ranking + params.weight_decay / 2 * sum((ego[part] ** 2).sum(1) for part in triples).mean()


def drawn(objective: Callable[[], torch.Tensor], of: pair_training.Data) -> tuple[float, np.ndarray]:
    """What the objective costs, and the negatives that it drew."""
    state = of.generator.get_state()
    cost = float(objective())
    of.generator.set_state(state)
    sampler = bpr.NegativeSampler(of.users, of.items, ITEMS, of.generator)
    negatives, counts = sampler(of.users[BATCH])
    assert counts.all()
    return cost, negatives.numpy()


@pytest.mark.parametrize("layers", [1, 2])
def test_lightgcn_minimises_bpr_over_what_the_graph_makes(layers: int) -> None:
    of, params = data(), CfParams(dimension=WIDTH, layers=layers, weight_decay=0.1, device="cpu")
    ego = np.random.default_rng(1).standard_normal((USERS + ITEMS, WIDTH))
    objective = lightgcn.objective(of, params)
    cost, negatives = drawn(lambda: objective.loss(torch.from_numpy(ego), torch.from_numpy(BATCH)), of)
    assert cost == pytest.approx(bpr_over_graph(ego, params, negatives), rel=1e-12)
    np.testing.assert_allclose(
        objective.embeddings(torch.from_numpy(ego)).numpy(), propagated(PAIRS, ego, layers), atol=1e-14
    )


def test_sgl_adds_info_nce_between_two_views_of_the_graph() -> None:
    of = data()
    params = CfParams(
        dimension=WIDTH,
        layers=2,
        weight_decay=0.1,
        edge_dropout=0.3,
        contrast_weight=0.5,
        temperature=0.3,
        device="cpu",
    )
    ego = np.random.default_rng(2).standard_normal((USERS + ITEMS, WIDTH))
    kept = []
    again = torch.Generator().manual_seed(3)
    for _ in range(2):
        kept.append(PAIRS[(torch.rand(len(PAIRS), generator=again) >= params.edge_dropout).numpy()])
    assert {len(pairs) for pairs in kept} != {len(PAIRS)}
    objective = sgl.Sgl(of, params)
    objective.begin_epoch()
    cost, negatives = drawn(lambda: objective.loss(torch.from_numpy(ego), torch.from_numpy(BATCH)), of)
    views = [propagated(pairs, ego, params.layers) for pairs in kept]
    contrast = 0.0
    for rows in (np.unique(PAIRS[BATCH, 0]), USERS + np.unique(PAIRS[BATCH, 1])):
        near = np.exp(cosines(views[0][rows], views[1][rows]) / params.temperature)
        contrast += -np.log(np.diag(near) / near.sum(1)).mean()
    expected = bpr_over_graph(ego, params, negatives) + params.contrast_weight * contrast
    assert cost == pytest.approx(expected, rel=1e-12)


def test_sgcl_contrasts_the_pairs_of_a_batch() -> None:
    of = data()
    params = CfParams(dimension=WIDTH, layers=2, weight_decay=0.1, temperature=0.2, device="cpu")
    ego = np.random.default_rng(3).standard_normal((USERS + ITEMS, WIDTH))
    objective = sgcl.Sgcl(of, params)
    rows = propagated(PAIRS, ego, params.layers)
    of_users, of_items = PAIRS[BATCH, 0], USERS + PAIRS[BATCH, 1]
    u, i = rows[of_users], rows[of_items]
    away = sum(np.exp(cosines(side, side) / params.temperature).sum(1) for side in (u, i))
    near = np.exp(np.diag(cosines(u, i)) / params.temperature)
    penalty = params.weight_decay / 2 * ((ego[of_users] ** 2).sum(1) + (ego[of_items] ** 2).sum(1)).mean()
    expected = (WEIGHTS[BATCH] * -np.log(near / away)).mean() + penalty
    given = torch.from_numpy(ego).requires_grad_()
    found = objective.loss(given, torch.from_numpy(BATCH))
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda one: objective.loss(one, torch.from_numpy(BATCH)), (given,))
    np.testing.assert_allclose(
        objective.embeddings(given).detach().numpy(), rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-14
    )
