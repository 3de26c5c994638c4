"""Which pairs a judge reads and is fitted to, and that fitting and fine-tuning make it tell them apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from udfs.judged_pairs import recent, training_pairs
from udfs.judgment import Judge
from udfs.judgment_training import Options, fine_tune, fit_answer

INDPTR, INDICES = np.array([0, 4, 4, 5, 8]), np.array([3, 1, 7, 2, 5, 6, 0, 4])


def test_recent_items_are_the_last() -> None:
    assert [chosen.tolist() for chosen in recent(INDPTR, INDICES, 3)] == [[1, 7, 2], [], [5], [6, 0, 4]]


def test_training_pairs_are_true_and_false_and_not_in_the_history() -> None:
    rng = np.random.default_rng(0)
    lists = [rng.choice(30, n, replace=False) for n in (1, 2, 9, 5, 0, 28)]
    indptr, indices = np.concatenate([[0], np.cumsum([len(one) for one in lists])]), np.concatenate(lists)
    pairs = training_pairs(indptr, indices, 30, users=10, per_user=3, length=4, seed=1)
    assert len(pairs.histories) == 4  # users with two items or more
    sets = {tuple(sorted(one)): set(one.tolist()) for one in lists}
    for number, history in enumerate(pairs.histories):
        rows = pairs.users == number
        true = set(pairs.items[rows & (pairs.labels == 1)].tolist())
        false = set(pairs.items[rows & (pairs.labels == 0)].tolist())
        own = next(one for one in sets.values() if true | set(history.tolist()) <= one)
        assert not true & set(history.tolist())
        assert not false & own
        assert len(true) == min(3, len(own) // 2)
        assert len(false) == min(len(true), 30 - len(own))
        assert len(history) == min(4, len(own) - len(true))
    again = training_pairs(indptr, indices, 30, users=10, per_user=3, length=4, seed=1)
    np.testing.assert_array_equal(again.items, pairs.items)
    with pytest.raises(ValueError, match="two items or more"):
        training_pairs(np.array([0, 1]), np.array([3]), 30, users=1, per_user=1, length=1, seed=1)


WORDS = ("tea", "chess")


def labelled(n: int) -> tuple[list[list[str]], list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Users of one topic each, and pairs that are true if the item's topic is tea: a rule that the last tokens tell."""
    rng = np.random.default_rng(3)
    histories = [[f"{WORDS[u % 2]} number {i}" for i in range(2)] for u in range(10)]
    titles = [f"about {WORDS[i % 2]}" for i in range(6)]
    users, items = rng.integers(0, 10, n), rng.integers(0, 6, n)
    return histories, titles, users, items, (items % 2 == 0).astype(np.float32)


def test_fitting_the_answer_learns_what_the_states_tell(small_model: Path) -> None:
    judge = Judge(small_model)
    histories, titles, users, items, labels = labelled(120)
    states = judge.states(histories, titles, users, items)
    held_out = fit_answer(judge, states, labels, users)
    assert held_out > 0.95
    scores = judge.score(histories, titles, users, items)
    assert roc_auc_score(labels, scores) > 0.95
    assert ((scores > 0) == (labels == 1)).mean() > 0.9  # the bias puts the border between them
    with pytest.raises(ValueError):
        fit_answer(judge, states, np.ones_like(labels), users)


def test_fine_tuning_lowers_the_loss_and_the_seed_decides(small_model: Path) -> None:
    histories, titles, users, items, labels = labelled(32)
    options = Options(rank=4, steps=25, batch_pairs=16, learning_rate=1e-2, dropout=0.0)

    def tuned(ambient: int) -> tuple[Judge, list[str]]:
        judge, lines = Judge(small_model), []
        torch.manual_seed(ambient)
        fine_tune(judge, histories, titles, users, items, labels, options, lines.append)
        return judge, lines

    before = Judge(small_model).score(histories, titles, users, items)
    judge, lines = tuned(1)
    after = judge.score(histories, titles, users, items)
    assert roc_auc_score(labels, after) > max(0.95, roc_auc_score(labels, before))
    assert lines[-1].startswith("judge: step 25/25")
    assert not any("lora" in name for name, _ in judge.encoder.model.named_parameters())
    changed = [
        name
        for (name, now), was in zip(
            judge.encoder.model.named_parameters(), Judge(small_model).encoder.model.parameters(), strict=True
        )
        if not torch.equal(now, was)
    ]
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)
    np.testing.assert_allclose(judge.score(histories, titles, users, items, share_prefix=False), after, atol=1e-3)
    np.testing.assert_array_equal(tuned(2)[0].score(histories, titles, users, items), after)
    with pytest.raises(ValueError, match="there are none"):
        fine_tune(Judge(small_model), histories, titles, users[:0], items[:0], labels[:0], options, lines.append)
