"""A-LLMRec's second stage: prompts, likelihoods against one title at a time, and training that finds the right answer."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tests import word_llm
from tests.killed import Killed, kill_at
from udfs import allmrec_projections as projections
from udfs import progress
from udfs.allmrec_examples import AllmrecError, Examples
from udfs.allmrec_prompt import DOMAINS, PromptOptions, Prompts
from udfs.allmrec_reader import Catalogue, Reader
from udfs.allmrec_reader_training import Options, train
from udfs.checkpoints import CheckpointError, Checkpoints
from udfs.model_files import ModelError, find_model
from udfs.sampled_ranking import ranks
from udfs.sequences import Sequences

pytestmark = pytest.mark.usefixtures("one_thread")

TITLES = [
    "green tea", "iron kettle", "wool yarn", "chess clock", "honey", "walnut board", "bicycle tube of iron", "oil paint",
]  # fmt: skip
N, D, JOINT = len(TITLES), 6, 8
JOINTS = np.random.default_rng(1).normal(size=(N, JOINT)).astype(np.float32)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return word_llm.build(tmp_path_factory.mktemp("small"), TITLES)


def people(n: int, seed: int) -> Examples:
    """Users whose x says, with some noise, which item comes next; their histories say nothing."""
    rng = np.random.default_rng(seed)
    vectors = np.random.default_rng(0).normal(size=(N, D))
    positives = rng.integers(0, N, n)
    users = (vectors[positives] + 0.1 * rng.normal(size=(n, D))).astype(np.float32)
    return Examples(users, Sequences(np.arange(n + 1), (positives + rng.integers(1, N, n)) % N), positives)


def untrained(directory: Path, users: int = D, joint: int = JOINT, **options) -> Reader:
    reader = Reader(directory, **options)
    rng = np.random.default_rng(0)
    reader.projections = projections.build(projections.Config(users, joint, reader.width), seed=1)
    reader.projections.fit(rng.normal(size=(9, users)), rng.normal(size=(9, joint)) + 1, reader.embeddings)
    return reader


def asked() -> tuple[np.ndarray, Sequences, np.ndarray]:
    rng = np.random.default_rng(5)
    histories = Sequences(np.array([0, 3, 3, 4, 16]), rng.integers(0, N, 16))
    return rng.normal(size=(4, D)).astype(np.float32), histories, np.stack([rng.permutation(N)[:5] for _ in range(4)])


def oracle(reader: Reader, catalogue: Catalogue, users, histories, candidates) -> list[list[np.ndarray]]:
    """log P of each token of each candidate's answer, one at a time, from transformers' own model, without padding."""
    model, found = reader.model, []
    with torch.no_grad():
        soft_users = reader.projections.users(torch.from_numpy(users))
        soft_items = reader.projections.items(catalogue.joint)
        for row, own in enumerate(candidates):
            begin, end = histories.indptr[row : row + 2]
            prompt = catalogue.prompts.prompt(histories.items[begin:end], own)
            found.append([])
            for item in own:
                answer = catalogue.prompts.answer(item)
                embedded = model.get_input_embeddings()(torch.tensor([prompt.tokens + answer])).clone()
                if prompt.user >= 0:
                    embedded[0, prompt.user] = soft_users[row]
                for place, number in zip(prompt.places, prompt.items, strict=True):
                    embedded[0, place] = soft_items[number]
                log_p = model(inputs_embeds=embedded).logits[0].double().log_softmax(1)
                at = len(prompt.tokens)
                found[-1].append(np.array([log_p[at + n - 1, token] for n, token in enumerate(answer)]))
    return found


def of_nobody(reader: Reader, catalogue: Catalogue, item: int) -> np.ndarray:
    """log P of each token of an item's answer after the opening of a list, from transformers' own model."""
    opening = f"{reader.tokenizer.bos_token or ''} This user has bought these items so far:\n"
    ids, answer = reader.tokenizer(opening, add_special_tokens=False)["input_ids"], catalogue.prompts.answer(item)
    with torch.no_grad():
        log_p = reader.model(torch.tensor([ids + answer])).logits[0].double().log_softmax(1)
    return np.array([log_p[len(ids) + n - 1, token] for n, token in enumerate(answer)])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_tokens", [1, 300, 8192])
def test_likelihoods_are_those_of_one_title_at_a_time(small: Path, side: str, batch_tokens: int):
    reader = untrained(small, padding_side=side, batch_tokens=batch_tokens)
    users, histories, candidates = asked()
    open_ended = PromptOptions(candidates=False)
    for options in (
        PromptOptions(),
        PromptOptions(user=False),
        PromptOptions(items=False, history=2, title_tokens=2),
        open_ended,
    ):
        catalogue = reader.catalogue(TITLES, JOINTS, options)
        expected = oracle(reader, catalogue, users, histories, candidates)
        for normalise, figure in ((True, np.mean), (False, np.sum)):
            exact = np.array([[figure(answer) for answer in row] for row in expected])
            if options == open_ended:
                exact -= [[figure(of_nobody(reader, catalogue, item)) for item in row] for row in candidates]
            assert exact.std() > 0.3
            for share in (True, False):
                arguments = (catalogue, users, histories, candidates)
                found = reader.score(*arguments, normalise=normalise, share_prefix=share)
                assert found.dtype == np.float32
                np.testing.assert_allclose(found, exact, atol=2e-4)
        loss = float(reader.loss(catalogue, users, histories, candidates).detach())
        assert loss == pytest.approx(-np.concatenate([row[0] for row in expected]).mean(), abs=1e-4)


def _other(folder: Path, base: Path, model: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.normal_(std=0.2, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("window", [16, 256])
@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_model_with_sliding_windows_reads_as_transformers_has_it(
    kind: str, window: int, small: Path, tmp_path: Path
) -> None:
    sizes = {
        "vocab_size": len(AutoTokenizer.from_pretrained(small)), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "sliding_window": window, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    of = {"mistral": lambda: MistralForCausalLM(MistralConfig(**sizes)),
          "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=16))}  # fmt: skip
    reader = untrained(_other(tmp_path, small, of[kind]()))
    users, histories, candidates = asked()
    catalogue = reader.catalogue(TITLES, JOINTS)
    exact = [[answer.mean() for answer in row] for row in oracle(reader, catalogue, users, histories, candidates)]
    assert np.std(exact) > 0.1
    np.testing.assert_allclose(reader.score(catalogue, users, histories, candidates), exact, atol=2e-4)


def test_a_model_that_takes_no_positions_is_refused(small: Path, tmp_path: Path) -> None:
    size = len(AutoTokenizer.from_pretrained(small))
    config = BloomConfig(vocab_size=size, hidden_size=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=None)
    with pytest.raises(ModelError, match=r"takes no positions \(bloom\)"):
        Reader(_other(tmp_path, small, BloomForCausalLM(config)))


def test_smollm2_reads_soft_tokens_as_transformers_has_it():
    directory = find_model("smollm2").directory
    reader = untrained(directory)
    users, histories, candidates = asked()
    users, histories, candidates = users[:1], histories.take(np.array([0])), candidates[:1, :3]
    catalogue = reader.catalogue(TITLES, JOINTS, PromptOptions(wording=DOMAINS["games"], history=2))
    found = reader.score(catalogue, users, histories, candidates)
    expected = oracle(reader, catalogue, users, histories, candidates)
    np.testing.assert_allclose(found, [[answer.mean() for answer in row] for row in expected], atol=1e-3)
    (written,) = reader.generate(catalogue, users, histories, candidates)
    assert isinstance(written, str)
    assert "\n" not in written


def test_other_users_and_the_order_of_candidates_do_not_matter(small: Path):
    reader = untrained(small)
    users, histories, candidates = asked()
    catalogue = reader.catalogue(TITLES, JOINTS)
    whole = reader.score(catalogue, users, histories, candidates)
    turned = reader.score(catalogue, users, histories, candidates[:, ::-1])[:, ::-1]
    np.testing.assert_allclose(turned, whole, atol=2e-4)
    one = np.array([2])
    alone = reader.score(catalogue, users[one], histories.take(one), candidates[one])
    np.testing.assert_allclose(alone, whole[one], atol=2e-4)
    assert reader.score(catalogue, users[:0], histories.take(one[:0]), candidates[:0]).shape == (0, 5)
    assert reader.generate(catalogue, users[:0], histories.take(one[:0]), candidates[:0]) == []
    written = reader.generate(catalogue, users, histories, candidates)
    assert reader.generate(catalogue, users[one], histories.take(one), candidates[one]) == [written[2]]
    half = untrained(small, dtype="bfloat16")
    rough = half.score(half.catalogue(TITLES, JOINTS), users, histories, candidates)
    assert np.corrcoef(rough.ravel(), whole.ravel())[0, 1] > 0.97


FAST = Options(epochs=18, patience=20, learning_rate=1e-2, batch_size=16, negatives=4)


def fitted(directory: Path, options: Options, prompts: PromptOptions, **more):
    reader = Reader(directory)
    catalogue = reader.catalogue(TITLES, JOINTS, prompts)
    log = more.pop("log", lambda line: None)
    facts = train(reader, catalogue, people(96, 1), np.arange(N), options, log, **more)
    return reader, catalogue, facts


@pytest.mark.parametrize(("user", "candidates"), [(True, True), (True, False), (False, True)])
def test_what_the_soft_tokens_say_is_learnt(small: Path, user: bool, candidates: bool):
    before = {n: p.clone() for n, p in Reader(small).model.named_parameters()}
    prompts = PromptOptions(user=user, candidates=candidates)
    reader, catalogue, facts = fitted(small, FAST if user else replace(FAST, epochs=6), prompts)
    for name, parameter in reader.model.named_parameters():
        assert torch.equal(parameter, before[name])  # the language model is frozen
    held_out = people(40, 2)
    arguments = (catalogue, held_out.users, held_out.histories, held_out.draw(np.arange(N), 4, 5))
    hits = float((ranks(reader.score(*arguments)) == 0).mean())
    written = reader.generate(*arguments)
    right = np.mean([text == TITLES[item] for text, item in zip(written, held_out.positives, strict=True)])
    if user:
        assert hits > 0.97
        assert right > 0.4
        assert facts["history"][-1]["loss"] < 0.1 * facts["history"][0]["loss"]
    else:  # nothing else says which it is
        assert hits < 0.5


def test_a_long_epoch_says_each_minute_how_far_it_is(small: Path, monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=itertools.count(0, 40).__next__))
    fitted(small, replace(FAST, epochs=1), PromptOptions(), log=lines.append)
    assert lines[0].startswith("of this epoch: ")
    assert " of 96 users" in lines[0]
    assert lines[-1].startswith("epoch 1/1: ")


def test_items_are_learnt_from_their_soft_tokens_alone(small: Path):
    """Without joint vectors in the prompt their projection gets no gradient, with them it does."""
    changed = {}
    for items in (True, False):
        start = projections.build(projections.Config(D, JOINT, 64), seed=FAST.seed)
        reader, _, _ = fitted(small, replace(FAST, epochs=1), PromptOptions(items=items))
        found = reader.projections.state_dict()
        changed[items] = {n.split(".")[0] for n, p in start.named_parameters() if not torch.equal(found[n], p)}
    assert changed == {True: {"user", "item"}, False: {"user"}}


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "weight_decay": 0.1}])
def test_a_killed_training_ends_as_an_undisturbed_one(small: Path, tmp_path: Path, changes: dict):
    options = replace(FAST, epochs=4, **changes)

    def run(checkpoints: Checkpoints | None, log, options: Options = options):
        reader, _, facts = fitted(small, options, PromptOptions(), checkpoints=checkpoints, log=log)
        return projections.dump(reader.projections), facts

    expected = run(None, lambda line: None)
    assert expected[1]["best_epoch"] == 4
    checkpoints, lines = Checkpoints(str(tmp_path)), []
    with pytest.raises(Killed):
        run(checkpoints, kill_at(3))
    assert run(checkpoints, lines.append) == expected
    assert lines[0] == "goes on behind epoch 2, which was saved"
    with pytest.raises(CheckpointError, match="another training"):
        run(checkpoints, lines.append, replace(options, negatives=3))
    again = projections.load(expected[0])
    assert projections.dump(again) == expected[0]


def decoded(tokenizer, prompt) -> str:
    marks = {prompt.user: "<U>"} | {p: f"<{n}>" for p, n in zip(prompt.places, prompt.items, strict=True)}
    return "".join(marks.get(n, None) or tokenizer.decode([token]) for n, token in enumerate(prompt.tokens))


def test_the_prompt_names_user_history_and_candidates():
    tokenizer = AutoTokenizer.from_pretrained(find_model("smollm2").directory)
    titles = [f"number {n}" for n in range(40)]
    titles[3] = "a one<|im_end|>\nof " + "many " * 500
    titles[4] = ""
    prompts = Prompts(tokenizer, titles, PromptOptions(wording=DOMAINS["games"], title_tokens=12))
    history, candidates = np.arange(15), np.array([20, 35, 3, 30])
    text = decoded(tokenizer, prompts.prompt(history, candidates))
    past = "".join(f"number {n}<{n}>\n" for n in range(5, 15))
    begin = f"{tokenizer.bos_token}<U> is a user representation. This user has played these games so far:\n{past}"
    middle = "Recommend one game for this user to play next from these games:\n"
    assert text.startswith(begin + middle)
    assert text.endswith(">\nThe recommendation is:\n")
    assert text.count(tokenizer.eos_token) == 0
    listed = [int(n) for n in re.findall(r"<(\d+)>", text[len(begin) :])]
    assert sorted(listed) == [3, 20, 30, 35]
    assert "\na one of many many" in text
    assert len(prompts.answer(3)) == 13
    assert tokenizer.decode(prompts.answer(20)) == "number 20\n"
    assert tokenizer.decode(prompts.answer(4)) == "untitled\n"
    # Where the true one stands says nothing, and no place is special.
    assert decoded(tokenizer, prompts.prompt(history, candidates[::-1])) == text
    first = [prompts.prompt(np.array([n]), np.array([20, 21, 22])).items[1] for n in range(40)]
    assert min(first.count(n) for n in (20, 21, 22)) > 5
    bare = Prompts(tokenizer, titles, PromptOptions(user=False, items=False))
    nothing = bare.prompt(history[:0], candidates)
    assert (nothing.user, nothing.places, nothing.items) == (-1, [], [])
    assert tokenizer.decode(nothing.tokens).startswith(
        f"{tokenizer.bos_token} This user has bought nothing so far.\nRecom"
    )
    open_ended = Prompts(tokenizer, titles, PromptOptions(candidates=False))
    text = decoded(tokenizer, open_ended.prompt(history[:2], candidates))
    list_of = " This user has bought these items so far:\n"
    assert text == f"{tokenizer.bos_token}<U> is a user representation.{list_of}number 0<0>\nnumber 1<1>\n"
    assert tokenizer.decode(open_ended.nobody().tokens) == f"{tokenizer.bos_token}{list_of}"


def test_what_does_not_fit_is_an_error(small: Path):
    users, histories, candidates = asked()
    reader = Reader(small)
    with pytest.raises(AllmrecError, match="no projections yet"):
        reader.score(reader.catalogue(TITLES, JOINTS), users, histories, candidates)
    with pytest.raises(AllmrecError, match=r"width 32, the model in .* reads 64"):
        Reader(small, projections.build(projections.Config(D, JOINT, 32), seed=1))
    reader = untrained(small)
    with pytest.raises(AllmrecError, match="7 titles for 8 items"):
        reader.catalogue(TITLES[:7], JOINTS)
    long = reader.catalogue(["tea " * 40] * N, JOINTS, PromptOptions(title_tokens=40))
    for method in (reader.score, reader.generate):
        with pytest.raises(AllmrecError, match="the model reads 256"):
            method(long, users, histories, candidates)
    with pytest.raises(AllmrecError, match="one token"):
        reader.catalogue(TITLES, JOINTS, PromptOptions(title_tokens=0))
    with pytest.raises(ModelError, match=r"cannot be loaded as a causal language model|lacks"):
        Reader(find_model("minilm").directory)
    empty = Examples(users[:0], histories.take(np.zeros(0, int)), candidates[:0, 0])
    with pytest.raises(AllmrecError, match="no examples"):
        train(reader, long, empty, np.arange(N), FAST, lambda line: None)
