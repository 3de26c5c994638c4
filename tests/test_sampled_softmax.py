"""The sampled softmax against dense float64 computations of the same objective, and against the full loss it estimates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from udfs import distribution_loss
from udfs.row_adamw import RowAdamW
from udfs.sampled_softmax import Drawn, Proposal, loss

USERS, WIDTH = 40, 5


def _problem(seed=0, users=USERS):
    """hidden, vocabulary, bias (float64, to be differentiated), and three items' users."""
    generator = torch.Generator().manual_seed(seed)
    hidden, vocabulary, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((3, WIDTH), (users, WIDTH), (users,))
    )
    return (hidden, vocabulary, bias), torch.tensor([0, 3, 4, 8]), torch.tensor([0, 7, 9, 39, 9, 2, 21, 33])


def _dense(hidden, vocabulary, bias, indptr, users, drawn: Drawn):
    """The same objective, as it is written down, with autograd's own derivatives."""
    logits = hidden @ vocabulary.T + bias
    losses = []
    for item in range(len(hidden)):
        own = users[indptr[item] : indptr[item + 1]]
        others = ~torch.isin(drawn.users, own)
        terms = [logits[item, own], logits[item, drawn.users[others]] + drawn.log_weight[others]]
        losses.append(torch.logsumexp(torch.cat(terms), 0) - logits[item, own].mean())
    return torch.stack(losses)


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
@pytest.mark.parametrize("chunk", [3, 64])
def test_loss_and_gradients_are_those_of_the_written_objective(kind, chunk):
    inputs, indptr, users = _problem()
    drawn = Proposal(kind, np.arange(USERS)[::-1]).draw(25, seed=1, epoch=1, step=0)
    assert torch.isin(drawn.users, users).any()  # there are accidental hits
    weights = torch.tensor([0.2, 1.5, -0.7], dtype=torch.float64)
    found = loss(inputs[0], inputs[1], indptr, users, inputs[2], drawn=drawn, chunk=chunk)
    expected = _dense(*inputs, indptr, users, drawn)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    dense = torch.autograd.grad((expected * weights).sum(), inputs)
    touched = set(drawn.users.tolist()) | set(users.tolist())
    assert gradients[1].is_sparse
    assert set(gradients[1].coalesce().indices()[0].tolist()) == touched
    assert len(touched) < USERS
    for one, other in zip(gradients, dense, strict=True):
        torch.testing.assert_close(one.to_dense(), other, rtol=1e-11, atol=1e-12)
    # In float32 and without a bias it is the same within rounding.
    narrow = [t.detach().float() for t in inputs[:2]]
    without = loss(narrow[0], narrow[1], indptr, users, drawn=drawn, chunk=chunk)
    expected = _dense(*inputs[:2], torch.zeros_like(inputs[2]), indptr, users, drawn)
    torch.testing.assert_close(without.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_the_normaliser_is_unbiased_and_the_loss_converges_to_the_full_one(kind):
    (hidden, vocabulary, bias), indptr, users = _problem()
    popularity = np.exp(bias.detach().numpy()) * 3
    proposal = Proposal(kind, popularity)
    with torch.no_grad():
        full = distribution_loss.loss(hidden, vocabulary, indptr, users, bias)
        # At four draws the loss itself is far off, yet Z is right on average.
        few = torch.stack(
            [
                loss(hidden, vocabulary, indptr, users, bias, drawn=proposal.draw(4, seed=1, epoch=2, step=step))
                for step in range(4000)
            ]
        )
        ratio = torch.exp(few - full)  # the positives' logits cancel: Z estimated / Z
        error = ratio.std(0) / len(ratio) ** 0.5
        assert (error < 0.05).all()
        assert ((ratio.mean(0) - 1).abs() < 4 * error).all()
        assert (few.mean(0) < full - 0.02).any()  # Jensen: the log is biased at so few
        errors = []
        for samples in (100, 10_000, 1_000_000):
            drawn = proposal.draw(samples, seed=1, epoch=3, step=0)
            errors.append((loss(hidden, vocabulary, indptr, users, bias, drawn=drawn) - full).abs().max().item())
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 5e-3


def test_draws_follow_the_proposal_and_their_key():
    popularity = np.array([0, 1, 3, 5])
    proposal = Proposal("popularity", popularity)
    np.testing.assert_allclose(np.exp(proposal.log_q(np.arange(4))), (popularity + 1) / 13)
    drawn = proposal.draw(200_000, seed=1, epoch=1, step=4)
    times = torch.exp(drawn.log_weight).numpy() * np.exp(proposal.log_q(drawn.users.numpy()))
    np.testing.assert_allclose(times, (popularity + 1) / 13, atol=0.005)
    assert torch.equal(proposal.draw(50, 1, 1, 4).users, proposal.draw(50, 1, 1, 4).users)
    wide = Proposal("uniform", np.zeros(10_000))
    assert not torch.equal(wide.draw(50, 1, 1, 4).users, wide.draw(50, 1, 1, 5).users)
    assert not torch.equal(wide.draw(50, 1, 1, 4).users, wide.draw(50, 1, 2, 4).users)


def test_more_rows_change_no_loss():
    (hidden, vocabulary, bias), indptr, users = _problem()
    drawn = Proposal("uniform", np.zeros(USERS)).draw(6, seed=1, epoch=1, step=0)
    wider = drawn.including(torch.tensor([1, 2, 30]))
    assert len(wider.users) > len(drawn.users)
    for one, other in zip(
        torch.autograd.grad(loss(hidden, vocabulary, indptr, users, bias, drawn=drawn).sum(), (hidden, vocabulary)),
        torch.autograd.grad(loss(hidden, vocabulary, indptr, users, bias, drawn=wider).sum(), (hidden, vocabulary)),
        strict=True,
    ):
        torch.testing.assert_close(one.to_dense(), other.to_dense())


def test_what_cannot_be_is_refused():
    (hidden, vocabulary, bias), indptr, users = _problem()
    drawn = Proposal("uniform", np.zeros(USERS)).draw(6, seed=1, epoch=1, step=0)
    with pytest.raises(ValueError, match="at least one training user"):
        loss(hidden, vocabulary, torch.tensor([0, 3, 3, 8]), users, bias, drawn=drawn)
    with pytest.raises(ValueError, match=r"0\.\.39"):
        loss(hidden, vocabulary, indptr, users + 5, bias, drawn=drawn)


def test_row_adamw_is_adamw_on_rows_that_are_always_touched():
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(6, 3, generator=generator)
    sparse, dense = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start[[1, 4]].clone())
    ours = RowAdamW([sparse], lr=0.1, weight_decay=0.01)
    theirs = torch.optim.AdamW([dense], lr=0.1, weight_decay=0.01)
    rows = torch.tensor([[1, 4]])
    for _ in range(20):
        gradient = torch.randn(2, 3, generator=generator)
        sparse.grad, dense.grad = torch.sparse_coo_tensor(rows, gradient, (6, 3), check_invariants=True), gradient
        ours.step()
        theirs.step()
    torch.testing.assert_close(sparse[[1, 4]], dense)
    assert torch.equal(sparse[[0, 2, 3, 5]], start[[0, 2, 3, 5]])
    assert ours.state[sparse]["step"].tolist() == [0, 20, 0, 0, 20, 0]
