"""Epochs of a training with early stopping, saved so that a training that was killed goes on as if it had not been."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from udfs.cf_inputs import CfError
from udfs.checkpoints import Checkpoints, restore, state
from udfs.devices import forked
from udfs.sequences import Sequences


@dataclass(frozen=True)
class Options:
    """When to stop."""

    epochs: int = 200
    patience: int = 20  # epochs without a better validation
    seed: int = 7


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: Callable[[int], float],
    options: Options,
    log: Callable[[str], None],
    validate: Callable[[], float] | None,
    checkpoints: Checkpoints | None,
    identity: str,
) -> dict[str, Any]:
    """Train `model` in place and leave it, in evaluation mode, with the parameters of the best epoch.

    Args:
        epoch: trains one and gives its mean loss. What it draws at random comes from its argument, a seed of (options.seed,
            epoch), or from torch's own generators, which are set from that too.
        log: called with a line an epoch.
        validate: the model's quality, higher is better, such as NDCG@10; without it the last epoch is kept.
        checkpoints: where the state is saved every epoch. If this training's state is there already, training goes on
            behind it, and ends with the model that an undisturbed one ends with, bit for bit (on the same CPU).
        identity: hash of what the training is made from.

    Returns:
        Facts: epochs (run), best_epoch (1..), validation (of the best epoch, or None), history (a dict an epoch: epoch, loss,
        validation).

    Raises:
        CfError: the loss is no longer a number.
        CheckpointError: what is saved there is another training's, or unreadable.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    history: list[dict[str, Any]] = []
    best_epoch, best = 0, [p.detach().clone() for p in named.values()]
    saved = checkpoints.load(identity) if checkpoints else None
    if saved:
        tensors, facts = saved
        history, best_epoch = facts["history"], facts["best_epoch"]
        best = restore(tensors, named, [optimizer])
        log(f"goes on behind epoch {len(history)}, which was saved")
    for number in range(len(history) + 1, options.epochs + 1):
        if len(history) - best_epoch >= options.patience:
            log(f"no better for {options.patience} epochs: stopped; epoch {best_epoch} is kept")
            break
        seed = int(np.random.SeedSequence([options.seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        model.train()
        with forked(next(iter(named.values())).device if named else "cpu"):
            torch.manual_seed(seed)
            loss = epoch(seed)
        if not math.isfinite(loss):
            raise CfError(f"training diverged in epoch {number}: the loss is {loss}; lower the learning rate")
        model.eval()
        quality = validate() if validate else None
        history.append({"epoch": number, "loss": loss, "validation": quality})
        measured = "" if quality is None else f", validation {quality:.4f}"
        log(f"epoch {number}/{options.epochs}: loss {loss:.4f}{measured}")
        if best_epoch == 0 or quality is None or quality > history[best_epoch - 1]["validation"]:
            best_epoch, best = number, [p.detach().clone() for p in named.values()]
        if checkpoints:
            tensors = state(named, [optimizer], best if best_epoch < number else None)
            checkpoints.save(tensors, {"training": identity, "history": history, "best_epoch": best_epoch})
    with torch.no_grad():
        for parameter, value in zip(named.values(), best, strict=True):
            parameter.copy_(value)
    model.eval()
    return {
        "epochs": len(history),
        "best_epoch": best_epoch,
        "validation": history[best_epoch - 1]["validation"] if history else None,
        "history": history,
    }


def identity(model: nn.Module, histories: Sequences, options: Options) -> str:
    """Hash of what a training is made from: the model as it is before, its data and the options."""
    digest = hashlib.sha256(json.dumps([type(model).__name__, asdict(model.config), asdict(options)]).encode())
    for array in (histories.indptr, histories.items, *(p.detach().cpu().numpy() for p in model.parameters())):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
