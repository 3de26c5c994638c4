"""A-LLMRec's first stage: losses against equations in float64, cold items placed by their texts, and exact resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.killed import Killed, kill_at
from udfs import allmrec_alignment as alignment
from udfs import lora
from udfs.allmrec_alignment import Config, Weights, losses, random_joint, total
from udfs.allmrec_alignment_training import Options, train, vectors
from udfs.allmrec_examples import AllmrecError, Examples
from udfs.checkpoints import CheckpointError, Checkpoints
from udfs.filterllm_items import FrozenTexts
from udfs.model_files import find_model
from udfs.sequences import Sequences
from udfs.text_encoder import TextEncoder

pytestmark = pytest.mark.usefixtures("one_thread")

CLUSTERS, ITEMS, COLD, USERS = 5, 100, 20, 200
D, TEXT = 8, 24


def world(seed: int = 0):
    """Items in clusters; the text says the cluster, the CF vectors are a rotation of what it says. The first COLD items are cold.

    Returns E [I, d], Q [I, D], clusters of items, users' x [n, d] and clusters, and what they chose among warm items.
    """
    rng = np.random.default_rng(seed)
    of_item, of_user = np.arange(ITEMS) % CLUSTERS, np.arange(USERS) % CLUSTERS
    centres = np.linalg.qr(rng.normal(size=(D, D)))[0][:CLUSTERS]
    said = centres[of_item] + 0.1 * rng.normal(size=(ITEMS, D))
    rotation = np.linalg.qr(rng.normal(size=(D, D)))[0]
    e = (said @ rotation).astype(np.float32)
    q = (said @ rng.normal(size=(D, TEXT)) / 5 + 0.05 * rng.normal(size=(ITEMS, TEXT)) + 0.3).astype(np.float32)
    x = (3 * (centres[of_user] + 0.1 * rng.normal(size=(USERS, D))) @ rotation).astype(np.float32)
    warm = np.arange(COLD, ITEMS)
    chosen = np.stack([rng.permutation(warm[of_item[warm] == c])[:4] for c in of_user])
    histories = Sequences(np.arange(USERS + 1) * 3, chosen[:, :3].reshape(-1))
    return e, q, of_item, of_user, Examples(x, histories, chosen[:, 3])


FAST = Options(epochs=25, patience=25, learning_rate=5e-3)


def fitted(options: Options, **config):
    e, q, of_item, of_user, examples = world()
    model = alignment.build(Config(D, TEXT, **{"joint": 32, "hidden": (48, 40), "dropout": 0.1, **config}), seed=1)
    e[:COLD] = np.nan  # a cold item has none
    warm = np.arange(COLD, ITEMS)
    model.standardise(e[warm], q[warm])
    facts = train(model, FrozenTexts(q), e, examples, warm, options, lambda line: None)
    joint = model.joint(e, q, np.arange(ITEMS) < COLD)
    return model, facts, joint, of_item, of_user, examples


def precision(scores: np.ndarray, of_item: np.ndarray, of_user: np.ndarray) -> float:
    """Of the users an item is scored highest for, as many as its cluster has, the share that is of its cluster."""
    top = np.argsort(-scores, axis=0)[: USERS // CLUSTERS]
    return float((of_user[top] == of_item).mean())


@pytest.mark.parametrize(
    ("weights", "config"),
    [
        (Weights(), {}),
        (Weights(), {"deep": True}),
        (Weights(match="infonce", text_recommendation=1.0), {"deep": True}),
    ],
)
def test_the_text_side_of_cold_items_finds_their_users(weights: Weights, config: dict):
    model, facts, joint, of_item, of_user, examples = fitted(replace(FAST, weights=weights), **config)
    assert facts["epochs"] == FAST.epochs
    assert facts["history"][-1]["loss"] < 0.7 * facts["history"][0]["loss"]
    decoded = model.decoded(joint)
    assert decoded.shape == (ITEMS, D)
    assert decoded.dtype == np.float32
    scores = examples.users @ decoded.T
    assert precision(scores[:, :COLD], of_item[:COLD], of_user) > 0.97
    assert precision(scores[:, COLD:], of_item[COLD:], of_user) > 0.97


def test_scores_that_are_no_logits_are_scaled_to_some():
    """ALS predicts about 0 and 1; the same world with users a twentieth as long is learnt in the same way."""
    found = []
    for length in (1.0, 0.05):
        e, q, _, _, examples = world()
        model, warm = alignment.build(Config(D, TEXT, joint=32), seed=1), np.arange(COLD, ITEMS)
        model.standardise(e[warm], q[warm])
        short = replace(examples, users=length * examples.users)
        facts = train(model, FrozenTexts(q), e, short, warm, replace(FAST, epochs=3), lambda line: None)
        found.append((facts["logit_scale"] * length, model.decoded(model.joint(e, q, np.arange(ITEMS) < COLD))))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-3)
    # The scale is where the loss has no slope: the mean of (1 - p(positive)) x_u . E+ is that of p(negative) x_u . E-.
    users, items, choices = examples.users, world()[0], examples.draw(warm, 1, FAST.seed)
    scores = np.einsum("nd,ncd->nc", users, items[choices]).astype(np.float64)
    p = 1 / (1 + np.exp(-found[0][0] * scores))
    slope = ((1 - p[:, 0]) * scores[:, 0]).mean() - (p[:, 1] * scores[:, 1]).mean()
    assert abs(slope) < 0.05 * np.abs(scores).mean()


def test_without_matching_the_text_side_says_nothing_to_users():
    model, _, joint, of_item, of_user, examples = fitted(replace(FAST, weights=Weights(match="none")))
    scores = examples.users @ model.decoded(joint).T
    assert precision(scores[:, :COLD], of_item[:COLD], of_user) < 0.5
    assert precision(scores[:, COLD:], of_item[COLD:], of_user) > 0.97


def test_losses_are_the_equations():
    rng = np.random.default_rng(3)
    e, q, x = rng.normal(size=(7, D)) + 1, 0.1 * rng.normal(size=(7, TEXT)), rng.normal(size=(5, D))
    positive, negative = np.array([0, 3, 3, 6, 1]), np.array([2, 4, 5, 0, 5])
    for match in ("mse", "infonce"):
        for standardised in (False, True):
            model = alignment.build(Config(D, TEXT, joint=16), seed=2)
            if standardised:
                model.standardise(e.astype(np.float32), q.astype(np.float32))
            weights = Weights(match, 0.5, 0.2, 1.5, 0.7, temperature=0.3)
            tensors = [torch.from_numpy(part.astype(np.float32)) for part in (x, e, q)]
            parts = losses(model, weights, *tensors, torch.from_numpy(positive), torch.from_numpy(negative))
            expected = _losses(model, weights, x, e, q, positive, negative, standardised)
            for name, value in expected.items():
                assert float(parts[name].detach()) == pytest.approx(value, rel=1e-5), (match, standardised, name)
            whole = (
                expected["match"] + 0.5 * expected["item"] + 0.2 * expected["text"]
                + 1.5 * expected["recommendation"] + 0.7 * expected["text_recommendation"]
            )  # fmt: skip
            assert float(total(parts, weights).detach()) == pytest.approx(whole, rel=1e-5)
    nothing = Weights("none", 0, 0, 1.0)
    assert set(losses(model, nothing, *tensors, torch.from_numpy(positive), torch.from_numpy(negative))) == {
        "recommendation"
    }


def _losses(model, weights, x, e, q, positive, negative, standardised) -> dict[str, float]:
    """The same in float64, item by item."""
    p = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    mean_e, mean_q, scale_e, scale_q = np.zeros(D), np.zeros(TEXT), 1.0, np.ones(TEXT)
    if standardised:
        mean_e, mean_q, scale_q = e.mean(0), q.mean(0), q.std(0)
        scale_e = np.sqrt(((e - mean_e) ** 2).mean())

    def encode(side, vector):
        return 1 / (1 + np.exp(-(p[f"{side}_encoder.0.weight"] @ vector + p[f"{side}_encoder.0.bias"])))

    def decode(side, joint):
        return p[f"{side}_decoder.weight"] @ joint + p[f"{side}_decoder.bias"]

    es = [encode("item", (v - mean_e) / scale_e) for v in e]
    qs = [encode("text", (v - mean_q) / scale_q) for v in q]
    items = [((v - mean_e) / scale_e - decode("item", j)) for v, j in zip(e, es, strict=True)]
    texts = [((v - mean_q) / scale_q - decode("text", j)) for v, j in zip(q, qs, strict=True)]

    def both(squares):
        return np.mean([squares[i] for i in positive]) + np.mean([squares[i] for i in negative])

    def recommendation(joint):
        def sigma(u, i):
            return 1 / (1 + np.exp(-(x[u] @ (decode("item", joint[i]) * scale_e + mean_e))))

        return -np.mean([np.log(sigma(u, positive[u])) + np.log(1 - sigma(u, negative[u])) for u in range(len(x))])

    if weights.match == "mse":
        match = both([np.mean((a - b) ** 2) for a, b in zip(es, qs, strict=True)])
    else:
        unit_e, unit_q = ([v / np.linalg.norm(v) for v in side] for side in (es, qs))
        logits = np.array([[a @ b / weights.temperature for b in unit_q] for a in unit_e])
        forth, back = (
            -np.mean([m[i, i] - np.log(np.exp(m[i]).sum()) for i in range(len(e))]) for m in (logits, logits.T)
        )
        match = (forth + back) / 2
    return {
        "match": match,
        "item": both([np.mean(v**2) for v in items]),
        "text": both([np.mean(v**2) for v in texts]),
        "recommendation": recommendation(es),
        "text_recommendation": recommendation(qs),
    }


def _some(examples: Examples, rows: np.ndarray) -> Examples:
    return Examples(examples.users[rows], examples.histories.take(rows), examples.positives[rows])


def _resumable(kind: str, options: Options, checkpoints: Checkpoints | None, log) -> tuple:
    """Train with frozen texts, or with a sentence encoder whose adapters or weights are trained along."""
    e, q, of_item, _, examples = world()
    if kind == "frozen":
        texts, width = FrozenTexts(q), TEXT
    else:
        encoder = TextEncoder(find_model("minilm").directory, max_tokens=8)
        if kind == "lora":
            lora.attach(encoder, rank=4, alpha=8, dropout=0.3, seed=1)
        texts, width = lora.LoraTexts(encoder, [f"topic {c}" for c in of_item]), encoder.width
    rows = np.arange(60) if kind == "frozen" else np.arange(6)
    model = alignment.build(Config(D, width, joint=16, deep=True, hidden=(20,), dropout=0.3), seed=1)
    facts = train(
        model, texts, e, _some(examples, rows), np.arange(COLD, ITEMS), options, log,
        validation=_some(examples, rows + 100), checkpoints=checkpoints,
    )  # fmt: skip
    return alignment.dump(model), facts, vectors(texts, np.arange(4)).tobytes()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("frozen", {"epochs": 8, "patience": 2, "learning_rate": 0.1}),
        ("frozen", {"epochs": 4, "stop_by": "text", "optimizer": "adamw", "weight_decay": 0.1, "negatives": 20}),
        ("lora", {"epochs": 3, "stop_by": "item", "text_learning_rate": 1e-2, "negatives": 3}),
    ],
)
def test_a_killed_training_ends_as_an_undisturbed_one(kind: str, changes: dict, tmp_path: Path):
    options = replace(Options(batch_size=8 if kind == "frozen" else 3), **changes)
    expected = _resumable(kind, options, None, lambda line: None)
    checkpoints, lines = Checkpoints(str(tmp_path)), []
    with pytest.raises(Killed):
        _resumable(kind, options, checkpoints, kill_at(3))
    assert _resumable(kind, options, checkpoints, lines.append) == expected
    assert lines[0] == "goes on behind epoch 2, which was saved"
    assert len(expected[1]["history"]) == expected[1]["epochs"]
    if "patience" in changes:
        assert expected[1]["best_epoch"] < expected[1]["epochs"] < options.epochs
    with pytest.raises(CheckpointError, match="another training"):
        _resumable(kind, replace(options, weights=Weights(beta=0.2)), checkpoints, lines.append)


def test_a_sentence_encoder_is_trained_as_far_as_it_may_be():
    def texts_before_and_after(attach: bool) -> tuple[np.ndarray, np.ndarray]:
        e, _, of_item, _, examples = world()
        encoder = TextEncoder(find_model("minilm").directory, max_tokens=8)
        if attach:
            lora.attach(encoder, rank=2, alpha=8, dropout=0.0, seed=1)
        texts = lora.LoraTexts(encoder, [f"topic {c}" for c in of_item])
        before = vectors(texts, np.arange(3))
        model = alignment.build(Config(D, encoder.width), seed=1)
        options = Options(epochs=1, batch_size=4, text_learning_rate=1e-3)
        train(model, texts, e, _some(examples, np.arange(4)), np.arange(COLD, ITEMS), options, lambda line: None)
        return before, vectors(texts, np.arange(3))

    for attach in (True, False):
        before, after = texts_before_and_after(attach)
        assert before.shape == (3, 384)
        assert np.abs(after - before).max() > 1e-5


def test_negatives_are_of_the_pool_and_not_seen():
    examples = Examples(
        np.zeros((3, 2), np.float32), Sequences(np.array([0, 2, 2, 3]), np.array([1, 2, 4])), np.array([3, 9, 1])
    )
    pool = np.array([8, 1, 2, 3, 4, 5])
    drawn = examples.draw(pool, 3, seed=5)
    np.testing.assert_array_equal(drawn[:, 0], examples.positives)
    for row, never in zip(drawn[:, 1:], ({1, 2, 3}, {9}, {4, 1}), strict=True):
        assert set(row.tolist()) <= set(pool.tolist()) - never
        assert len(set(row.tolist())) == 3
    np.testing.assert_array_equal(examples.draw(pool, 3, seed=5), drawn)
    assert not np.array_equal(examples.draw(pool, 3, seed=6), drawn)
    counts = np.bincount(np.concatenate([examples.draw(pool, 1, s)[1, 1:] for s in range(600)]), minlength=9)
    assert set(np.flatnonzero(counts)) == set(pool.tolist())
    assert counts[pool].min() > 60
    with pytest.raises(AllmrecError, match="draw fewer"):
        examples.draw(pool, 6, seed=5)
    with pytest.raises(AllmrecError, match="different lengths"):
        replace(examples, positives=np.array([1]))


def test_what_does_not_fit_is_an_error():
    e, q, _, _, examples = world()
    model = alignment.build(Config(D, TEXT, deep=True), seed=1)
    with pytest.raises(AllmrecError, match="text vectors of 24 dimensions"):
        model.joint(e, q[:, :5], np.ones(ITEMS, bool))
    with pytest.raises(AllmrecError, match="no examples"):
        train(model, FrozenTexts(q), e, _some(examples, np.arange(0)), np.arange(9), Options(), lambda line: None)
    files = alignment.dump(model)
    again = alignment.load(files)
    np.testing.assert_array_equal(
        again.joint(e, q, np.arange(ITEMS) < COLD), model.joint(e, q, np.arange(ITEMS) < COLD)
    )
    broken = {**files, "config.json": files["config.json"].replace(b'"joint": 128', b'"joint": 64')}
    with pytest.raises(AllmrecError, match=r"saved A-LLMRec alignment .*item_decoder"):
        alignment.load(broken)
    joint = random_joint(ITEMS, 128, seed=1)
    assert joint.shape == (ITEMS, 128)
    assert abs(joint.std() - 1) < 0.05
