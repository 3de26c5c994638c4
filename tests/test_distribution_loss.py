"""The chunked distribution loss against the dense one in float64."""

from __future__ import annotations

import pytest
import torch

from udfs import distribution_loss
from udfs.distribution_loss import guiding_loss, loss


def _case(items=9, users=53, d=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(items, d, generator=generator, dtype=dtype)
    vocabulary = torch.randn(users, d, generator=generator, dtype=dtype) * 2
    bias = torch.randn(users, generator=generator, dtype=dtype)
    lists = [torch.randperm(users, generator=generator)[: 1 + (3 * i) % 11] for i in range(items)]
    indptr = torch.tensor([0, *torch.tensor([len(x) for x in lists]).cumsum(0).tolist()])
    return hidden, vocabulary, bias, indptr, torch.cat(lists), lists


def _dense(hidden, vocabulary, bias, lists):
    log_p = torch.log_softmax(hidden @ vocabulary.T + (0 if bias is None else bias), dim=1)
    return torch.stack([-log_p[i, users].mean() for i, users in enumerate(lists)])


@pytest.mark.parametrize("chunk", [1, 10, 53, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_the_dense_loss(chunk, with_bias):
    *parameters, indptr, users, lists = _case()
    if not with_bias:
        parameters[2] = None
    weights = torch.linspace(0.5, 2, 9, dtype=torch.float64)
    results = []
    for function in (lambda h, z, b: loss(h, z, indptr, users, b, chunk=chunk), lambda h, z, b: _dense(h, z, b, lists)):
        leaves = [p.clone().requires_grad_() if p is not None else None for p in parameters]
        value = function(*leaves)
        (value * weights).sum().backward()
        results.append([value.detach(), *[leaf.grad for leaf in leaves if leaf is not None]])
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-11, atol=1e-12)


def test_kept_and_recomputed_tiles_give_the_same_gradients_twice(monkeypatch):
    monkeypatch.setattr(distribution_loss, "_CELLS", {"cpu": 0})  # tiles of 256 users, three of them kept
    hidden, vocabulary, bias, indptr, users, lists = _case(users=2000)
    leaves = [t.requires_grad_() for t in (hidden, vocabulary, bias)]
    dense = torch.autograd.grad(_dense(*leaves, lists).sum(), leaves)
    value = loss(*leaves[:2], indptr, users, leaves[2], chunk=1000).sum()
    for _ in range(2):
        ours = torch.autograd.grad(value, leaves, retain_graph=True)
        for one, other in zip(ours, dense, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_threads_change_no_bit(monkeypatch):
    monkeypatch.setattr(distribution_loss, "_CELLS", {"cpu": 0})
    hidden, vocabulary, bias, indptr, users, _ = _case(users=2000, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (hidden, vocabulary, bias)]
            value = loss(leaves[0], leaves[1], indptr, users, leaves[2], chunk=1000)
            results.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_gradcheck():
    hidden, vocabulary, bias, indptr, users, _ = _case(items=3, users=11, d=4)
    leaves = [t.requires_grad_() for t in (hidden, vocabulary, bias)]
    assert torch.autograd.gradcheck(lambda h, z, b: loss(h, z, indptr, users, b, chunk=4), leaves)


def test_float32_is_close_to_float64_at_large_logits():
    hidden, vocabulary, bias, indptr, users, lists = _case(users=2000, d=16)
    exact = _dense(hidden * 10, vocabulary * 10, bias, lists)
    ours = loss(hidden.float() * 10, vocabulary.float() * 10, indptr, users, bias.float(), chunk=128)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-3)


def test_logits_of_all_users_never_exist(monkeypatch):
    hidden, vocabulary, bias, indptr, users, _ = _case(users=4000)
    seen = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                seen.append(result.numel())
            return result

    leaves = [t.requires_grad_() for t in (hidden, vocabulary, bias)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # a dispatch mode sees its own thread only
    with Shapes():
        loss(leaves[0], leaves[1], indptr, users, leaves[2], chunk=500).sum().backward()
    # The largest tensor is the vocabulary's gradient [4000, 7]; logits would have been [9, 4000].
    assert max(seen) == 4000 * 7


def test_wrong_targets_are_refused():
    hidden, vocabulary, bias, indptr, users, _ = _case()
    with pytest.raises(ValueError, match="at least one training user"):
        loss(hidden, vocabulary, torch.zeros_like(indptr), users[:0], bias)
    with pytest.raises(ValueError, match=r"0\.\.52"):
        loss(hidden, vocabulary, indptr, users + 40, bias)


def test_guiding_loss_is_the_mean_over_batch_and_dimensions():
    mapped, embeddings = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert guiding_loss(mapped, embeddings).item() == pytest.approx((1 + 4 + 0 + 4) / 4)
