"""The encoder against sentence-transformers, against unbatched transformers, and on texts that break things."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from udfs.encoder_recipe import is_causal, read_recipe
from udfs.hashed_words import HashedWords, version, width_of
from udfs.model_files import find_model
from udfs.text_encoder import CHARACTERS_A_TOKEN, TextEncoder, batches, pool, readable

TEXTS = [
    "green tea leaves, loose, organic",
    "a",
    "Chess board with wooden pieces and a clock; the box is made of walnut, the clock of brass. " * 3,
    "merino wool yarn for knitting warm socks",
    "Fahrradschlauch für die Straße",
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    return find_model("minilm").directory


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return find_model("smollm2").directory


@pytest.fixture(scope="module")
def smollm2_right(smollm2: Path) -> TextEncoder:
    return TextEncoder(smollm2, max_tokens=48)


def test_minilm_is_what_sentence_transformers_makes_of_it(minilm: Path) -> None:
    from sentence_transformers import SentenceTransformer

    oracle = SentenceTransformer(str(minilm), device="cpu")
    expected = oracle.encode(TEXTS, convert_to_numpy=True)
    found = TextEncoder(minilm, max_tokens=256, batch_tokens=128).encode(TEXTS)
    assert found.shape == (5, 384)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_smollm2_is_a_causal_lm_read_at_its_last_token(smollm2: Path, smollm2_right: TextEncoder) -> None:
    recipe = read_recipe(smollm2)
    assert (recipe.pooling, recipe.width, recipe.normalize) == ("last_token", 576, False)
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModel.from_pretrained(smollm2).eval()
    with torch.inference_mode():  # one text at a time: no padding at all
        expected = [
            model(**tokenizer(t, return_tensors="pt", truncation=True, max_length=48)).last_hidden_state[0, -1]
            for t in TEXTS
        ]
    _close(smollm2_right.encode(TEXTS), torch.stack(expected).numpy())


def test_left_and_right_padding_agree(smollm2: Path, minilm: Path, smollm2_right: TextEncoder) -> None:
    left = TextEncoder(smollm2, max_tokens=48, padding_side="left")
    _close(left.encode(TEXTS), smollm2_right.encode(TEXTS))
    for pooling in ("mean", "cls", "last_token"):
        sides = [TextEncoder(minilm, pooling=pooling, padding_side=side).encode(TEXTS) for side in ("left", "right")]  # type: ignore[arg-type]
        _close(*sides)


def test_a_vector_depends_on_its_text_alone(smollm2: Path, smollm2_right: TextEncoder) -> None:
    whole = smollm2_right.encode(TEXTS)
    _close(smollm2_right.encode(TEXTS[::-1])[::-1], whole)
    single = np.concatenate([smollm2_right.encode([text]) for text in TEXTS])
    _close(single, whole)
    np.testing.assert_array_equal(smollm2_right.encode(TEXTS), whole)  # the same call: the same bits


def test_pathological_texts(minilm: Path, smollm2_right: TextEncoder) -> None:
    texts = ["", " ", "\x00", "🦖🍵" * 50, "broken \ud83d surrogate", "a" * 10_000_000, "tea " * 2_500_000]
    assert max(len(readable(text, 48)) for text in texts) == 48 * CHARACTERS_A_TOKEN
    for encoder in (TextEncoder(minilm, max_tokens=48), smollm2_right):
        vectors = encoder.encode(texts)
        assert np.isfinite(vectors).all()
        assert (np.linalg.norm(vectors, axis=1) > 0).all()
        # What is cut away before the tokens are made would have been cut as tokens.
        _close(vectors[-1:], encoder.encode(["tea " * 60]))
        assert encoder.encode([]).shape == (0, encoder.width)


def test_bfloat16_is_near_float32(minilm: Path) -> None:
    exact, rough = (TextEncoder(minilm, dtype=dtype).encode(TEXTS) for dtype in ("float32", "bfloat16"))  # type: ignore[arg-type]
    assert rough.dtype == np.float32
    assert np.linalg.norm(exact - rough, axis=1).max() < 0.05
    assert not np.array_equal(exact, rough)


def test_pool_never_reads_padding() -> None:
    hidden = torch.arange(12, dtype=torch.float32).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    hidden[0, 2], hidden[1, 0] = float("nan"), float("nan")
    assert pool(hidden, mask, "mean").tolist() == [[1, 2], [9, 10]]
    assert pool(hidden, mask, "last_token").tolist() == [[2, 3], [10, 11]]
    assert pool(hidden, mask, "cls").tolist() == [[0, 1], [8, 9]]


def test_batches_hold_each_row_once_within_the_budget() -> None:
    lengths = [5, 30, 7, 7, 100, 1, 12]
    made = list(batches(lengths, 32))
    assert sorted(row for batch in made for row in batch) == list(range(7))
    assert made[0] == [4]  # longer than the budget: alone
    assert all(len(batch) * max(lengths[row] for row in batch) <= 32 for batch in made[1:])
    assert list(batches([], 32)) == []


def test_causal_models_are_told_from_encoders() -> None:
    assert is_causal({"model_type": "llama", "architectures": ["LlamaModel"]})
    assert is_causal({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    assert not is_causal({"model_type": "bert", "architectures": ["BertModel"]})
    assert not is_causal({"model_type": "roberta"})


def _close(found: np.ndarray, expected: np.ndarray) -> None:
    """Within the tolerance that the encoder states, relative to each vector's length."""
    distance = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert distance.max() < 1e-5, distance


def test_hashed_words_tell_words_apart_and_nothing_else() -> None:
    words = HashedWords(1024, max_tokens=16)
    found = words.encode(
        ["Revlon lip butter", "butter, LIP: revlon!", "revlon", "revlon revlon", "", "the of", "\ud800 revlon"]
    )
    assert (found.shape, found.dtype) == ((7, 1024), np.float32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 1, 0, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(found[0], found[1])  # neither order nor case
    np.testing.assert_allclose(np.abs(found[0][found[0] != 0]), 3**-0.5, rtol=1e-6)  # three words, three places
    np.testing.assert_allclose(found[2], found[3])
    np.testing.assert_array_equal(found[2], found[6])  # a lone surrogate is no word
    assert found[0] @ found[2] == pytest.approx(3**-0.5)
    twice = words.encode(["lip revlon revlon"])[0]  # log(1 + c): one word once, one twice
    assert sorted(np.abs(twice[twice != 0]) / np.abs(twice).max()) == pytest.approx(
        [np.log(2) / np.log(3), 1], rel=1e-6
    )
    cut = words.encode(["a" * CHARACTERS_A_TOKEN * 16 + " revlon"])[0]
    assert cut @ found[2] == 0.0


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("words", 1024),
        ("words-256", 256),
        ("words-12", None),
        ("words-0256", None),
        ("minilm", None),
        ("./words", None),
    ],
)
def test_the_names_of_hashed_words(name: str, width: int | None) -> None:
    assert width_of(name) == width
    if width:
        assert version(width, 16) != version(width, 32)  # of a long text another part is read
