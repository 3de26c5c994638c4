"""FilterLLM's losses: the distribution over all users, and behaviour guiding (arXiv 2502.16924, section 3).

The distribution loss of an item is the cross-entropy of p(u | item) = softmax_u(g . z_u + b_u) against q, which is uniform
over the item's training users. It is computed in chunks of the vocabulary, in the manner of torchtune's linear
cross-entropy: the forward pass keeps one number an item (its log-sum-exp), the backward pass computes each chunk's logits
again, so logits [items, users] never exist; memory is [items, chunk].
"""

from __future__ import annotations

from typing import Any

import torch


class _DistributionLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        vocabulary: torch.Tensor,
        bias: torch.Tensor | None,
        indptr: torch.Tensor,
        users: torch.Tensor,
        chunk: int,
    ) -> torch.Tensor:
        counts = indptr.diff()
        rows = torch.repeat_interleave(torch.arange(len(counts), device=hidden.device), counts)
        # By user, so that the targets of a chunk are one slice.
        users, order = torch.sort(users, stable=True)
        rows = rows[order]
        starts = torch.arange(0, len(vocabulary) + chunk, chunk, device=users.device)
        cuts = torch.searchsorted(users, starts).tolist()
        lse = hidden.new_full((len(hidden),), -torch.inf)
        positive = hidden.new_empty(len(users))
        for number, start in enumerate(range(0, len(vocabulary), chunk)):
            logits = _logits(hidden, vocabulary, bias, start, chunk)
            lse = torch.logaddexp(lse, torch.logsumexp(logits, dim=1))
            of_chunk = slice(cuts[number], cuts[number + 1])
            positive[order[of_chunk]] = logits[rows[of_chunk], users[of_chunk] - start]
        ctx.save_for_backward(hidden, vocabulary, bias, lse, rows, users, counts)
        ctx.chunk, ctx.cuts = chunk, cuts
        # segment_reduce adds in the order of the rows on every device; index_add_ would not on a GPU.
        return lse - torch.segment_reduce(positive, "sum", lengths=counts) / counts

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, vocabulary, bias, lse, rows, users, counts = ctx.saved_tensors
        (grad,) = grads
        d_hidden = torch.zeros_like(hidden)
        d_vocabulary = torch.empty_like(vocabulary)
        d_bias = torch.empty_like(bias) if bias is not None else None
        share = 1 / counts.to(hidden.dtype)
        for number, start in enumerate(range(0, len(vocabulary), ctx.chunk)):
            # d loss / d logit = p - q, times what comes from above.
            delta = torch.exp(_logits(hidden, vocabulary, bias, start, ctx.chunk) - lse[:, None])
            of_chunk = slice(ctx.cuts[number], ctx.cuts[number + 1])
            delta[rows[of_chunk], users[of_chunk] - start] -= share[rows[of_chunk]]
            delta *= grad[:, None]
            part = slice(start, start + ctx.chunk)
            d_hidden += delta @ vocabulary[part]
            d_vocabulary[part] = delta.T @ hidden
            if d_bias is not None:
                d_bias[part] = delta.sum(0)
        return d_hidden, d_vocabulary, d_bias, None, None, None


def _logits(
    hidden: torch.Tensor, vocabulary: torch.Tensor, bias: torch.Tensor | None, start: int, chunk: int
) -> torch.Tensor:
    logits = hidden @ vocabulary[start : start + chunk].T
    return logits if bias is None else logits.add_(bias[start : start + chunk])


def loss(
    hidden: torch.Tensor,
    vocabulary: torch.Tensor,
    indptr: torch.Tensor,
    users: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    chunk: int = 65536,
) -> torch.Tensor:
    """Distribution loss L_D of each item (arXiv 2502.16924): -sum_u q_iu log p(u | i), in nats.

    Args:
        hidden: [B, d] floating point, g of the batch's items.
        vocabulary: [U, d], same dtype and device.
        indptr: [B + 1] int64, and users: [indptr[-1]] int64: item i's training users are
            `users[indptr[i]:indptr[i + 1]]`, each once; q_i is uniform over them.
        bias: [U], added to every item's logits.
        chunk: users whose logits exist at a time.

    Returns:
        [B]; differentiable in hidden, vocabulary and bias (first derivatives).

    Raises:
        ValueError: an item without users, or a user outside the vocabulary.
    """
    if bool((indptr.diff() < 1).any()):
        raise ValueError("every item of the batch needs at least one training user")
    if len(users) and (int(users.min()) < 0 or int(users.max()) >= len(vocabulary)):
        raise ValueError(f"user indices must lie in 0..{len(vocabulary) - 1}")
    return _DistributionLoss.apply(hidden, vocabulary, bias, indptr, users, chunk)


def guiding_loss(mapped: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Behaviour guiding L_B (arXiv 2502.16924): mean((g - e)^2) over batch and dimensions, [B, d] each; e are CF item vectors."""
    return torch.mean((mapped - embeddings) ** 2)
