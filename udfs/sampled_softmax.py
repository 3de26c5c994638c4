"""Sampled softmax: FilterLLM's distribution loss over a few drawn users a step, for vocabularies too large to go through whole.

The normaliser Z = sum over all users of exp(logit) is estimated from n users drawn with replacement from a proposal Q that
all items of the batch share (log-Q correction; Bengio and Senecal 2008, Jean et al. 2015, arXiv 1412.2007):

    Z = sum of exp(logit) over the item's own users + sum over drawn j that are not its own of exp(logit_j) / (n Q_j)

The item's own users are always in, at their true weight, and a draw that hits one (an accidental hit) counts as nothing, so
the estimate of Z is unbiased for every n; that of log Z, and with it the loss, is biased by about -Var(Z) / (2 Z^2), which
falls as 1 / n. Memory is items x (drawn users + the batch's own users), and the vocabulary's gradient has those rows only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from udfs.distribution_loss import check_targets


@dataclass(frozen=True)
class Drawn:
    """The users of one draw. users: [m] int64, ascending, each once. log_weight: [m] float64, log of how many users each
    stands for: log(times drawn / (n Q)).
    """

    users: torch.Tensor
    log_weight: torch.Tensor

    def including(self, users: torch.Tensor) -> Drawn:
        """Also `users`, those that were not drawn with no weight of their own: so processes that each have a part of a
        batch get gradients of the same rows.
        """
        every = torch.unique(torch.cat([self.users, users]))
        weights = self.log_weight.new_full((len(every),), -torch.inf)
        weights[torch.searchsorted(every, self.users)] = self.log_weight
        return Drawn(every, weights)


class Proposal:
    """The distribution Q that users are drawn from: uniform, or by popularity, Q_u in proportion to interactions + 1."""

    def __init__(self, kind: Literal["uniform", "popularity"], popularity: np.ndarray) -> None:
        """`popularity`: [U], interactions of each user."""
        self._users = len(popularity)
        # Add-one: a user who could never be drawn would be missing from Z.
        self._cumulative = np.cumsum(popularity + 1.0) if kind == "popularity" else None

    def log_q(self, users: np.ndarray) -> np.ndarray:
        """log Q of `users`, float64."""
        if self._cumulative is None:
            return np.full(len(users), -np.log(self._users))
        before = np.where(users > 0, self._cumulative[np.maximum(users, 1) - 1], 0.0)
        return np.log((self._cumulative[users] - before) / self._cumulative[-1])

    def draw(self, samples: int, seed: int, epoch: int, step: int, device: torch.device | str = "cpu") -> Drawn:
        """`samples` users with replacement; the same arguments give the same ones."""
        # The epoch's order of items comes from the same key at counter 0.
        generator = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, step + 1]))
        if self._cumulative is None:
            drawn = generator.integers(0, self._users, samples)
        else:
            drawn = np.searchsorted(self._cumulative, generator.random(samples) * self._cumulative[-1], side="right")
            drawn = np.minimum(drawn, self._users - 1)
        users, times = np.unique(drawn, return_counts=True)
        weight = np.log(times) - np.log(samples) - self.log_q(users)
        return Drawn(torch.from_numpy(users).to(device), torch.from_numpy(weight).to(device))


class _SampledLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        vocabulary: torch.Tensor,
        bias: torch.Tensor | None,
        indptr: torch.Tensor,
        users: torch.Tensor,
        drawn: torch.Tensor,
        log_weight: torch.Tensor,
        chunk: int,
    ) -> torch.Tensor:
        counts = indptr.diff()
        rows = torch.repeat_interleave(torch.arange(len(counts), device=hidden.device), counts, output_size=len(users))
        columns = torch.unique(torch.cat([drawn, users]))
        weight = hidden.new_full((len(columns),), -torch.inf)
        weight[torch.searchsorted(columns, drawn)] = log_weight.to(hidden.dtype)
        # By column, so that the positives of a chunk are one slice.
        own, order = torch.sort(torch.searchsorted(columns, users), stable=True)
        rows = rows[order]
        block = vocabulary[columns]
        offset = torch.zeros_like(weight) if bias is None else bias[columns]
        cuts = torch.searchsorted(own, torch.arange(0, len(columns) + chunk, chunk, device=own.device)).tolist()
        lse = hidden.new_full((len(hidden),), -torch.inf)
        positive = hidden.new_empty(len(users))
        for number, start in enumerate(range(0, len(columns), chunk)):
            of_chunk = slice(cuts[number], cuts[number + 1])
            logits, raw = _logits(hidden, block, offset, weight, rows[of_chunk], own[of_chunk], start, chunk)
            lse = torch.logaddexp(lse, torch.logsumexp(logits, dim=1))
            positive[order[of_chunk]] = raw
        ctx.save_for_backward(hidden, block, offset, weight, lse, rows, own, counts, columns)
        ctx.chunk, ctx.cuts, ctx.users, ctx.bias = chunk, cuts, len(vocabulary), bias is not None
        # segment_reduce adds in the order of the rows on every device; index_add_ would not on a GPU.
        return lse - torch.segment_reduce(positive, "sum", lengths=counts) / counts

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, block, offset, weight, lse, rows, own, counts, columns = ctx.saved_tensors
        (grad,) = grads
        d_hidden, d_block, d_offset = torch.zeros_like(hidden), torch.empty_like(block), torch.empty_like(offset)
        share = 1 / counts.to(hidden.dtype)
        for number, start in enumerate(range(0, len(columns), ctx.chunk)):
            of_chunk = slice(ctx.cuts[number], ctx.cuts[number + 1])
            row, column = rows[of_chunk], own[of_chunk]
            logits, _ = _logits(hidden, block, offset, weight, row, column, start, ctx.chunk)
            # d loss / d logit = (weighted p) - q, times what comes from above.
            delta = logits.sub_(lse[:, None]).exp_()
            delta[row, column - start] -= share[row]
            delta *= grad[:, None]
            part = slice(start, start + ctx.chunk)
            d_hidden += delta @ block[part]
            d_block[part] = delta.T @ hidden
            d_offset[part] = delta.sum(0)
        d_vocabulary = _rows(columns, d_block, ctx.users)
        d_bias = _rows(columns, d_offset, ctx.users) if ctx.bias else None
        return d_hidden, d_vocabulary, d_bias, None, None, None, None, None


def _logits(
    hidden: torch.Tensor,
    block: torch.Tensor,
    offset: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    own: torch.Tensor,
    start: int,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, chunk] with log weights added, but at the items' own users; and those users' logits alone."""
    part = slice(start, start + chunk)
    logits = (hidden @ block[part].T).add_(offset[part])
    raw = logits[rows, own - start]
    logits += weight[part]
    logits[rows, own - start] = raw
    return logits, raw


def _rows(columns: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    return torch.sparse_coo_tensor(
        columns[None], values, (size, *values.shape[1:]), is_coalesced=True, check_invariants=False
    )


def loss(
    hidden: torch.Tensor,
    vocabulary: torch.Tensor,
    indptr: torch.Tensor,
    users: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    drawn: Drawn,
    chunk: int = 65536,
) -> torch.Tensor:
    """Distribution loss L_D of each item (arXiv 2502.16924), in nats, with Z estimated from the drawn users.

    Args:
        hidden: [B, d] floating point, g of the batch's items.
        vocabulary: [U, d], same dtype and device.
        indptr: [B + 1] int64, and users: [indptr[-1]] int64: item i's training users are
            `users[indptr[i]:indptr[i + 1]]`, each once; q_i is uniform over them.
        bias: [U], added to every item's logits.
        drawn: of `Proposal.draw`, on the same device.
        chunk: drawn and own users whose logits exist at a time.

    Returns:
        [B]; differentiable in hidden, vocabulary and bias (first derivatives). The gradients of vocabulary and bias are
        sparse (COO, coalesced): the drawn users' rows and the batch's own.

    Raises:
        ValueError: an item without users, or a user outside the vocabulary.
    """
    check_targets(indptr, users, len(vocabulary))
    return _SampledLoss.apply(hidden, vocabulary, bias, indptr, users, drawn.users, drawn.log_weight, chunk)
