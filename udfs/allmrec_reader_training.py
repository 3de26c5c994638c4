"""Training A-LLMRec's second stage (arXiv 2404.11343, section 4.2): the projections alone, by the likelihood of the true title."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from udfs import epochs
from udfs.allmrec_examples import AllmrecError, Examples
from udfs.allmrec_projections import Config, build
from udfs.allmrec_reader import Catalogue, Reader
from udfs.checkpoints import Checkpoints
from udfs.fingerprint import fingerprint
from udfs.progress import Progress
from udfs.sequences import Ints


@dataclass(frozen=True)
class Options(epochs.Options):
    """How to train; the defaults are the paper's. Its few-shot training has 256 or 128 users: give so many examples."""

    epochs: int = 5
    batch_size: int = 4
    negatives: int = 19  # of a prompt's candidates
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0


def train(
    reader: Reader,
    catalogue: Catalogue,
    examples: Examples,
    pool: Ints,
    options: Options,
    log: Callable[[str], None],
    *,
    checkpoints: Checkpoints | None = None,
) -> dict[str, Any]:
    """Train `reader.projections` in place; without any, new ones are made, from options.seed.

    Candidates are drawn anew every epoch.

    Args:
        catalogue: of this reader, with the items' joint vectors.
        pool: items that candidates are drawn from.
        log: called with a line an epoch, and one a minute within it.
        checkpoints: as in `udfs.epochs.run`; the language model is no part of them.

    Returns:
        Facts, as of `udfs.epochs.run`; the last epoch is kept.

    Raises:
        AllmrecError: no example, too few items in the pool, or prompts that are too long.
        CfError, CheckpointError: as `udfs.epochs.run`.
    """
    if not len(examples):
        raise AllmrecError("the reader has no examples to learn from: no user has an item that came after another")
    if reader.projections is None:
        config = Config(examples.users.shape[1], catalogue.joint.shape[1], reader.width)
        reader.projections = build(config, options.seed).to(reader.device)
        known = np.unique(np.concatenate([pool, examples.positives]))
        reader.projections.fit(examples.users, catalogue.joint.cpu().numpy()[known], reader.embeddings)
    projections = reader.projections
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    # The second beta is the released code's.
    optimizer = kind(
        projections.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=options.weight_decay
    )

    def epoch(seed: int) -> float:
        candidates = examples.draw(pool, options.negatives, seed)
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(examples))
        whole = torch.zeros((), dtype=torch.float64, device=reader.device)
        progress = Progress("of this epoch", len(order), "users", seconds=60.0, log=log)
        for start in range(0, len(order), options.batch_size):
            rows = order[start : start + options.batch_size]
            found = reader.loss(catalogue, examples.users[rows], examples.histories.take(rows), candidates[rows])
            optimizer.zero_grad(set_to_none=True)
            # Without soft tokens in the prompt there is nothing to learn: then it is the language model alone.
            if found.requires_grad:
                found.backward()
                optimizer.step()
            whole += found.detach() * len(rows)
            progress.advance(len(rows))
        return float(whole / len(examples))

    shapes = {name: list(parameter.shape) for name, parameter in reader.model.named_parameters()}
    prompts = catalogue.prompts
    key = fingerprint(
        ["reader", asdict(options), asdict(projections.config), asdict(prompts.options), [*prompts.texts], shapes],
        # Enough of the language model to tell it from others.
        reader.embeddings[::101].float().cpu().numpy(),
        catalogue.joint.cpu().numpy(),
        pool,
        *examples.arrays(),
        # The scale follows from the embeddings, and each device adds them up in its own order.
        *(tensor.cpu().numpy() for name, tensor in projections.state_dict().items() if name != "size"),
    )
    return epochs.run(projections, optimizer, epoch, options, log, None, checkpoints, key)
