"""What training measures on held-out items, against the same written down densely in float64, and what it does with it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from tests.test_filterllm import DIMENSION, USERS, WIDTH, _options, _shop
from udfs.filterllm import Config, FilterLLM, FilterLLMError, widened
from udfs.filterllm_items import FrozenTexts, Items, held_out
from udfs.filterllm_training import initialise, train

pytestmark = pytest.mark.usefixtures("one_thread")


def _fit(options, *, log=lambda line: None, texts=None, bias=True, wide=False):
    shop, hidden, vocabulary, _ = _shop()
    if wide:
        shop = Items(shop.item_ids, widened(shop.embeddings, WIDTH, 3), shop.indptr, shop.users)
        vocabulary = widened(vocabulary, WIDTH, 3)
    model = FilterLLM(Config(WIDTH, vocabulary.shape[1], USERS, hidden=32, user_bias=bias))
    initialise(model, vocabulary, np.bincount(shop.users, minlength=USERS), hidden, seed=3)
    return model, train(model, texts(hidden) if texts else FrozenTexts(hidden), shop, options, log)


@pytest.mark.parametrize("bias", [True, False])
def test_ndcg_and_nll_are_those_of_the_dense_distribution(bias):
    model, facts = _fit(_options(epochs=1), bias=bias)
    model.scale.fill_(1.0)  # training measures before it fits the scale
    shop, hidden, _, _ = _shop()
    index = np.flatnonzero(held_out(shop.item_ids, 0.2, 3))
    keys, offsets = model.keys()
    logits = model.queries(hidden[index]).astype(float) @ keys.T.astype(float) + (0 if offsets is None else offsets)
    log_p = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    truth = np.zeros((USERS, len(index)), bool)
    for column, item in enumerate(index):
        truth[shop.users[shop.indptr[item] : shop.indptr[item + 1]], column] = True
    gains = []
    for user in np.flatnonzero(truth.any(axis=1)):
        hits = truth[user, np.argsort(-log_p[:, user], kind="stable")[:20]]
        discount = 1 / np.log2(np.arange(20) + 2)
        gains.append(hits @ discount / discount[: truth[user].sum()].sum())
    assert facts["validation_ndcg"] == pytest.approx(np.mean(gains), abs=1e-6)
    assert facts["validation_nll"] == pytest.approx(-np.mean([log_p[n][truth[:, n]].mean() for n in range(len(index))]))


def test_the_epoch_that_is_kept_is_the_best_by_what_the_settings_say():
    # A rate so high that the two measures do not have their best in the same epoch.
    options = {"epochs": 12, "learning_rate": 5e-2, "patience": 12}
    _, by_nll = _fit(_options(**options))
    _, by_ndcg = _fit(_options(**options, stop_by="ndcg"))
    nll, ndcg = ([epoch[name] for epoch in by_nll["history"]] for name in ("validation_nll", "validation_ndcg"))
    assert by_nll["history"] == by_ndcg["history"]
    assert by_nll["best_epoch"] == 1 + int(np.argmin(nll))
    assert by_ndcg["best_epoch"] == 1 + int(np.argmax(ndcg))
    assert by_nll["best_epoch"] != by_ndcg["best_epoch"]
    assert by_ndcg["validation_ndcg"] == max(ndcg)


class _Shifted(FrozenTexts):
    """Texts with something to train in them, as adapters are, and their lengths."""

    def __init__(self, hidden: np.ndarray) -> None:
        super().__init__(hidden)
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.lengths = np.full(len(hidden), 7)

    def forward(self, index: np.ndarray) -> torch.Tensor:
        return super().forward(index) + self.shift


def test_texts_learn_at_their_own_rate_and_a_line_tells_everything():
    moved = []
    for rate in (1e-9, 1e-2):
        source: list[_Shifted] = []
        lines: list[str] = []
        _fit(
            _options(epochs=2, lora_learning_rate=rate),
            log=lines.append,
            texts=lambda hidden, source=source: source.append(_Shifted(hidden)) or source[0],
        )
        moved.append(source[0].shift.abs().max().item())
    assert moved[0] < 1e-7
    assert moved[1] > 1e-3
    number = r"[\d.]+"
    pattern = (
        rf"epoch 2/2: loss {number} \(distribution {number}, guiding {number}\), lr {number}e-\d+, \d+ items/s, "
        rf"\d+ tokens/s, validation nll {number}, ndcg@20 {number}"
    )
    assert re.fullmatch(pattern, lines[-1])


def test_the_full_width_keeps_inner_products_and_learns():
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(30, DIMENSION)), rng.normal(size=(20, DIMENSION))
    wide = widened(users, 50, seed=1), widened(items, 50, seed=1)
    assert wide[0].shape == (30, 50)
    np.testing.assert_allclose(wide[0] @ wide[1].T, users @ items.T, atol=1e-5)
    assert not np.allclose(wide[0], widened(users, 50, seed=2))
    with pytest.raises(FilterLLMError, match=r"8 dimensions .* language model's 5"):
        widened(users, 5, seed=1)
    model, facts = _fit(_options(epochs=6), wide=True)
    assert model.config.dimension == WIDTH
    assert facts["calibrated_nll"] < np.log(15) + 0.3  # at best 5 users of a topic's 15


@pytest.mark.parametrize("proposal", ["uniform", "popularity"])
def test_the_sampled_softmax_learns_what_the_full_one_does(proposal):
    _, full = _fit(_options(epochs=6))
    _, sampled = _fit(_options(epochs=6, softmax="sampled", samples=30, proposal=proposal))
    assert sampled["calibrated_nll"] < full["calibrated_nll"] + 0.1
    assert sampled["validation_ndcg"] > full["validation_ndcg"] - 0.05
