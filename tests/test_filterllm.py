"""FilterLLM's model, its training, and LoRA, on small problems whose answer is known and on real weights."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch

from udfs import filterllm, lora
from udfs.distribution_loss import loss
from udfs.filterllm import Config, FilterLLM, FilterLLMError
from udfs.filterllm_items import FrozenTexts, Items, at_most, held_out
from udfs.filterllm_training import Options, initialise, train
from udfs.model_files import find_model
from udfs.text_encoder import TextEncoder

TOPICS, USERS, WIDTH, DIMENSION = 6, 90, 24, 8


pytestmark = pytest.mark.usefixtures("one_thread")


def _shop(items=240, seed=0):
    """Items of six topics, hidden states that tell the topic through noise, users who like one topic each.

    Of two shops of the same seed the smaller one is the beginning of the larger one.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(TOPICS, WIDTH)).astype(np.float32) * 3 + 5
    space = np.linalg.qr(rng.normal(size=(DIMENSION, DIMENSION)))[0][:TOPICS].astype(np.float32)
    rngs = [np.random.default_rng([seed, n]) for n in range(items)]
    topic = np.array([r.integers(TOPICS) for r in rngs])
    hidden = centres[topic] + np.array([r.normal(size=WIDTH) for r in rngs], np.float32)
    fans = [np.flatnonzero(np.arange(USERS) % TOPICS == t) for t in range(TOPICS)]
    lists = [np.sort(r.choice(fans[t], 5, replace=False)) for r, t in zip(rngs, topic, strict=True)]
    indptr = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
    ids = [f"item-{n}" for n in range(items)]
    shop = Items(ids, space[topic], indptr, np.concatenate(lists).astype(np.int64))
    return shop, hidden, space[np.arange(USERS) % TOPICS], topic


def _options(**changes):
    chosen = {
        "epochs": 12, "learning_rate": 1e-2, "weight_decay": 1e-4, "batch_size": 32, "guiding": 1.0, "max_users": 100,
        "validation_share": 0.2, "patience": 5, "vocabulary_chunk": 37, "seed": 3,
    }  # fmt: skip
    return Options(**{**chosen, **changes})


def _fit(config=None, options=None, users=True, lines=None):
    shop, hidden, vocabulary, _ = _shop()
    model = FilterLLM(
        Config(**{"width": WIDTH, "dimension": DIMENSION, "users": USERS, "hidden": 32, **(config or {})})
    )
    popularity = np.bincount(shop.users, minlength=USERS)
    initialise(model, vocabulary if users else None, popularity, hidden, seed=3)
    facts = train(model, FrozenTexts(hidden), shop, options or _options(), (lines if lines is not None else []).append)
    return model, facts


@pytest.mark.parametrize(
    ("config", "share", "slack"),
    [
        ({"mapper": "linear"}, 0.95, 0.3),
        # g of a single layer with ReLU has no negative part: half of a narrow space is out of its reach.
        ({"mapper": "linear_relu"}, 0.6, 0.8),
        ({"mapper": "mlp", "noise": 0.1}, 0.95, 0.3),
    ],
)
def test_every_mapper_finds_the_topics_users(config, share, slack):
    model, facts = _fit(config)
    _, hidden, _, topic = (part[240:] if isinstance(part, np.ndarray) else part for part in _shop(items=300))
    keys, bias = model.keys()
    top = (model.queries(hidden) @ keys.T + bias).argsort(axis=1)[:, ::-1][:, :15]
    # 15 users like each topic; a sixth of them would be there by chance.
    assert (top % TOPICS == topic[:, None]).mean() > share
    # The best that can be known: 5 users of the 15.
    assert np.log(15) - 0.05 < facts["calibrated_nll"] < np.log(15) + slack


def test_lambda_pulls_towards_the_vectors_of_cf():
    apart = [_fit(options=_options(guiding=of))[1]["history"][-1]["guiding"] for of in (0.0, 1.0, 30.0)]
    assert apart[0] > 2 * apart[1] > 2 * apart[2]


def test_noise_is_added_to_the_hidden_states_while_training_only():
    model = FilterLLM(Config(width=4, dimension=4, users=2, mapper="mlp", hidden=8, noise=0.5))
    model.mapper = torch.nn.Identity()
    model.mean.fill_(3.0)
    model.std.fill_(10.0)  # noise is of standardised states
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = model(torch.full((5000, 4), 3.0))
    assert found.std().item() == pytest.approx(0.5, rel=0.05)
    assert not model.eval()(torch.full((5, 4), 3.0)).any()


def test_training_is_reproducible_and_restores_the_best_epoch():
    lines: list[str] = []
    model, facts = _fit(lines=lines)
    again, same = _fit()
    assert facts == same
    assert filterllm.dump(model) == filterllm.dump(again)
    assert facts["validation_nll"] == min(epoch["validation_nll"] for epoch in facts["history"])
    assert facts["history"][facts["best_epoch"] - 1]["validation_nll"] == facts["validation_nll"]
    assert facts["epochs"] - facts["best_epoch"] <= 5
    assert facts["history"][-1]["loss"] < facts["history"][0]["loss"]
    assert len([line for line in lines if line.startswith("epoch ")]) == facts["epochs"]
    # The restored parameters give that epoch's loss again, at scale 1.
    shop, hidden, _, _ = _shop()
    index = np.flatnonzero(held_out(shop.item_ids, 0.2, 3))
    mapped = model(torch.from_numpy(hidden[index]))
    found = loss(mapped, model.vocabulary, *shop.targets(index, mapped.device), model.bias).mean()
    assert found.item() == pytest.approx(facts["validation_nll"], abs=1e-5)


def test_the_caller_s_random_state_is_left_alone():
    shop, hidden, vocabulary, _ = _shop(items=30)
    model = FilterLLM(Config(WIDTH, DIMENSION, USERS))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    initialise(model, vocabulary, np.zeros(USERS), hidden, seed=3)
    train(model, FrozenTexts(hidden), shop, _options(epochs=1), [].append)
    assert torch.equal(torch.rand(3), expected)


def test_the_scale_calibrates():
    """A model whose logits are far too sharp is scaled down, and its probabilities then match frequencies."""
    shop, hidden, vocabulary, _ = _shop()
    model = FilterLLM(Config(WIDTH, DIMENSION, USERS, hidden=32))
    initialise(model, vocabulary * 6, np.bincount(shop.users, minlength=USERS), hidden, seed=3)
    facts = train(model, FrozenTexts(hidden), shop, _options(epochs=2, guiding=30.0), [].append)
    assert facts["calibrated_nll"] <= facts["validation_nll"]
    index = np.flatnonzero(held_out(shop.item_ids, 0.2, 3))
    keys, bias = model.keys()
    logits = torch.from_numpy(model.queries(hidden[index]) @ keys.T + bias)
    at = {}
    for factor in (0.9, 1.0, 1.1):
        log_p = torch.log_softmax(logits * factor, 1)
        at[factor] = -np.mean(
            [log_p[i, shop.targets(index[i : i + 1], logits.device)[1]].mean() for i in range(len(index))]
        )
    assert at[1.0] == pytest.approx(facts["calibrated_nll"], abs=1e-4)
    assert at[1.0] <= min(at[0.9], at[1.1])


def test_saved_and_loaded_it_is_the_same():
    model, _ = _fit(options=_options(epochs=2))
    files = filterllm.dump(model)
    loaded = filterllm.load(files)
    _, hidden, _, _ = _shop()
    assert np.array_equal(loaded.queries(hidden), model.queries(hidden))
    assert all(np.array_equal(a, b) for a, b in zip(loaded.keys(), model.keys(), strict=True))
    without = FilterLLM(Config(WIDTH, DIMENSION, USERS, user_bias=False))
    assert filterllm.load(filterllm.dump(without)).keys()[1] is None


def test_what_does_not_fit_is_refused():
    model = FilterLLM(Config(WIDTH, DIMENSION, USERS, mapper="linear"))
    files = filterllm.dump(model)
    other = filterllm.dump(FilterLLM(Config(WIDTH, DIMENSION, USERS + 1, mapper="linear")))
    with pytest.raises(FilterLLMError, match=r"vocabulary: \(91, 8\).*expected \(90, 8\)"):
        filterllm.load({**files, "model.safetensors": other["model.safetensors"]})
    tensors = safetensors.torch.load(files["model.safetensors"])
    tensors["bias"][4] = torch.nan
    with pytest.raises(FilterLLMError, match="bias: holds a value that is not finite"):
        filterllm.load({**files, "model.safetensors": safetensors.torch.save(tensors)})
    with pytest.raises(FilterLLMError, match="train again"):
        filterllm.load({**files, "model.safetensors": files["model.safetensors"][:50]})
    with pytest.raises(FilterLLMError, match="train again"):
        filterllm.load({**files, "config.json": b"{"})
    with pytest.raises(FilterLLMError, match=r"width 24.*\(3, 23\)"):
        model.queries(np.zeros((3, WIDTH - 1), np.float32))


def test_held_out_items_depend_on_their_ids_only():
    ids = [f"item-{n}" for n in range(5000)]
    held = held_out(ids, 0.1, seed=1)
    assert 400 < held.sum() < 600
    assert np.array_equal(held_out(ids[::-1], 0.1, seed=1), held[::-1])
    assert np.array_equal(held_out(ids[100:200], 0.1, seed=1), held[100:200])
    assert not np.array_equal(held_out(ids, 0.1, seed=2), held)
    assert held_out(ids[:3], 1e-9, seed=1).sum() == 1
    assert held_out(ids[:3], 0.999999999, seed=1).sum() == 2
    assert not held_out(ids[:1], 0.5, seed=1).any()


def test_users_of_an_item_are_sampled_by_its_id():
    shop, *_ = _shop()
    few = at_most(shop, 3, seed=1)
    assert set(np.diff(few.indptr)) == {3}
    for n in (0, 17, 239):
        kept = few.users[few.indptr[n] : few.indptr[n + 1]]
        assert set(kept) <= set(shop.users[shop.indptr[n] : shop.indptr[n + 1]])
        alone = Items([shop.item_ids[n]], shop.embeddings[n : n + 1], np.array([0, 5]), shop.users[5 * n : 5 * n + 5])
        assert np.array_equal(at_most(alone, 3, seed=1).users, kept)
    assert np.array_equal(at_most(shop, 5, seed=1).users, shop.users)


def test_one_item_alone_can_be_learned():
    shop, hidden, vocabulary, _ = _shop(items=1)
    model = FilterLLM(Config(WIDTH, DIMENSION, USERS))
    initialise(model, vocabulary, np.zeros(USERS), hidden, seed=1)
    facts = train(model, FrozenTexts(hidden), shop, _options(epochs=3), [].append)
    assert (facts["items"], facts["validation_items"], facts["epochs"]) == (1, 0, 3)
    assert np.isfinite(model.queries(hidden)).all()


def test_random_start_of_the_vocabulary():
    shop, hidden, *_ = _shop()
    model = FilterLLM(Config(WIDTH, 64, 2000))
    initialise(model, None, np.zeros(2000), hidden, seed=1)
    assert model.vocabulary.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert len(shop.item_ids) == len(hidden)


# --- LoRA, with the real weights

TEXTS = ["green tea leaves", "a chess board with a clock", "merino wool yarn", "bicycle tyre for the road"]


@pytest.mark.parametrize(
    ("name", "targets", "layers"),
    [("minilm", "attention", 2 * 6), ("minilm", "all_linear", 6 * 6), ("smollm2", "attention", 2 * 30)],
)
def test_lora_learns_and_its_adapter_gives_the_same_vectors_again(name, targets, layers):
    directory = find_model(name).directory
    encoder = TextEncoder(directory, max_tokens=8)
    before = encoder.encode(TEXTS)
    lora.attach(encoder, rank=8, alpha=32, dropout=0.1, seed=1, targets=targets)
    np.testing.assert_allclose(encoder.encode(TEXTS), before, atol=1e-5)  # adapters start at zero
    trainable = {n for n, p in encoder.model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * layers  # A and B
    assert all("lora_" in n and "pooler" not in n for n in trainable)
    model = FilterLLM(Config(encoder.width, 8, 12, mapper="linear"))
    initialise(model, None, np.zeros(12), before, seed=1)
    rng = np.random.default_rng(0)
    items = Items(TEXTS, rng.normal(size=(4, 8)).astype(np.float32), np.arange(5) * 2, rng.permutation(12)[:8])
    facts = train(
        model,
        lora.LoraTexts(encoder, TEXTS),
        items,
        _options(epochs=2, learning_rate=1e-3, batch_size=4),
        [].append,
    )
    assert facts["history"][-1]["loss"] < facts["history"][0]["loss"]
    trained = encoder.encode(TEXTS)
    assert np.abs(trained - before).max() > 1e-4  # the language model itself has learned
    files = lora.dump(encoder)
    assert len(files["adapter.safetensors"]) < 4_000_000
    fresh = TextEncoder(directory, max_tokens=8)
    lora.merge(fresh, files)
    assert not any("lora_" in n for n, _ in fresh.model.named_parameters())
    scale = np.linalg.norm(trained, axis=1).max()
    assert np.abs(fresh.encode(TEXTS) - trained).max() < 1e-4 * scale


def test_adapters_are_not_rounded_away_by_weights_of_bfloat16():
    directory = find_model("minilm").directory
    encoder = TextEncoder(directory, max_tokens=8, dtype="bfloat16")
    before = encoder.encode(TEXTS)
    lora.attach(encoder, rank=8, alpha=32, dropout=0.0, seed=1)
    with torch.no_grad():
        for name, parameter in encoder.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)  # far below the weights' rounding
    trained = encoder.encode(TEXTS)
    assert np.abs(trained - before).max() > 1e-3
    fresh = TextEncoder(directory, max_tokens=8, dtype="bfloat16")
    lora.merge(fresh, lora.dump(encoder))
    np.testing.assert_array_equal(fresh.encode(TEXTS), trained)


def test_adapters_of_another_model_are_refused():
    encoder = TextEncoder(find_model("minilm").directory, max_tokens=8)
    lora.attach(encoder, rank=4, alpha=8, dropout=0.0, seed=1)
    files = lora.dump(encoder)
    broken = safetensors.torch.load(files["adapter.safetensors"])
    broken.pop(next(iter(broken)))
    fresh = TextEncoder(find_model("minilm").directory, max_tokens=8)
    with pytest.raises(lora.LoraError, match="do not fit"):
        lora.merge(fresh, {**files, "adapter.safetensors": safetensors.torch.save(broken)})
    with pytest.raises(lora.LoraError, match="cannot be read"):
        lora.merge(fresh, {**files, "adapter.json": b"["})
