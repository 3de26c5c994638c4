"""Training A-LLMRec's first stage (arXiv 2404.11343, section 4.1): batches of a user, the item that came next, and another one.

The CF model is frozen: its vectors are given. The sentence encoder is `texts`: vectors that were made once (FrozenTexts), or
an encoder that is trained along (LoraTexts, with adapters or with all of its weights).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from udfs import epochs
from udfs.allmrec_alignment import Alignment, Weights, losses, total
from udfs.allmrec_examples import AllmrecError, Examples
from udfs.backbone import inner_products
from udfs.checkpoints import Checkpoints
from udfs.fingerprint import fingerprint
from udfs.progress import Progress
from udfs.sampled_ranking import ndcg, ranks
from udfs.sequences import Ints
from udfs.vectors import Matrix

# Texts that a trained encoder reads at a time, outside of training.
_TEXTS = 256
# Examples that tell how large a logit the CF model's scores are.
_SCALED_BY = 10_000
_SHOWN = ("match", "item", "text", "recommendation", "text_recommendation")


@dataclass(frozen=True)
class Options(epochs.Options):
    """How to train; the defaults are the paper's. A published variant with deep networks takes AdamW, 3e-4 and a decay of .1."""

    epochs: int = 10
    patience: int = 10
    weights: Weights = field(default_factory=Weights)
    batch_size: int = 32
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 1e-4
    text_learning_rate: float = 1e-4  # of a sentence encoder that is trained
    weight_decay: float = 0.0
    # What decides which epoch is kept, if there are validation examples: the loss, or NDCG@10 of the positives among
    # `negatives` others by x_u . f_I^dec(e_i), or by x_u . f_I^dec(q_i).
    stop_by: Literal["loss", "item", "text"] = "loss"
    negatives: int = 99


def train(
    model: Alignment,
    texts: nn.Module,
    items: Matrix,
    examples: Examples,
    pool: Ints,
    options: Options,
    log: Callable[[str], None],
    *,
    validation: Examples | None = None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, Any]:
    """Train `model` (and `texts`, as far as it has trainable parameters) in place, on the device of `model`.

    Args:
        log: called with lines of each epoch, and one a minute within it.
        texts: called with item numbers [B] (numpy int64), gives Q [B, D] (udfs.filterllm_items.FrozenTexts,
            udfs.lora.LoraTexts).
        items: E [I, d] float32, frozen; read for the items of `examples`, of `validation` and of `pool` only.
        pool: items that negatives are drawn from: those that have a CF vector.
        validation: may have positives that are outside of the examples and of the pool, with a vector in `items`.
        checkpoints: as in `udfs.epochs.run`.

    Returns:
        Facts, as of `udfs.epochs.run`, and `logit_scale`; the validation is higher for a better model, the loss negated.

    Raises:
        AllmrecError: no example, or too few items in the pool.
        CfError, CheckpointError: as `udfs.epochs.run`.
    """
    if not len(examples):
        raise AllmrecError("the alignment has no examples to learn from: no user has an item that came after another")
    whole = nn.ModuleDict({"alignment": model, "texts": texts})
    scale = logit_scale(examples, items, pool, options.seed)
    optimizer = _optimizer(model, texts, options)

    def epoch(seed: int) -> float:
        triples = examples.draw(pool, 1, seed)
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(examples))
        sums: dict[str, float | torch.Tensor] = {}
        progress = Progress("of this epoch", len(order), "pairs", seconds=60.0, log=log)
        for start in range(0, len(order), options.batch_size):
            rows = order[start : start + options.batch_size]
            parts = _losses(model, texts, items, scale * examples.users[rows], triples[rows], options.weights)
            loss = total(parts, options.weights)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for name, part in [("loss", loss), *parts.items()]:
                sums[name] = sums.get(name, 0.0) + part.detach().double() * len(rows)
            progress.advance(len(rows))
        means = {name: float(value) / len(examples) for name, value in sums.items()}
        log("alignment: " + ", ".join(f"{name} {means[name]:.4f}" for name in _SHOWN if name in means))
        return means["loss"]

    measure = None
    if validation is not None and len(validation):
        measure = _measure(model, texts, items, replace(validation, users=scale * validation.users), pool, options)
    start = [p.detach().float().cpu().numpy() for p in whole.parameters()] + [
        b.float().cpu().numpy() for b in whole.buffers()
    ]
    facts = ["alignment", asdict(options), asdict(model.config)]
    others = validation.arrays() if validation else []
    key = fingerprint(facts, items, pool, *examples.arrays(), *others, *start)
    return {**epochs.run(whole, optimizer, epoch, options, log, measure, checkpoints, key), "logit_scale": float(scale)}


def logit_scale(examples: Examples, items: Matrix, pool: Ints, seed: int) -> np.float32:
    """The s for which s x_u . E_i, the CF model's own scores, are the best logits of positives against negatives.

    The recommendation loss takes x_u . e for a logit. It is one (s near 1) if the CF model was trained by such a loss; ALS
    scores lie between 0 and 1, of which the loss would learn next to nothing.
    """
    most = np.random.Generator(np.random.Philox(seed)).permutation(len(examples))[:_SCALED_BY]
    part = examples.take(most)
    scores = inner_products(part.users, items, part.draw(pool, 1, seed)).astype(np.float64)

    def loss(log_scale: float) -> float:
        logits = np.exp(log_scale) * scores
        return float(np.logaddexp(0, -logits[:, 0]).mean() + np.logaddexp(0, logits[:, 1]).mean())

    return np.float32(np.exp(minimize_scalar(loss, bounds=(np.log(0.1), np.log(100)), method="bounded").x))


@torch.no_grad()
def vectors(texts: nn.Module, items: Ints) -> Matrix:
    """Q [n, D] float32 of the items as `texts` has them after training."""
    texts.eval()
    return np.concatenate([texts(items[s : s + _TEXTS]).float().cpu().numpy() for s in range(0, len(items), _TEXTS)])


def _losses(
    model: Alignment, texts: nn.Module, items: Matrix, users: Matrix, pairs: Ints, weights: Weights
) -> dict[str, torch.Tensor]:
    """The losses of users [B, d] with positives and negatives [B, 2]; an item that occurs twice is encoded once."""
    device = model.item_offset.device
    different, place = np.unique(pairs, return_inverse=True)
    positive, negative = torch.from_numpy(place.reshape(pairs.shape)).to(device).unbind(1)
    e = torch.from_numpy(np.asarray(items[different], np.float32)).to(device)
    x = torch.from_numpy(np.asarray(users, np.float32)).to(device)
    return losses(model, weights, x, e, texts(different), positive, negative)


def _measure(
    model: Alignment, texts: nn.Module, items: Matrix, data: Examples, pool: Ints, options: Options
) -> Callable[[], float]:
    """The function that gives the validation's figure: always of the same negatives."""
    asked = data.draw(pool, 1 if options.stop_by == "loss" else options.negatives, options.seed)
    if options.stop_by == "loss":
        starts = range(0, len(data), options.batch_size)
        batches = [slice(start, min(start + options.batch_size, len(data))) for start in starts]

        @torch.no_grad()
        def loss() -> float:
            sums = 0.0
            for rows in batches:
                parts = _losses(model, texts, items, data.users[rows], asked[rows], options.weights)
                sums += float(total(parts, options.weights)) * (rows.stop - rows.start)
            return -sums / len(data)

        return loss

    different, place = np.unique(asked, return_inverse=True)
    side = np.full(len(different), options.stop_by == "text")

    def quality() -> float:
        q = vectors(texts, different) if options.stop_by == "text" else np.zeros((len(different), model.config.width))
        decoded = model.decoded(model.joint(items[different], q, side))
        return float(ndcg(ranks(inner_products(data.users, decoded, place.reshape(asked.shape))), 10).mean())

    return quality


def _optimizer(model: Alignment, texts: nn.Module, options: Options) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    groups = [
        {"params": list(model.parameters()), "lr": options.learning_rate},
        {"params": [p for p in texts.parameters() if p.requires_grad], "lr": options.text_learning_rate},
    ]
    # The second beta is the released code's.
    return kind([g for g in groups if g["params"]], betas=(0.9, 0.98), weight_decay=options.weight_decay)
