"""udfs/two_tower.py: the shapes of the paper, the users it keeps, and what its result does not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from udfs.two_tower import Options, TwoTower, candidates, train, user_inputs

SMALL = Options(hidden=32, dimension=8, epochs=30, batch_size=64, seed=3)


def topics(users_a_topic=12, items_a_topic=15, seed=0):
    """Items in 4 topics, users who take items of one: (states [60, 10], their topics, indptr, indices)."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(4, 10))
    topic = np.repeat(np.arange(4), items_a_topic)
    states = (centres[topic] + 0.4 * rng.normal(size=(len(topic), 10))).astype(np.float32)
    lists = [rng.choice(np.flatnonzero(topic == u % 4), 6, replace=False) for u in range(4 * users_a_topic)]
    return states, centres, np.arange(0, 6 * len(lists) + 1, 6), np.concatenate(lists)


def test_the_towers_are_the_papers():
    model = TwoTower(576, Options())
    shapes = [tuple(p.shape) for p in model.item.parameters()]
    assert shapes == [(2048, 576), (2048,), (200, 2048), (200,)]
    assert [tuple(p.shape) for p in model.user.parameters()] == shapes


def test_a_user_is_the_mean_of_its_items():
    states = np.arange(12, dtype=np.float32).reshape(4, 3)
    found = user_inputs(states, np.array([0, 2, 2, 3]), np.array([0, 3, 1]))
    np.testing.assert_allclose(found, [(states[0] + states[3]) / 2, [0, 0, 0], states[1]])
    assert found.dtype == np.float32


def test_candidates_of_a_new_item_are_the_users_of_its_topic():
    states, centres, indptr, indices = topics()
    lines: list[str] = []
    model = train(states, indptr, indices, SMALL, lines.append)
    rng = np.random.default_rng(9)
    cold_topics = np.repeat(np.arange(4), 5)
    cold = (centres[cold_topics] + 0.4 * rng.normal(size=(20, 10))).astype(np.float32)
    profiles = user_inputs(states, indptr, indices)
    found = candidates(model, cold, profiles, 10)
    right = found.users.numpy() % 4 == cold_topics[:, None]
    assert right.mean() > 0.9  # at random, a quarter
    losses = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert len(losses) == 30
    assert losses[-1] < 0.5 * losses[0]
    # the highest of all users by the towers' own inner product
    dense = (model.vectors(cold, model.item) @ model.vectors(profiles, model.user).T).numpy()
    np.testing.assert_array_equal(np.sort(found.users.numpy()), np.sort(np.argsort(-dense, axis=1)[:, :10]))
    allowed = np.arange(len(profiles)) % 4 != 0
    assert not (candidates(model, cold, profiles, 10, allowed).users.numpy() % 4 == 0).any()


def test_the_seed_decides():
    states, _, indptr, indices = topics()
    options = Options(hidden=16, dimension=4, epochs=2, batch_size=64, seed=5)
    torch.manual_seed(1)
    first = train(states, indptr, indices, options, lambda line: None)
    torch.manual_seed(2)
    same = train(states, indptr, indices, options, lambda line: None)
    other = train(states, indptr, indices, Options(**{**vars(options), "seed": 6}), lambda line: None)
    for name, value in first.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(first.item[0].weight, other.item[0].weight)


def test_users_of_one_item_are_trained_without_it_and_no_pairs_are_an_error():
    states = np.eye(3, dtype=np.float32)
    model = train(states, np.array([0, 1, 2]), np.array([0, 1]), SMALL, lambda line: None)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(ValueError, match="training pairs"):
        train(states, np.array([0, 0]), np.array([], np.int64), SMALL, lambda line: None)
