"""Training FilterLLM (arXiv 2502.16924, section 3.3): L = L_D + lambda * L_B by AdamW, cosine with warm-up, early stopping.

The validation items are warm items that training does not see, chosen by a hash of (seed, item_id): so the choice does not
depend on the order or number of the others. The epoch with the lowest loss L_D on them is kept, and the scale of the
logits (a temperature, Guo et al. 2017, "On Calibration of Modern Neural Networks") is fitted on them.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from udfs.distribution_loss import guiding_loss, loss
from udfs.filterllm import FilterLLM

# The paper's share of steps over which the learning rate rises.
_WARM_UP = 0.05
# More held-out items than this tell no more about when to stop, and cost a pass over all users each.
_VALIDATION_ITEMS = 4096


@dataclass(frozen=True)
class Options:
    """What training may choose; the names are those of the settings."""

    epochs: int
    learning_rate: float
    weight_decay: float
    batch_size: int
    guiding: float
    max_users: int
    validation_share: float
    patience: int
    vocabulary_chunk: int
    seed: int


@dataclass(frozen=True)
class Items:
    """Warm items to train on, n of them, numbered as the hidden states are.

    item_ids: n ids. embeddings [n, dimension] float32: their CF vectors. indptr [n + 1], users [indptr[-1]] int64: item i's
    users are users[indptr[i]:indptr[i + 1]], each once, as rows of the vocabulary.
    """

    item_ids: list[str]
    embeddings: np.ndarray
    indptr: np.ndarray
    users: np.ndarray

    def targets(self, index: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """indptr and users of the items `index`."""
        counts = np.diff(self.indptr)[index]
        indptr = np.concatenate([[0], np.cumsum(counts)])
        flat = np.repeat(self.indptr[:-1][index] - indptr[:-1], counts) + np.arange(indptr[-1])
        return torch.from_numpy(indptr).to(device), torch.from_numpy(self.users[flat]).to(device)


class FrozenTexts(nn.Module):
    """Hidden states [n, width] that the language model gave once; training does not change them."""

    def __init__(self, hidden: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.from_numpy(np.array(hidden, np.float32)), persistent=False)

    def forward(self, index: np.ndarray) -> torch.Tensor:
        return self.hidden[torch.from_numpy(index).to(self.hidden.device)]


def _hash(seed: int, item_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{item_id}".encode()).digest()[:8], "big")


def held_out(item_ids: list[str], share: float, seed: int) -> np.ndarray:
    """[n] bool: the items whose hash falls into the first `share`; one at least, unless there is only one item."""
    hashes = np.array([_hash(seed, item_id) for item_id in item_ids], dtype=np.uint64)
    chosen = hashes < np.uint64(int(share * 2**64))
    if len(item_ids) > 1 and not chosen.any():
        chosen[hashes.argmin()] = True
    if len(item_ids) > 0 and chosen.all():
        chosen[hashes.argmax()] = False
    return chosen


def at_most(items: Items, max_users: int, seed: int) -> Items:
    """`items` with at most `max_users` users each; which ones depends on (seed, item_id) only."""
    kept, counts = [], []
    for number, item_id in enumerate(items.item_ids):
        users = items.users[items.indptr[number] : items.indptr[number + 1]]
        if len(users) > max_users:
            generator = np.random.Generator(np.random.Philox(key=_hash(seed, item_id)))
            users = np.sort(generator.choice(np.sort(users), max_users, replace=False))
        kept.append(users)
        counts.append(len(users))
    indptr = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return Items(items.item_ids, items.embeddings, indptr, np.concatenate(kept))


def initialise(
    model: FilterLLM, vocabulary: np.ndarray | None, popularity: np.ndarray, hidden: np.ndarray, seed: int
) -> None:
    """Set the start of training, from `seed`: mapper as torch does; the vocabulary [users, dimension] from CF, or random at
    the scale of 1 / sqrt(dimension) when None; the bias to the centred log of the users' interactions `popularity` [users];
    mean and std to those of the hidden states [n, width].
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.mapper.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        if vocabulary is None:
            model.vocabulary.normal_(std=model.config.dimension**-0.5)
        else:
            model.vocabulary.copy_(torch.from_numpy(np.array(vocabulary, np.float32)))
        if model.bias is not None:
            start = np.log(popularity + 1.0)
            model.bias.copy_(torch.from_numpy((start - start.mean()).astype(np.float32)))
        std = hidden.std(0)
        model.mean.copy_(torch.from_numpy(hidden.mean(0)))
        # A dimension that never varies carries nothing: its standardised value stays 0, not 0 / 0.
        model.std.copy_(torch.from_numpy(np.where(std > 1e-6, std, 1.0).astype(np.float32)))


def train(
    model: FilterLLM, texts: nn.Module, items: Items, options: Options, log: Callable[[str], None]
) -> dict[str, Any]:
    """Train `model` (and `texts`, as far as it has trainable parameters) in place; the best epoch is restored, the scale fitted.

    Args:
        texts: called with item numbers [B] (numpy int64), gives hidden states [B, width] on the model's device.

    Returns:
        Facts: items, validation_items, epochs (run), best_epoch (1..), validation_nll (nats, before the scale),
        calibrated_nll, scale, history (a dict an epoch). Without validation items (one item in all) the last epoch is kept
        and both losses are None.
    """
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        return _train(model, texts, at_most(items, options.max_users, options.seed), options, log)


def _train(
    model: FilterLLM, texts: nn.Module, items: Items, options: Options, log: Callable[[str], None]
) -> dict[str, Any]:
    device = model.vocabulary.device
    held = held_out(items.item_ids, options.validation_share, options.seed)
    training, validation = np.flatnonzero(~held), np.flatnonzero(held)[:_VALIDATION_ITEMS]
    embeddings = torch.from_numpy(np.array(items.embeddings, np.float32)).to(device)
    trainable = [p for module in (model, texts) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=options.weight_decay)
    steps = math.ceil(len(training) / options.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(options.epochs * steps))
    history: list[dict[str, Any]] = []
    best: float | None = None
    best_epoch, best_state = 0, [p.detach().clone() for p in trainable]
    for epoch in range(1, options.epochs + 1):
        model.train()
        texts.train()
        order = np.random.Generator(np.random.Philox(key=[options.seed, epoch])).permutation(training)
        total, rate, begun = 0.0, optimizer.param_groups[0]["lr"], time.perf_counter()
        for start in range(0, len(order), options.batch_size):
            batch = order[start : start + options.batch_size]
            mapped = model(texts(batch))
            indptr, users = items.targets(batch, device)
            distribution = loss(
                mapped, model.vocabulary, indptr, users, model.bias, chunk=options.vocabulary_chunk
            ).mean()
            objective = distribution + options.guiding * guiding_loss(mapped, embeddings[batch])
            optimizer.zero_grad(set_to_none=True)
            objective.backward()
            optimizer.step()
            schedule.step()
            total += float(objective.detach()) * len(batch)
        seconds = time.perf_counter() - begun
        nll = validation_nll(model, texts, items, validation, options) if len(validation) else None
        history.append({"epoch": epoch, "loss": total / len(training), "learning_rate": rate, "validation_nll": nll})
        log(
            f"epoch {epoch}/{options.epochs}: loss {total / len(training):.4f}, lr {rate:.2e}, "
            f"{len(training) / seconds:.0f} items/s, validation nll {'none' if nll is None else f'{nll:.4f}'}"
        )
        if nll is None or best is None or nll < best:
            best, best_epoch, best_state = nll, epoch, [p.detach().clone() for p in trainable]
        elif epoch - best_epoch >= options.patience:
            log(f"no better for {options.patience} epochs: stopped; epoch {best_epoch} is kept")
            break
    with torch.no_grad():
        for parameter, value in zip(trainable, best_state, strict=True):
            parameter.copy_(value)
    model.eval()
    texts.eval()
    calibrated = calibrate(model, texts, items, validation, options) if len(validation) else None
    return {
        "items": len(training),
        "validation_items": len(validation),
        "epochs": len(history),
        "best_epoch": best_epoch,
        "validation_nll": best,
        "calibrated_nll": calibrated,
        "scale": float(model.scale),
        "history": history,
    }


def _cosine(steps: int) -> Callable[[int], float]:
    rise = max(1, round(_WARM_UP * steps))
    return lambda step: min((step + 1) / rise, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


@torch.no_grad()
def _mapped(model: FilterLLM, texts: nn.Module, index: np.ndarray, batch_size: int) -> torch.Tensor:
    model.eval()
    texts.eval()
    return torch.cat([model(texts(index[start : start + batch_size])) for start in range(0, len(index), batch_size)])


@torch.no_grad()
def _nll(model: FilterLLM, mapped: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor], chunk: int) -> float:
    bias = None if model.bias is None else model.bias * model.scale
    return float(loss(mapped * model.scale, model.vocabulary, *targets, bias, chunk=chunk).double().mean())


def validation_nll(model: FilterLLM, texts: nn.Module, items: Items, index: np.ndarray, options: Options) -> float:
    """Mean distribution loss L_D of the items `index`, in nats, at the model's scale."""
    mapped = _mapped(model, texts, index, options.batch_size)
    return _nll(model, mapped, items.targets(index, mapped.device), options.vocabulary_chunk)


def calibrate(model: FilterLLM, texts: nn.Module, items: Items, index: np.ndarray, options: Options) -> float:
    """Fit model.scale, within 1/16 .. 16, to the lowest mean L_D of the items `index`; returns that loss."""
    mapped = _mapped(model, texts, index, options.batch_size)
    targets = items.targets(index, mapped.device)

    def at(log_scale: float) -> float:
        model.scale.fill_(math.exp(log_scale))
        return _nll(model, mapped, targets, options.vocabulary_chunk)

    limit = math.log(16)
    found = minimize_scalar(at, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-3})
    return at(float(found.x))
