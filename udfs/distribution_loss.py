"""FilterLLM's losses: the distribution over all users, and behaviour guiding (arXiv 2502.16924, section 3).

The distribution loss of an item is the cross-entropy of p(u | item) = softmax_u(g . z_u + b_u) against q, which is uniform
over the item's training users. It is computed in tiles of the vocabulary that stay in the processor's cache, in the manner of
torchtune's linear cross-entropy: the forward pass keeps an item's log-sum-exp, and the exponentials of the first `chunk`
users, which the backward pass then only scales; of all others it computes the logits again. So logits [items, users] never
exist; memory is [items, chunk].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from udfs.threads import in_threads

# Logits of a tile: on a CPU what stays in its cache.
_CELLS = {"cpu": 2**19, "cuda": 2**26}
# Tiles are worked on in as many groups, by the threads that there are.
_GROUPS = 16


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
        keep: bool,
    ) -> torch.Tensor:
        counts = indptr.diff()
        rows = torch.repeat_interleave(torch.arange(len(counts), device=hidden.device), counts, output_size=len(users))
        # By user, so that the targets of a tile are one slice.
        users, order = torch.sort(users, stable=True)
        rows = rows[order]
        width = min(chunk, max(_CELLS[hidden.device.type] // max(len(hidden), 1), 256))
        width = -(
            -len(vocabulary) // -(-len(vocabulary) // width)
        )  # as many tiles, of one size but for the last user or so
        starts = torch.arange(0, len(vocabulary) + width, width, device=users.device)
        cuts = torch.searchsorted(users, starts).tolist()
        positive = hidden.new_empty(len(users))
        tiles = range(0, len(vocabulary), width)

        def forward_of(group: list[int]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
            """Shift [B], log-sum-exp [B] and, if it is kept, the exponentials [B, width] of each tile."""
            found = []
            spare = None
            for number in group:
                to_keep = keep and tiles[number] + width <= chunk
                tile = _logits(hidden, vocabulary, bias, tiles[number], width, None if to_keep else spare)
                of_tile = slice(cuts[number], cuts[number + 1])
                positive[order[of_tile]] = tile[rows[of_tile], users[of_tile] - tiles[number]]
                shift = tile.amax(dim=1)
                log_sum = tile.sub_(shift[:, None]).exp_().sum(dim=1).log_().add_(shift)
                found.append((shift, log_sum, tile if to_keep else None))
                spare = spare if to_keep else tile
            return found

        parts = [part for group in _run(forward_of, len(tiles), hidden) for part in group]
        lse = torch.logsumexp(torch.stack([part[1] for part in parts]), dim=0)
        kept = [(part[2], part[0]) for part in parts if part[2] is not None]
        ctx.save_for_backward(
            hidden, vocabulary, bias, lse, rows, users, counts, *[k[0] for k in kept], *[k[1] for k in kept]
        )
        ctx.width, ctx.cuts, ctx.kept = width, cuts, len(kept)
        # segment_reduce adds in the order of the rows on every device; index_add_ would not on a GPU.
        return lse - torch.segment_reduce(positive, "sum", lengths=counts) / counts

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, vocabulary, bias, lse, rows, users, counts, *tiles = ctx.saved_tensors
        kept, shifts = tiles[: ctx.kept], tiles[ctx.kept :]
        (grad,) = grads
        d_vocabulary = torch.empty_like(vocabulary)
        d_bias = torch.empty_like(bias) if bias is not None else None
        share = grad / counts.to(hidden.dtype)

        def backward_of(group: list[int]) -> torch.Tensor:
            """The group's part of hidden's gradient, [B, d]; its users' gradients are put in their place."""
            d_hidden = torch.zeros_like(hidden)
            spare = None
            for number in group:
                start = number * ctx.width
                # d loss / d logit = p - q, times what comes from above.
                if number < ctx.kept:
                    scale = torch.exp(shifts[number] - lse).mul_(grad)
                    out = spare if spare is not None and spare.shape == kept[number].shape else None
                    delta = torch.mul(kept[number], scale[:, None], out=out)
                else:
                    delta = _logits(hidden, vocabulary, bias, start, ctx.width, spare)
                    delta.sub_(lse[:, None]).exp_().mul_(grad[:, None])
                spare = delta
                targets = slice(ctx.cuts[number], ctx.cuts[number + 1])
                delta[rows[targets], users[targets] - start] -= share[rows[targets]]
                part = slice(start, start + ctx.width)
                d_hidden.addmm_(delta, vocabulary[part])
                torch.mm(delta.T, hidden, out=d_vocabulary[part])
                if d_bias is not None:
                    d_bias[part] = delta.sum(0)
            return d_hidden

        d_hidden = torch.stack(_run(backward_of, len(ctx.cuts) - 1, hidden)).sum(dim=0)
        return d_hidden, d_vocabulary, d_bias, None, None, None, None


def _run(work: Callable[[list[int]], Any], tiles: int, hidden: torch.Tensor) -> list[Any]:
    """`work` of the numbers of all tiles in groups, which do not depend on how many threads there are: nor do the sums."""
    count = min(_GROUPS, tiles)
    groups = [list(range(g * tiles // count, (g + 1) * tiles // count)) for g in range(count)]
    if hidden.device.type == "cpu":
        return in_threads(work, groups)
    return [work(group) for group in groups]


def _logits(
    hidden: torch.Tensor,
    vocabulary: torch.Tensor,
    bias: torch.Tensor | None,
    start: int,
    width: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Logits [items, width] of the users from `start` on, in `out` if it has this shape."""
    part = vocabulary[start : start + width]
    logits = torch.mm(hidden, part.T, out=out if out is not None and out.shape[1] == len(part) else None)
    return logits if bias is None else logits.add_(bias[start : start + width])


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
        chunk: users whose exponentials are kept for the backward pass, at most; more cost memory, fewer a fifth more time.

    Returns:
        [B]; differentiable in hidden, vocabulary and bias (first derivatives).

    Raises:
        ValueError: an item without users, or a user outside the vocabulary.
    """
    check_targets(indptr, users, len(vocabulary))
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, vocabulary, bias))
    return _DistributionLoss.apply(hidden, vocabulary, bias, indptr, users, chunk, keep)


def check_targets(indptr: torch.Tensor, users: torch.Tensor, vocabulary: int) -> None:
    """Raises ValueError if an item has no users, or a user lies outside a vocabulary of this size."""
    # One answer, since a GPU is waited for each time.
    alone, outside = torch.stack([(indptr.diff() < 1).any(), ((users < 0) | (users >= vocabulary)).any()]).tolist()
    if alone:
        raise ValueError("every item of the batch needs at least one training user")
    if outside:
        raise ValueError(f"user indices must lie in 0..{vocabulary - 1}")


def guiding_loss(mapped: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Behaviour guiding L_B (arXiv 2502.16924): mean((g - e)^2) over batch and dimensions, [B, d] each; e are CF item vectors."""
    return torch.mean((mapped - embeddings) ** 2)
