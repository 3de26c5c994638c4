"""Training FilterLLM (arXiv 2502.16924, section 3.3): L = L_D + lambda * L_B by AdamW, cosine with warm-up, early stopping.

The epoch that does best on warm items which training does not see is kept, and the scale of the logits is fitted on them
(udfs/filterllm_validation.py). Training saves its state every epoch and goes on from it; several processes train one model
by parts of each batch. What is drawn at random in an epoch depends on (seed, epoch, process) only.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from udfs import sampled_softmax
from udfs.checkpoints import Checkpoints, restore, state
from udfs.devices import forked
from udfs.distribution_loss import guiding_loss, loss
from udfs.filterllm import FilterLLM, FilterLLMError
from udfs.filterllm_items import Items, at_most, held_out
from udfs.filterllm_validation import Validation, calibrate, measure, validation
from udfs.progress import Progress
from udfs.row_adamw import RowAdamW
from udfs.sampled_softmax import Proposal
from udfs.worker_group import Group

# The paper's share of steps over which the learning rate rises.
_WARM_UP = 0.05


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
    lora_learning_rate: float = 1e-4
    softmax: Literal["full", "sampled"] = "full"
    samples: int = 8192
    proposal: Literal["uniform", "popularity"] = "uniform"
    stop_by: Literal["nll", "ndcg"] = "nll"


def initialise(
    model: FilterLLM, vocabulary: np.ndarray | None, popularity: np.ndarray, hidden: np.ndarray, seed: int
) -> None:
    """Set the start of training, from `seed`: mapper as torch does; the vocabulary [users, dimension] from CF, or random at
    the scale of 1 / sqrt(dimension) when None; the bias to the centred log of the users' interactions `popularity` [users];
    mean and std to those of the hidden states [n, width].
    """
    with forked(model.vocabulary.device), torch.no_grad():
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
    model: FilterLLM,
    texts: nn.Module,
    items: Items,
    options: Options,
    log: Callable[[str], None],
    *,
    checkpoints: Checkpoints | None = None,
    group: Group | None = None,
) -> dict[str, Any]:
    """Train `model` (and `texts`, as far as it has trainable parameters) in place; the best epoch is restored, the scale fitted.

    Args:
        texts: called with item numbers [B] (numpy int64), gives hidden states [B, width] on the model's device. With an
            attribute `lengths` [n] (tokens of each text) tokens/s are logged.
        log: called with a line an epoch, and one a minute within it, of the first process only.
        checkpoints: where the state is saved every epoch. If this training's state is there already, training goes on
            behind it, and ends with the model that an undisturbed one ends with, bit for bit (on a CPU of the same kind).
            What `texts` reads is no part of what a state is told by: another folder for other texts.
        group: this process among those that train together, all with the same arguments; alone by default. Without
            dropout and noise the result depends on their number by rounding only.

    Returns:
        Facts: items, validation_items, epochs (run), best_epoch (1..), validation_nll (nats, before the scale) and
        validation_ndcg (of the epoch that is kept; udfs.filterllm_validation.Quality), calibrated_nll, scale, history (a
        dict an epoch: losses, learning rate, validation). Without validation items (one item in all) the last epoch is
        kept, and what is measured on them is None.

    Raises:
        CheckpointError: what is saved there is another training's, or unreadable.
        FilterLLMError: the loss is no longer a number.
    """
    with forked(model.vocabulary.device):
        training = _Training(model, texts, at_most(items, options.max_users, options.seed), options, group or Group())
        return training.run(log if training.group.rank == 0 else lambda line: None, checkpoints)


class _Training:
    """One call of `train`."""

    def __init__(self, model: FilterLLM, texts: nn.Module, items: Items, options: Options, group: Group) -> None:
        self.model, self.texts, self.items, self.options, self.group = model, texts, items, options, group
        self.device = model.vocabulary.device
        held = held_out(items.item_ids, options.validation_share, options.seed)
        self.index = np.flatnonzero(~held)
        self.embeddings = torch.from_numpy(np.array(items.embeddings, np.float32)).to(self.device)
        self.named = {
            f"{part}.{name}": parameter
            for part, module in (("model", model), ("texts", texts))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.optimizers = _optimizers(self.named, options)
        self.steps = math.ceil(len(self.index) / options.batch_size)
        self.data: Validation | None = None
        if held.any():
            self.data = validation(
                items,
                held,
                seed=options.seed,
                batch_size=options.batch_size,
                chunk=options.vocabulary_chunk,
                group=group,
            )
        self.proposal: Proposal | None = None
        if options.softmax == "sampled":
            self.proposal = Proposal(options.proposal, items.popularity(model.config.users))

    def run(self, log: Callable[[str], None], checkpoints: Checkpoints | None) -> dict[str, Any]:
        options, data = self.options, self.data
        history: list[dict[str, Any]] = []
        best_epoch, best = 0, [p.detach().clone() for p in self.named.values()]
        identity = self._identity() if checkpoints else ""
        saved = checkpoints.load(identity) if checkpoints else None
        if saved:
            tensors, facts = saved
            history, best_epoch = facts["history"], facts["best_epoch"]
            best = restore(tensors, self.named, self.optimizers)
            log(f"goes on behind epoch {len(history)}, which was saved")
        for epoch in range(len(history) + 1, options.epochs + 1):
            if len(history) - best_epoch >= options.patience:
                log(f"no better for {options.patience} epochs: stopped; epoch {best_epoch} is kept")
                break
            begun = time.perf_counter()
            found = self._epoch(epoch, log)
            seconds = time.perf_counter() - begun
            quality = measure(self.model, self.texts, data) if data else None
            if not (math.isfinite(found["loss"]) and (quality is None or math.isfinite(quality.nll))):
                raise FilterLLMError(
                    f"training diverged in epoch {epoch}: the loss is {found['loss']}; lower filterllm.learning_rate "
                    f"({options.learning_rate:g}) or filterllm.lora_learning_rate ({options.lora_learning_rate:g})"
                )
            history.append(
                {
                    "epoch": epoch,
                    **found,
                    "validation_nll": quality.nll if quality else None,
                    "validation_ndcg": quality.ndcg if quality else None,
                }
            )
            log(self._line(history[-1], seconds))
            if self._better(history, best_epoch):
                best_epoch, best = epoch, [p.detach().clone() for p in self.named.values()]
            if checkpoints and self.group.rank == 0:
                tensors = state(self.named, self.optimizers, best if best_epoch < epoch else None)
                facts = {"training": identity, "history": history, "best_epoch": best_epoch}
                checkpoints.save(tensors, facts)
        with torch.no_grad():
            for parameter, value in zip(self.named.values(), best, strict=True):
                parameter.copy_(value)
        self.model.eval()
        self.texts.eval()
        calibrated = calibrate(self.model, self.texts, data) if data else None
        return {
            "items": len(self.index),
            "validation_items": len(data.index) if data else 0,
            "epochs": len(history),
            "best_epoch": best_epoch,
            "validation_nll": history[best_epoch - 1]["validation_nll"],
            "validation_ndcg": history[best_epoch - 1]["validation_ndcg"],
            "calibrated_nll": calibrated,
            "scale": float(self.model.scale),
            "history": history,
        }

    def _epoch(self, epoch: int, log: Callable[[str], None]) -> dict[str, float]:
        """Train an epoch; its mean loss and the two parts of it, and the learning rate it began with."""
        options, group = self.options, self.group
        torch.manual_seed(_seed(options.seed, epoch, group.rank))
        self.model.train()
        self.texts.train()
        order = np.random.Generator(np.random.Philox(key=[options.seed, epoch])).permutation(self.index)
        first_rate, totals = 0.0, torch.zeros(2, dtype=torch.float64, device=self.device)
        progress = Progress("of this epoch", len(order), "items", seconds=60.0, log=log)
        for step in range(self.steps):
            batch = order[step * options.batch_size : (step + 1) * options.batch_size]
            part = group.part(batch)
            rate = self._set_rate((epoch - 1) * self.steps + step)
            first_rate = rate if step == 0 else first_rate
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            # A process without a part computes one item's for nothing: its gradients must have the others' rows.
            distribution, guiding = self._losses(batch, part if len(part) else batch[:1], epoch, step)
            objective = distribution + options.guiding * guiding
            # Each process has the mean over its part; their sum is to be the mean over the batch.
            (objective * (len(part) / len(batch)) if group.size > 1 else objective).backward()
            totals += torch.stack([distribution.detach(), guiding.detach()]) * len(part)
            group.add_gradients(self.named.values())
            for optimizer in self.optimizers:
                optimizer.step()
            progress.advance(len(batch))
        distribution, guiding = (group.add(totals) / len(self.index)).tolist()
        whole = distribution + options.guiding * guiding
        return {"loss": whole, "distribution": distribution, "guiding": guiding, "learning_rate": first_rate}

    def _losses(self, batch: np.ndarray, part: np.ndarray, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Means over `part`, this process's of the items `batch`: distribution loss and guiding loss."""
        model, options = self.model, self.options
        mapped = model(self.texts(part))
        indptr, users = self.items.targets(part, self.device)
        guiding = guiding_loss(mapped, self.embeddings[part])
        if self.proposal is None:
            chunk = options.vocabulary_chunk
            return loss(mapped, model.vocabulary, indptr, users, model.bias, chunk=chunk).mean(), guiding
        drawn = self.proposal.draw(options.samples, options.seed, epoch, step, self.device)
        if self.group.size > 1:
            drawn = drawn.including(self.items.targets(batch, self.device)[1])
        sampled = sampled_softmax.loss(
            mapped, model.vocabulary, indptr, users, model.bias, drawn=drawn, chunk=options.vocabulary_chunk
        )
        return sampled.mean(), guiding

    def _set_rate(self, step: int) -> float:
        """Set the learning rates of this step, counted from 0 over all epochs; returns the mapper's."""
        factor = _cosine(step, self.options.epochs * self.steps)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * factor
        return self.options.learning_rate * factor

    def _better(self, history: list[dict[str, Any]], best_epoch: int) -> bool:
        if best_epoch == 0 or self.data is None:
            return True
        new, best = history[-1], history[best_epoch - 1]
        if self.options.stop_by == "ndcg":
            return new["validation_ndcg"] > best["validation_ndcg"]
        return new["validation_nll"] < best["validation_nll"]

    def _line(self, found: dict[str, Any], seconds: float) -> str:
        parts = [
            f"epoch {found['epoch']}/{self.options.epochs}: loss {found['loss']:.4f} "
            f"(distribution {found['distribution']:.4f}, guiding {found['guiding']:.4f})",
            f"lr {found['learning_rate']:.2e}",
            f"{len(self.index) / seconds:.0f} items/s",
        ]
        lengths = getattr(self.texts, "lengths", None)
        if lengths is not None:
            parts.append(f"{lengths[self.index].sum() / seconds:.0f} tokens/s")
        if self.data:
            parts.append(f"validation nll {found['validation_nll']:.4f}, ndcg@20 {found['validation_ndcg']:.4f}")
        return ", ".join(parts)

    def _identity(self) -> str:
        """Hash of what the training is made from, but the texts: options, model, items, processes, and where it begins."""
        digest = hashlib.sha256()
        facts = [
            # Into what pieces work is cut may change: less memory is what a killed training may need.
            {name: value for name, value in asdict(self.options).items() if name != "vocabulary_chunk"},
            asdict(self.model.config),
            list(self.named),
            self.items.item_ids,
            self.group.size,
        ]
        digest.update(json.dumps(facts, sort_keys=True).encode())
        start = [tensor.detach().float().cpu().numpy() for tensor in (*self.named.values(), *self.model.buffers())]
        for array in (self.items.indptr, self.items.users, self.items.embeddings, *start):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def _optimizers(named: dict[str, nn.Parameter], options: Options) -> list[torch.optim.Optimizer]:
    """AdamW, with LoRA's own learning rate; with a sampled softmax the vocabulary and bias apart, whose gradients are rows."""
    rows = ("model.vocabulary", "model.bias") if options.softmax == "sampled" else ()
    own = {"lr": options.learning_rate, "peak": options.learning_rate}
    of_texts = {"lr": options.lora_learning_rate, "peak": options.lora_learning_rate}
    groups = [
        {"params": [p for name, p in named.items() if name.startswith("model.") and name not in rows], **own},
        {"params": [p for name, p in named.items() if name.startswith("texts.")], **of_texts},
    ]
    decay = options.weight_decay
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=decay)]
    if rows:
        found.append(
            RowAdamW([{"params": [named[name] for name in rows if name in named], **own}], lr=0.0, weight_decay=decay)
        )
    return found


def _cosine(step: int, steps: int) -> float:
    rise = max(1, round(_WARM_UP * steps))
    return min((step + 1) / rise, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def _seed(seed: int, epoch: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{epoch}:{rank}".encode()).digest()[:8], "big") >> 1
