"""A FilterLLM training that is killed and started again gives, bit for bit, the model of one that nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.killed import Killed, kill_at
from tests.test_filterllm import DIMENSION, TEXTS, USERS, WIDTH, _options, _shop
from udfs import filterllm, lora
from udfs.checkpoints import CheckpointError, Checkpoints
from udfs.filterllm import Config, FilterLLM, FilterLLMError
from udfs.filterllm_items import FrozenTexts, Items
from udfs.filterllm_training import initialise, train
from udfs.model_files import find_model
from udfs.text_encoder import TextEncoder

pytestmark = pytest.mark.usefixtures("one_thread")


def _frozen(options, checkpoints=None, log=lambda line: None, start=1.0):
    shop, hidden, vocabulary, _ = _shop()
    vocabulary = start * vocabulary
    model = FilterLLM(Config(WIDTH, DIMENSION, USERS, hidden=32, dropout=0.2, noise=0.1))
    initialise(model, vocabulary, np.bincount(shop.users, minlength=USERS), hidden, seed=3)
    facts = train(model, FrozenTexts(hidden), shop, options, log, checkpoints=checkpoints)
    return filterllm.dump(model), facts


def _lora(options, checkpoints=None, log=lambda line: None):
    encoder = TextEncoder(find_model("minilm").directory, max_tokens=8)
    hidden = encoder.encode(TEXTS)
    lora.attach(encoder, rank=4, alpha=8, dropout=0.3, seed=1)
    model = FilterLLM(Config(encoder.width, DIMENSION, 12, hidden=16))
    initialise(model, None, np.zeros(12), hidden, seed=1)
    rng = np.random.default_rng(0)
    items = Items(TEXTS, rng.normal(size=(4, DIMENSION)).astype(np.float32), np.arange(5) * 2, rng.permutation(12)[:8])
    facts = train(model, lora.LoraTexts(encoder, TEXTS), items, options, log, checkpoints=checkpoints)
    return {**filterllm.dump(model), **lora.dump(encoder)}, facts


@pytest.mark.parametrize(
    ("fit", "changes"),
    [
        (_frozen, {"epochs": 12, "patience": 2, "learning_rate": 5e-2}),  # stops early, the best epoch is not the last
        (_frozen, {"epochs": 4, "softmax": "sampled", "samples": 40, "proposal": "popularity", "stop_by": "ndcg"}),
        (_lora, {"epochs": 3, "batch_size": 2, "lora_learning_rate": 1e-2}),
    ],
)
def test_a_killed_training_ends_as_an_undisturbed_one(fit, changes, tmp_path: Path):
    options = _options(**changes)
    expected, facts = fit(options)
    if "patience" in changes:
        assert facts["best_epoch"] < facts["epochs"] < options.epochs
    checkpoints = Checkpoints(str(tmp_path / "state"))
    lines: list[str] = []
    with pytest.raises(Killed):  # in the first epoch, before anything is saved
        fit(options, checkpoints, kill_at(1))
    assert checkpoints.load("") is None
    for epoch in (2, 3):  # epoch 2 is lost and done again, then epoch 3
        with pytest.raises(Killed):
            fit(options, checkpoints, kill_at(epoch))
    files, found = fit(options, checkpoints, lines.append)
    assert lines[0] == "goes on behind epoch 2, which was saved"
    assert lines[1].startswith("epoch 3/")
    assert files == expected
    assert found == facts
    # Killed after the last epoch: nothing is trained again.
    lines.clear()
    assert fit(options, checkpoints, lines.append) == (expected, facts)
    assert not [line for line in lines if line.startswith("epoch ")]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["state.safetensors"]


def test_a_kill_while_the_state_is_written_leaves_the_one_before(tmp_path: Path):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save({"a": torch.ones(3)}, {"training": "x"})
    before = (tmp_path / "state.safetensors").read_bytes()
    (tmp_path / "0123.part").write_bytes(before[:20])  # what a killed process leaves
    tensors, facts = checkpoints.load("x") or ({}, {})
    assert torch.equal(tensors["a"], torch.ones(3))
    assert facts["training"] == "x"


def test_checkpoints_of_other_trainings_and_broken_ones_are_refused(tmp_path: Path):
    checkpoints = Checkpoints(str(tmp_path))
    with pytest.raises(Killed):
        _frozen(_options(epochs=3), checkpoints, kill_at(2))
    with pytest.raises(Killed):  # behind epoch 1 with less memory
        _frozen(_options(epochs=3, vocabulary_chunk=5), checkpoints, kill_at(2))
    with pytest.raises(CheckpointError, match="another training"):
        _frozen(_options(epochs=3, guiding=2.0), checkpoints)
    with pytest.raises(CheckpointError, match="another training"):
        _frozen(_options(epochs=3), checkpoints, start=2.0)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{state} cannot be read.*remove the folder"):
        _frozen(_options(epochs=3), checkpoints)


@pytest.mark.parametrize("batch_size", [32, 1000])  # 1000: the only step of the epoch breaks the model behind its loss
def test_a_training_that_diverges_says_so(batch_size):
    with pytest.raises(FilterLLMError, match=r"diverged in epoch 1: .*lower filterllm.learning_rate \(1e\+30\)"):
        _frozen(_options(epochs=3, learning_rate=1e30, batch_size=batch_size))
