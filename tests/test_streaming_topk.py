"""Streaming top-K, log-sum-exp and sampling over users, against dense float64."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from udfs import streaming_topk, user_sampling
from udfs.streaming_topk import merge, top_k
from udfs.user_sampling import Gumbel, draw, item_keys, uniform

ITEMS, USERS, D = 300, 3000, 16


@pytest.fixture(scope="module")
def case():
    generator = torch.Generator().manual_seed(3)
    queries, keys = torch.randn(ITEMS, D, generator=generator), torch.randn(USERS, D, generator=generator)
    return queries, keys, torch.randn(USERS, generator=generator), torch.rand(USERS, generator=generator) < 0.7


def _dense(queries, keys, bias, allowed):
    """[n, U] logits in float64 rounded to float32, and the log-sum-exp."""
    logits = queries.double() @ keys.double().T + bias.double()
    logits[:, ~allowed] = -torch.inf
    return logits.float().double(), torch.logsumexp(logits, dim=1)


def _same(a, b):
    assert torch.equal(a.users, b.users)
    assert torch.equal(a.logits, b.logits)
    torch.testing.assert_close(a.lse, b.lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tile", [1, 7, 512, 5000])
@pytest.mark.parametrize("k", [1, 20])
def test_equals_the_dense_oracle(case, tile, k):
    queries, keys, bias, allowed = case
    queries = queries[:40] if tile == 1 else queries
    logits, lse = _dense(queries, keys, bias, allowed)
    ours = top_k(queries, keys, k, bias=bias, allowed=allowed, tile=tile)
    order = np.lexsort((np.broadcast_to(np.arange(USERS), logits.shape), -logits.numpy()))[:, :k]
    assert np.array_equal(ours.users, order)
    assert np.array_equal(ours.logits, np.take_along_axis(logits.numpy(), order, 1))
    torch.testing.assert_close(ours.lse, lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.probabilities, torch.exp(ours.logits - lse[:, None]), rtol=1e-5, atol=0)


def test_ties_go_to_the_smaller_user_whatever_the_tile():
    # Integers: every product is exact, and most users tie. 500 equal users are far more than any margin.
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-2, 3, (50, 4), generator=generator).float()
    keys = torch.randint(-2, 3, (2000, 4), generator=generator).float()
    keys[500:1000] = 3.0
    logits = (queries.double() @ keys.double().T).numpy()
    order = np.lexsort((np.broadcast_to(np.arange(2000), logits.shape), -logits))[:, :30]
    for tile in (3, 100, 999, 4000):
        assert np.array_equal(top_k(queries, keys, 30, tile=tile).users, order)


def test_a_bfloat16_vocabulary_is_scored_as_its_float32_copy(case):
    queries, keys, bias, allowed = case
    rough = keys.bfloat16()
    ours = top_k(queries, rough, 20, bias=bias, allowed=allowed, tile=512)
    _same(ours, top_k(queries, rough.float(), 20, bias=bias, allowed=allowed, tile=512))


def test_zeros_of_both_signs_tie():
    keys = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert top_k(torch.zeros(2, 1), keys, 3).users.tolist() == top_k(-torch.zeros(1, 1), keys, 3).users.tolist() * 2
    assert top_k(torch.zeros(1, 1), keys, 3).users.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("cuts", [(1500,), (1, 30, 2999)])
def test_shards_of_the_vocabulary_merge_exactly(case, cuts):
    queries, keys, bias, allowed = case
    whole = top_k(queries, keys, 20, bias=bias, allowed=allowed)
    starts = [0, *cuts]
    parts = [
        top_k(queries, keys[a:b], 20, bias=bias[a:b], allowed=allowed[a:b], tile=100, first_user=a)
        for a, b in zip(starts, [*cuts, USERS], strict=True)
    ]
    _same(merge(parts, 20), whole)


def test_a_shard_without_allowed_users_adds_nothing(case):
    queries, keys, bias, _ = case
    allowed = torch.arange(USERS) < 1000
    whole = top_k(queries, keys, 5, bias=bias, allowed=allowed, tile=100)
    parts = [
        top_k(queries, keys[a:b], 5, bias=bias[a:b], allowed=allowed[a:b], first_user=a)
        for a, b in ((0, 1000), (1000, USERS))
    ]
    assert parts[1].users.shape == (ITEMS, 0)
    _same(merge(parts, 5), whole)


def test_fewer_users_than_k_and_no_items(case):
    queries, keys, _, _ = case
    few = top_k(queries, keys[:7], 20)
    assert few.users.shape == (ITEMS, 7)
    torch.testing.assert_close(few.probabilities.sum(1), torch.ones(ITEMS, dtype=torch.float64), rtol=0, atol=1e-5)
    assert top_k(queries[:0], keys, 20).users.shape == (0, 20)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_users_in_the_order_of_their_scores(order):
    # Ascending, every user is among the best so far; descending, none is after the first tile.
    keys = torch.arange(5000.0)[:, None] / 5000
    keys = keys if order == "ascending" else keys.flip(0)
    ours = top_k(torch.tensor([[1.0], [2.0]]), keys, 20, tile=256)
    best = torch.arange(4999, 4979, -1) if order == "ascending" else torch.arange(20)
    assert torch.equal(ours.users, best.expand(2, 20))


@pytest.mark.parametrize("offset", [-1000.0, -50.0, 70.0, 1000.0])
def test_log_sum_exp_far_from_zero(case, offset):
    queries, keys, bias, allowed = case
    logits, lse = _dense(queries, keys, bias + offset, allowed)
    ours = top_k(queries, keys, 5, bias=bias + offset, allowed=allowed, tile=500)
    # The logits themselves are float32, so what is lost beside it is a few of their last bits.
    torch.testing.assert_close(ours.lse, lse, rtol=3e-7, atol=1e-6)
    assert torch.equal(ours.logits, logits.sort(1, descending=True).values[:, :5])


def test_items_do_not_influence_each_other(case):
    queries, keys, bias, _ = case
    whole = top_k(queries, keys, 20, bias=bias)
    alone = top_k(queries[137:138], keys, 20, bias=bias, tile=64)
    assert torch.equal(whole.lse, top_k(queries, keys, 20, bias=bias).lse)
    assert torch.equal(whole.users[137:138], alone.users)
    assert torch.equal(whole.logits[137:138], alone.logits)


def test_probabilities_stay_in_range_far_out_in_the_tail():
    queries, keys = torch.tensor([[1.0]]), torch.tensor([[2000.0], [0.0], [-2000.0]])
    p = top_k(queries, keys, 3).probabilities
    assert p[0, 0] == 1.0
    assert bool((p > 0).all())
    assert bool((p.diff(dim=1) <= 0).all())


def test_items_by_users_never_exists(case):
    queries, keys, bias, allowed = case
    largest = 0

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a dispatch mode sees its own thread only
    try:
        with Shapes():
            top_k(queries, keys, 5, bias=bias, allowed=allowed, tile=64)
    finally:
        torch.set_num_threads(before)
    # Larger than a tile of a block of items are only the candidates' vectors.
    assert largest <= streaming_topk._ROWS["cpu"] * max(
        64 + 5 + streaming_topk._MARGIN, D * (5 + streaming_topk._MARGIN)
    )
    assert largest < ITEMS * USERS


def test_bad_numbers_are_refused(case):
    queries, keys, _, _ = case
    with pytest.raises(ValueError, match="not a number"):
        top_k(torch.full_like(queries, torch.nan), keys, 3)
    with pytest.raises(ValueError, match="infinite"):
        top_k(torch.full_like(queries, 3e38), keys, 3)
    with pytest.raises(ValueError, match="1 or more"):
        top_k(queries, keys, 0)


# --- sampling


def test_uniform_is_splitmix64():
    def reference(state: int, count: int) -> list[float]:
        mask, numbers = 2**64 - 1, []
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) & mask
            z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            numbers.append((((z ^ (z >> 31)) >> 12) + 0.5) * 2.0**-52)
        return numbers

    keys = item_keys(7, ["a", "b"])
    ours = uniform(keys[:, None], torch.arange(50))
    for row, key in zip(ours.tolist(), keys.tolist(), strict=True):
        assert row == reference(key % 2**64, 50)


def test_noise_is_uniform_and_gumbel():
    u = uniform(item_keys(1, [f"i{n}" for n in range(200)])[:, None], torch.arange(1000)).flatten().numpy()
    assert u.min() > 0
    assert u.max() < 1
    assert np.abs(np.sort(u) - (np.arange(u.size) + 0.5) / u.size).max() < 1.63 / u.size**0.5  # Kolmogorov, 1 %
    noise = Gumbel(item_keys(1, ["x"]))(torch.arange(1), torch.arange(100_000))
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.02)
    assert noise.var().item() == pytest.approx(np.pi**2 / 6, rel=0.03)


def test_noise_of_a_group_of_users_is_bounded_by_one_number():
    noise = Gumbel(item_keys(3, [f"i{n}" for n in range(50)]))
    items = torch.arange(50)
    for start in (0, 32, 45):  # with the groups, and across them
        first = torch.arange(start, start + 3200, 32)
        dense = noise(items, torch.arange(start, start + 3200)).view(50, 100, 32).amax(2)
        bound = noise.highest(items, first, 32)
        assert bool((bound >= dense).all())
        if start % 32 == 0:
            torch.testing.assert_close(bound, dense, rtol=0, atol=1e-9)
    # Neighbours in a group are independent: correlations of 4e5 pairs, at distances within and across groups.
    long = noise(items, torch.arange(8192))
    for distance in (1, 2, 31, 32):
        pairs = torch.corrcoef(torch.stack([long[:, :-distance].flatten(), long[:, distance:].flatten()]))
        assert abs(pairs[0, 1].item()) < 4 / (50 * 8192) ** 0.5


@pytest.mark.parametrize(("k", "temperature", "first_user"), [(10, 1.0, 0), (1, 0.3, 7), (200, 3.0, 64)])
def test_draws_equal_the_definition(case, k, temperature, first_user):
    queries, keys, bias, allowed = case
    ids = [f"item-{n}" for n in range(ITEMS)]
    logits, _ = _dense(queries, keys, bias, allowed)
    noise = Gumbel(item_keys(4, ids))(torch.arange(ITEMS), torch.arange(first_user, first_user + USERS))
    best = torch.topk(logits / temperature + noise, k, dim=1)
    drawn = draw(
        queries, keys, k, item_ids=ids, seed=4, bias=bias, allowed=allowed, temperature=temperature,
        first_user=first_user, tile=640,
    )  # fmt: skip
    assert torch.equal(drawn.users, best.indices + first_user)
    assert torch.equal(drawn.scores, best.values)


def test_marginals_are_those_of_drawing_without_replacement():
    draws, k, temperature = 20_000, 2, 1.7
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    p = torch.softmax(logits.double() / temperature, 0).numpy()
    expected = np.zeros(5)
    for first, second in permutations(range(5), 2):
        expected[[first, second]] += p[first] * p[second] / (1 - p[first])
    drawn = draw(
        torch.ones(draws, 1), logits[:, None], k, item_ids=[str(n) for n in range(draws)], seed=5,
        temperature=temperature, tile=2,
    )  # fmt: skip
    counts = np.bincount(drawn.users.flatten().numpy(), minlength=5) / draws
    assert np.abs(counts - expected).max() < 4 * np.sqrt(0.25 / draws)
    first = np.bincount(drawn.users[:, 0].numpy(), minlength=5) / draws
    assert np.abs(first - p).max() < 4 * np.sqrt(0.25 / draws)
    # The probabilities are those of p itself, not of the flattened distribution.
    plain = torch.softmax(logits.double(), 0)
    torch.testing.assert_close(drawn.probabilities, plain[drawn.users], rtol=1e-5, atol=0)


def test_draws_do_not_depend_on_tiles_shards_or_company(case):
    queries, keys, bias, allowed = case
    ids = [f"item-{n}" for n in range(ITEMS)]
    whole = draw(queries, keys, 10, item_ids=ids, seed=1, bias=bias, allowed=allowed)
    _same(draw(queries, keys, 10, item_ids=ids, seed=1, bias=bias, allowed=allowed, tile=37), whole)
    halves = [
        draw(queries, keys[a:b], 10, item_ids=ids, seed=1, bias=bias[a:b], allowed=allowed[a:b], first_user=a)
        for a, b in ((0, 1100), (1100, USERS))
    ]
    _same(merge(halves, 10), whole)
    back = torch.arange(ITEMS - 1, -1, -1)
    turned = draw(queries[back], keys, 10, item_ids=ids[::-1], seed=1, bias=bias, allowed=allowed, tile=100)
    assert torch.equal(turned.users[back], whole.users)
    assert not torch.equal(draw(queries, keys, 10, item_ids=ids, seed=2, bias=bias, allowed=allowed).users, whole.users)
    assert bool(allowed[whole.users].all())
    assert all(len(set(row)) == 10 for row in whole.users.tolist())
    ranked = whole.by_probability()
    assert bool((ranked.probabilities.diff(dim=1) <= 0).all())
    assert torch.equal(ranked.users.sort(1).values, whole.users.sort(1).values)


def test_low_temperature_is_top_k(case):
    queries, keys, bias, _ = case
    cold = draw(queries, keys, 5, item_ids=[str(n) for n in range(ITEMS)], seed=1, bias=bias, temperature=1e-6)
    assert torch.equal(cold.users, top_k(queries, keys, 5, bias=bias).users)
    assert user_sampling.item_keys(1, []).shape == (0,)
