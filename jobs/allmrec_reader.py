"""A-LLMRec's second stage on a night (arXiv 2404.11343, section 4.2): the projections of a reader, as an artifact.

A reader (`_artifacts/readers/<version>`) belongs to one alignment, one language model and the settings. It learns from users
the last item of whose history is what the model has to find; x_u is what CF makes of the user without it. A fifth of the users
is left for others to ask (jobs/recommend_weights.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from jobs import allmrec_alignment, allmrec_artifacts
from jobs.allmrec_artifacts import Training
from jobs.allmrec_backbone import Side
from jobs.allmrec_night import Mask, Night, renumbered
from jobs.allmrec_settings import AllmrecReader
from jobs.run import Run
from udfs import allmrec_projections, allmrec_reader_training
from udfs.allmrec_actor import LanguageModel
from udfs.allmrec_examples import AllmrecError, Examples
from udfs.allmrec_prompt import DOMAINS, PromptOptions
from udfs.filterllm_items import held_out
from udfs.model_files import default_cache
from udfs.sequences import Ints, Sequences
from udfs.vectors import Matrix

KIND = "readers"
# Not of what is computed, but of how.
_MEANS = {"shard_users", "batch_tokens", "weigh_users"}
_DEFINITION = "2"  # raise it when another reader comes from the same settings
_HELD_OUT = 0.2
_OPTIONS = ("epochs", "batch_size", "negatives", "optimizer", "learning_rate", "weight_decay")


@dataclass(frozen=True)
class Spoken:
    """The night's items as a prompt names them.

    joint: [I, joint]. known: [I], items that have a joint vector. by_text: [I], those whose vector is q_i, the text side: cold
    ones, and those that CF does not know; otherwise it is e_i.
    """

    joint: Matrix
    known: Mask
    by_text: Mask

    def histories(self, histories: Sequences) -> Sequences:
        """The same histories without items that have no joint vector."""
        return renumbered(histories, np.where(self.known, np.arange(len(self.known)), -1))[0]


def language_model(conf: AllmrecReader) -> LanguageModel:
    """The causal language model that the settings name."""
    return LanguageModel(conf.model, conf.sha256, conf.dtype, conf.batch_tokens, str(default_cache()))


def prompt_options(conf: AllmrecReader) -> PromptOptions:
    """What the settings have a prompt say."""
    return PromptOptions(DOMAINS[conf.domain], conf.history, conf.title_tokens, conf.user, conf.items, conf.candidates)


def spoken(run: Run, night: Night, alignment: str, side: Side) -> Spoken:
    """The items by alignment `alignment`; `side` holds the vectors of those that CF knows."""
    by_text = night.with_text & (night.cold | ~side.known)
    model = allmrec_alignment.load(run, alignment)
    texts = np.zeros((len(by_text), model.config.width), np.float32)
    if by_text.any():
        shas = night.texts.filter(pa.array(by_text)).to_pylist()
        texts[by_text] = allmrec_alignment.texts(run, alignment, night.snapshot, shas)
    return Spoken(model.joint(side.items, texts, by_text), by_text | side.known, by_text)


def find(run: Run, night: Night, alignment: str, side: Side, items: Spoken) -> str:
    """The newest reader of this alignment and language model, or one that is trained now; its version.

    Raises:
        AllmrecError: nobody's history can be learnt from, or a prompt is too long for the model.
        udfs.model_files.ModelError: the language model is missing, or is none.
    """
    conf, seed = run.settings.allmrec.reader, run.settings.seed
    identity = {
        "alignment_version": alignment,
        "language_model": language_model(conf).resolve()[1],
        "conf": allmrec_artifacts.conf_digest(conf, seed, _MEANS),
        "definition": _DEFINITION,
    }
    version = allmrec_artifacts.newest(run, KIND, identity)
    if version is not None:
        return version
    pool = _pool(night, items)
    examples = _examples(night, side, items, pool, conf, seed)

    fit = partial(_fit, run, night, items, pool, examples, identity["language_model"])
    arrays: list[np.ndarray] = [items.joint, pool, *examples.arrays()]
    return allmrec_artifacts.train(run, KIND, identity, night.titles, arrays, fit)


def learnable(night: Night, side: Side, items: Spoken, conf: AllmrecReader, seed: int) -> tuple[Ints, Ints]:
    """Users whose last item a reader can be asked for: those that it learns from, and those that are held out, by their ids."""
    histories, pool = night.histories, _pool(night, items)
    last = histories.items[histories.indptr[1:] - 1]  # the snapshot has no user without an item
    in_pool = np.isin(np.arange(len(items.known)), pool)
    before = histories.lengths - 1
    mine = np.bincount(histories.rows, in_pool[histories.items], minlength=len(histories))
    usable = side.users_known & in_pool[last] & (before >= max(1, side.least)) & (len(pool) - mine > conf.negatives)
    rows = np.flatnonzero(usable)
    held = held_out(night.user_ids.take(pa.array(rows)).to_pylist(), _HELD_OUT, seed)
    return rows[~held], rows[held]


def _pool(night: Night, items: Spoken) -> Ints:
    """Items that candidates are drawn from."""
    return np.flatnonzero(items.known & ~items.by_text & ~night.cold)


def _examples(night: Night, side: Side, items: Spoken, pool: Ints, conf: AllmrecReader, seed: int) -> Examples:
    """At most conf.examples users: the last item is the positive, what was before it is the history."""
    histories = night.histories
    rows, _ = learnable(night, side, items, conf, seed)
    if not len(rows):
        raise AllmrecError(
            f"the reader has nothing to learn from: of {len(histories)} users {int((histories.lengths > 1).sum())} have two "
            f"items or more, and none of them has a warm last item that can stand among {conf.negatives} others of "
            f"{len(pool)}; lower allmrec.reader.negatives, or take more interactions"
        )
    drawn = np.random.Generator(np.random.Philox(seed)).permutation(len(rows))[: conf.examples]
    rows = rows[np.sort(drawn)]
    before = histories.lengths[rows] - 1
    asked, positives = without_last(night, items, rows)
    return Examples(side.before(rows, before), asked, positives, histories.take(rows))


def without_last(night: Night, items: Spoken, rows: Ints) -> tuple[Sequences, Ints]:
    """The histories `rows` as prompts tell of them, without the last item; and the last items."""
    histories = night.histories
    before, _ = histories.prefixes(rows, histories.lengths[rows] - 1)
    return items.histories(before), histories.items[histories.indptr[rows + 1] - 1]


def _fit(
    run: Run, night: Night, items: Spoken, pool: Ints, examples: Examples, expected: str, training: Training
) -> dict[str, Any]:
    """`expected`: the language model that the driver has found."""
    conf, seed = run.settings.allmrec.reader, run.settings.seed
    training.log(f"training a reader on {len(examples)} users, in the order of {night.order}, with {conf.model}")
    reader = language_model(conf).reader(None, training.device, expected)
    values = conf.model_dump()
    options = allmrec_reader_training.Options(**{name: values[name] for name in _OPTIONS}, seed=seed)
    found = allmrec_reader_training.train(
        reader,
        reader.catalogue(night.titles, items.joint, prompt_options(conf)),
        examples,
        pool,
        options,
        lambda line: training.log(f"reader: {line}"),
        checkpoints=training.checkpoints,
    )
    assert reader.projections is not None  # training made them
    allmrec_artifacts.write(training.artifact, allmrec_projections.dump(reader.projections))
    loss = found.pop("history")[-1]["loss"]
    return {"examples": len(examples), "order": night.order, "loss": loss, **found}
