"""Both stages of A-LLMRec, trained one on the other, where the right answer is known: the likelihood alone finds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import word_llm
from tests.test_allmrec_alignment import CLUSTERS, COLD, ITEMS, TEXT, USERS, D, world
from udfs import allmrec_alignment as alignment
from udfs import allmrec_alignment_training as first_stage
from udfs import allmrec_reader_training as second_stage
from udfs.allmrec_alignment import random_joint
from udfs.allmrec_examples import Examples
from udfs.allmrec_prompt import PromptOptions
from udfs.allmrec_reader import Catalogue, Reader
from udfs.filterllm_items import FrozenTexts
from udfs.sampled_ranking import ranks
from udfs.sequences import Sequences

pytestmark = pytest.mark.usefixtures("one_thread")

# Of each cluster every other item is called what its cluster is, the others say nothing: that these are of one cluster, too, is in
# their CF vectors, and of a cold one in its text alone.
NAMES = ("green tea", "wool yarn", "chess clock", "oil paint", "walnut board")
NOTHING = ("thing", "gift", "box", "set", "surprise", "bundle", "parcel", "mix", "sample", "lot")
CLUSTER = np.arange(ITEMS) % CLUSTERS
NAMED = np.arange(ITEMS) // CLUSTERS % 2 == 0
NEW = np.arange(ITEMS) < COLD
TITLES = [NAMES[c] if named else NOTHING[n // 10] for n, (c, named) in enumerate(zip(CLUSTER, NAMED, strict=True))]
HELD_OUT = np.arange(USERS) >= 150


def people(users: np.ndarray, x: np.ndarray, cold: bool, seed: int) -> Examples:
    """Each user had two items whose titles say nothing, then one that is called what they all are; all of them warm, or cold."""
    rng, histories, positives = np.random.default_rng(seed), [], []
    for cluster in users % CLUSTERS:
        own = (cluster == CLUSTER) & (cold == NEW)
        histories.append(rng.permutation(np.flatnonzero(own & ~NAMED))[:2])
        positives.append(rng.choice(np.flatnonzero(own & NAMED)))
    return Examples(x[users], Sequences(np.arange(len(users) + 1) * 2, np.concatenate(histories)), np.array(positives))


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Examples, np.ndarray, np.ndarray]:
    """The language model; whom both stages learn from; all users' x; the items' joint vectors, cold ones from their texts."""
    e, q, _, _, given = world()
    e[NEW] = np.nan  # a cold item has none
    learnt = people(np.repeat(np.flatnonzero(~HELD_OUT), 3), given.users, False, 1)
    model, warm = alignment.build(alignment.Config(D, TEXT, joint=16), seed=1), np.flatnonzero(~NEW)
    model.standardise(e[warm], q[warm])
    options = first_stage.Options(epochs=25, patience=25, learning_rate=5e-3)
    first_stage.train(model, FrozenTexts(q), e, learnt, warm, options, lambda line: None)
    return (
        word_llm.build(tmp_path_factory.mktemp("model"), TITLES),
        learnt,
        given.users,
        model.joint(e, q, NEW),
    )


def hits(reader: Reader, catalogue: Catalogue, x: np.ndarray, cold: bool) -> float:
    """Of held-out users, the share whose next item is likelier than one of each other cluster; all of them warm, or all cold."""
    asked, rng = people(np.flatnonzero(HELD_OUT), x, cold, 2), np.random.default_rng(3)
    named = np.flatnonzero(NAMED & (cold == NEW))
    of = [named[CLUSTER[named] == cluster] for cluster in range(CLUSTERS)]
    others = [[rng.choice(of[c]) for c in range(CLUSTERS) if c != own] for own in CLUSTER[asked.positives]]
    candidates = np.column_stack([asked.positives, others])
    return float((ranks(reader.score(catalogue, asked.users, asked.histories, candidates)) == 0).mean())


@pytest.mark.parametrize(
    ("prompts", "aligned"),
    [
        (PromptOptions(), True),
        (PromptOptions(user=False, candidates=False), True),
        (PromptOptions(user=False, candidates=False), False),
    ],
)
def test_the_likelihood_finds_warm_and_cold_items_of_users_that_nothing_learnt_from(
    stages: tuple[Path, Examples, np.ndarray, np.ndarray], prompts: PromptOptions, aligned: bool
) -> None:
    """With the user in the prompt, and by the joint vectors of the history alone; with random ones, cold items say nothing."""
    language_model, learnt, x, joint = stages
    reader = Reader(language_model)
    vectors = joint if aligned else random_joint(ITEMS, 16, seed=4)
    catalogue = reader.catalogue(TITLES, vectors, prompts)
    options = second_stage.Options(epochs=10, patience=10, learning_rate=1e-2, batch_size=16, negatives=3)
    pool = np.flatnonzero(NAMED & ~NEW)
    second_stage.train(reader, catalogue, learnt, pool, options, lambda line: None)
    warm, cold = (hits(reader, catalogue, x, of_cold) for of_cold in (False, True))
    if aligned:
        assert min(warm, cold) > 0.95
    else:
        assert cold < 0.5  # chance: 0.2
