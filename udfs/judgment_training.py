"""Fitting a judge to pairs that really happened, as ColdLLM (arXiv 2402.09176, section 4.3) fine-tunes its language model.

A small model's Yes and No say next to nothing about a pair as it comes. `fit_answer` leaves the model as it is and fits the
answer's direction in its last hidden state: one forward pass a pair. `fine_tune` trains LoRA adapters too, with the likelihood
of the right answer among the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from udfs import lora
from udfs.devices import forked
from udfs.judgment import Ints, Judge

# Strengths of the ridge that cross-validation chooses from (sklearn's C, of standardised states).
_STRENGTHS = tuple(10.0 ** np.arange(-5, 0.5, 0.5))


def fit_answer(judge: Judge, states: NDArray[np.float32], labels: NDArray[np.float32], groups: Ints) -> float:
    """Set judge.direction and judge.bias to the logistic regression of labels [n] on `judge.states` [n, width].

    Args:
        groups: [n], such as the pairs' users: the folds of the cross-validation that chooses the ridge keep them whole.

    Returns:
        The area under the ROC curve of the held-out folds at the chosen ridge.

    Raises:
        ValueError: only one label, or fewer than five groups.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss, roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict

    mean, std = states.mean(0), states.std(0)
    std[std < 1e-6] = 1.0
    x, y = ((states - mean) / std).astype(np.float64), labels > 0.5
    folds = list(GroupKFold(5).split(x, y, groups))
    best = None
    for strength in _STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=1000)
        held_out = cross_val_predict(model, x, y, cv=folds, method="predict_proba")[:, 1]
        loss = log_loss(y, held_out)
        if best is None or loss < best[0]:
            best = loss, strength, float(roc_auc_score(y, held_out))
    assert best is not None
    fitted = LogisticRegression(C=best[1], max_iter=1000).fit(x, y)
    direction = fitted.coef_[0] / std
    judge.direction = torch.from_numpy(direction.astype(np.float32)).to(judge.encoder.device)
    judge.bias = float(fitted.intercept_[0] - direction @ mean)
    return best[2]


@dataclass(frozen=True)
class Options:
    """LoRA as FilterLLM's settings have it; a step is one batch of pairs."""

    rank: int = 8
    alpha: int = 32
    dropout: float = 0.1
    steps: int = 100
    batch_pairs: int = 16
    learning_rate: float = 5e-4
    seed: int = 7


def fine_tune(
    judge: Judge,
    histories: Sequence[Sequence[str]],
    titles: Sequence[str],
    users: Ints,
    items: Ints,
    labels: NDArray[np.float32],
    options: Options,
    log: Callable[[str], None],
) -> None:
    """Train LoRA adapters and the answer's direction on labelled pairs, in place; the adapters are merged afterwards.

    Args:
        histories, titles, users, items: as in `Judge.states`. labels: [n], 1 or 0.

    Raises:
        ValueError: there is no pair.
        LoraError: the model has no projections that adapters are known for.
    """
    if not len(labels):
        raise ValueError("a judge is fine-tuned on labelled pairs, there are none")
    encoder = judge.encoder
    lora.attach(encoder, rank=options.rank, alpha=options.alpha, dropout=options.dropout, seed=options.seed)
    direction = torch.nn.Parameter(judge.direction.clone())
    bias = torch.nn.Parameter(torch.tensor(judge.bias, device=encoder.device))
    adapters = [p for p in encoder.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*adapters, direction, bias], lr=options.learning_rate, weight_decay=0.0)
    rng = np.random.Generator(np.random.Philox(options.seed))
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(_rounds(options, len(labels)))])
    with forked(encoder.device):
        torch.manual_seed(options.seed)
        encoder.model.train()
        for step in range(1, options.steps + 1):
            rows = order[(step - 1) * options.batch_pairs : step * options.batch_pairs]
            tokens = [judge.prefix(histories[users[r]]) + judge.suffix(titles[items[r]]) for r in rows]
            logits = encoder.forward(tokens) @ direction + bias
            right = torch.from_numpy(np.asarray(labels[rows], np.float32)).to(encoder.device)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, right)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*adapters, direction, bias], 1.0)
            optimizer.step()
            if step % 10 == 0 or step == options.steps:
                log(f"judge: step {step}/{options.steps}, loss {float(loss.detach()):.4f}")
    lora.settle(encoder)
    judge.direction, judge.bias = direction.detach(), float(bias.detach())


def _rounds(options: Options, pairs: int) -> int:
    return -(-options.steps * options.batch_pairs // pairs)
