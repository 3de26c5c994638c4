"""How well FilterLLM does on warm items that it does not see in training, as if they were cold: its loss, its ranking, its scale.

The users' vectors, which CF learnt, have seen their interactions: what is held out tells when to stop and what to weigh how much,
and looks somewhat better than cold items will (an NDCG@20 of .238 where CF without them gave .224; CiteULike, one seed).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from udfs.distribution_loss import loss
from udfs.filterllm import FilterLLM
from udfs.filterllm_items import Items
from udfs.ranking_metrics import Task, per_user, task
from udfs.scorers import dot_scorer
from udfs.worker_group import Group

# More held-out items, or users who rank them, tell no more about when to stop, and cost a pass each.
_ITEMS, _USERS = 4096, 10_000
_K = 20


@dataclass(frozen=True)
class Validation:
    """The held-out items `index`, the users who rank them (`task`: candidates are positions in `index`), and how."""

    items: Items
    index: np.ndarray
    task: Task
    batch_size: int
    chunk: int
    group: Group


@dataclass(frozen=True)
class Quality:
    """nll: mean distribution loss L_D, in nats, at the model's scale. ndcg: NDCG@20 of the held-out items, ranked among
    themselves by log p(u | i) for each of the users who have one.
    """

    nll: float
    ndcg: float


def validation(items: Items, held: np.ndarray, *, seed: int, batch_size: int, chunk: int, group: Group) -> Validation:
    """The validation on the items `held` [n] bool; of more than 4,096 of them, and of more than 10,000 of their users, on as many
    that `seed` draws.
    """
    index = np.flatnonzero(held)
    if len(index) > _ITEMS:
        index = np.sort(np.random.Generator(np.random.Philox(key=[seed, 1])).choice(index, _ITEMS, replace=False))
    indptr, users = (tensor.numpy() for tensor in items.targets(index, torch.device("cpu")))
    among = np.unique(users)
    if len(among) > _USERS:
        among = np.sort(np.random.Generator(np.random.Philox(key=[seed, 0])).choice(among, _USERS, replace=False))
    none = np.zeros(0, np.int64)
    truth = (users, np.repeat(np.arange(len(index)), np.diff(indptr)))
    found = task(np.arange(len(index)), truth, (none, none), among)
    return Validation(items, index, found, batch_size, chunk, group)


@torch.no_grad()
def _mapped(model: FilterLLM, texts: nn.Module, data: Validation) -> torch.Tensor:
    """g [n, dimension] of the held-out items."""
    model.eval()
    texts.eval()

    def compute(index: np.ndarray) -> torch.Tensor:
        starts = range(0, len(index), data.batch_size)
        return torch.cat([model(texts(index[start : start + data.batch_size])) for start in starts])

    return data.group.rows(compute, data.index)


@torch.no_grad()
def _losses(model: FilterLLM, mapped: torch.Tensor, data: Validation) -> torch.Tensor:
    """L_D of each held-out item, [n]."""
    bias = None if model.bias is None else model.bias * model.scale
    queries = mapped * model.scale

    def compute(rows: np.ndarray) -> torch.Tensor:
        targets = data.items.targets(data.index[rows], mapped.device)
        return loss(
            queries[torch.from_numpy(rows).to(mapped.device)], model.vocabulary, *targets, bias, chunk=data.chunk
        )

    return data.group.rows(compute, np.arange(len(data.index)))


@torch.no_grad()
def measure(model: FilterLLM, texts: nn.Module, data: Validation) -> Quality:
    """The model's quality as it is."""
    mapped = _mapped(model, texts, data)
    losses = _losses(model, mapped, data)
    nll = float(losses.double().mean())
    if not math.isfinite(nll):
        return Quality(nll, math.nan)
    # Which epoch is best must be the same for all workers, whatever their processors make of near ties.
    ndcg = _ndcg(model, mapped, losses, data) if data.group.rank == 0 else 0.0
    (shared,) = data.group.add(torch.tensor([ndcg], dtype=torch.float64, device=mapped.device)).tolist()
    return Quality(nll, shared)


@torch.no_grad()
def _ndcg(model: FilterLLM, mapped: torch.Tensor, losses: torch.Tensor, data: Validation) -> float:
    """NDCG@20 by log p(u | i) = logit - log Z_i, where log Z_i is the item's loss and the mean of its own users' logits."""
    device = mapped.device
    queries = mapped * model.scale
    bias = mapped.new_zeros(len(model.vocabulary)) if model.bias is None else model.bias * model.scale
    own = []
    for start in range(0, len(data.index), data.batch_size):
        part = slice(start, start + data.batch_size)
        indptr, users = data.items.targets(data.index[part], device)
        counts = indptr.diff()
        logits = (model.vocabulary[users] * queries[part].repeat_interleave(counts, dim=0)).sum(1) + bias[users]
        own.append(torch.segment_reduce(logits, "mean", lengths=counts))
    log_z = losses + torch.cat(own)
    users = torch.from_numpy(data.task.users).to(device)
    # The whole as one inner product: [z, b, 1] . [q, 1, -log Z].
    keys = torch.cat([model.vocabulary[users], bias[users, None], bias.new_ones(len(users), 1)], dim=1)
    candidates = torch.cat([queries, torch.ones_like(log_z)[:, None], -log_z[:, None]], dim=1)
    known = np.ones(len(users), np.bool_)
    scorer = dot_scorer(keys.cpu().numpy(), candidates.cpu().numpy(), data.task.candidates, known)
    ranked = replace(data.task, users=np.arange(len(users)))
    return float(per_user(scorer, ranked, (_K,))[f"ndcg@{_K}"].mean())


def calibrate(model: FilterLLM, texts: nn.Module, data: Validation) -> float:
    """Fit model.scale, within 1/16 .. 16, to the lowest mean L_D of the held-out items; returns that loss.

    The scale is a temperature: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    mapped = _mapped(model, texts, data)

    def at(log_scale: float) -> float:
        model.scale.fill_(math.exp(log_scale))
        return float(_losses(model, mapped, data).double().mean())

    limit = math.log(16)
    found = minimize_scalar(at, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-3})
    return at(float(found.x))
