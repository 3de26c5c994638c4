"""Training SASRec, GRU4Rec and NextItNet alike: the next item of every position, as SASRec's paper does (arXiv 1808.09781).

Loss: binary cross-entropy of the next item and of one item that the user has no event with (equation 7), Adam. A batch holds
histories of similar length, so that little of it is padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from udfs import epochs
from udfs.backbone import SequenceModel
from udfs.bpr import NegativeSampler
from udfs.cf_inputs import CfError
from udfs.checkpoints import Checkpoints
from udfs.sequences import PADDING, Sequences, batches


@dataclass(frozen=True)
class Options(epochs.Options):
    """How to train."""

    learning_rate: float = 1e-3
    batch_positions: int = 2048  # items read in a step, padding included


def train(
    model: SequenceModel,
    histories: Sequences,
    options: Options,
    log: Callable[[str], None],
    *,
    validate: Callable[[], float] | None = None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, Any]:
    """Train `model` in place, on the device it is on. Histories of one item, or none, teach nothing.

    Args:
        histories: of items 0 .. I - 1; of a long one the last max_length + 1 items are read, but none of its items is ever
            a negative.
        validate, checkpoints, and what is returned and raised: see `udfs.epochs.run`.

    Raises:
        CfError: no history has two items; or as `udfs.epochs.run`.
    """
    lengths = np.minimum(histories.lengths - 1, model.config.max_length)
    learnt = np.flatnonzero(lengths > 0)
    if not len(learnt):
        raise CfError(f"no history of two items or more among {len(histories)}: there is no next item to learn")
    device = model.items.device
    generator = torch.Generator(device=device)
    rows, items = (torch.from_numpy(part).to(device) for part in (histories.rows, histories.items))
    draw = NegativeSampler(rows, items, model.config.items, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)

    def epoch(seed: int) -> float:
        generator.manual_seed(seed)
        rng = np.random.Generator(np.random.Philox(seed))
        order = rng.permutation(learnt)
        groups = [order[group] for group in batches(lengths[order], options.batch_positions)]
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for group in rng.permutation(len(groups)):
            users = groups[group]
            window = torch.from_numpy(histories.padded(users, int(lengths[users].max()) + 1)).to(device)
            read, following = window[:, :-1], window[:, 1:]
            real = read != PADDING
            states, positive = model(read)[real], following[real]
            user = torch.from_numpy(users).to(device)[:, None].expand_as(read)[real]
            negative, counts = draw(user)
            right = (states * F.embedding(positive, model.items)).sum(1)
            wrong = (states * F.embedding(negative, model.items)).sum(1)
            loss = -(F.logsigmoid(right) + counts * F.logsigmoid(-wrong)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += torch.stack([loss.detach() * len(positive), loss.new_tensor(len(positive))])
        return float(total[0] / total[1])

    identity = epochs.identity(model, histories, options)
    return epochs.run(model, optimizer, epoch, options, log, validate, checkpoints, identity)
