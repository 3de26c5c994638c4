"""Encoding texts: TextEncoder against sentence_transformers.encode and a plain loop over transformers, same outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from jobs.benchmark.datasets import data_folder
from jobs.benchmark.measure import SHARES, device, interleaved, layer_weights, shares
from jobs.benchmark.table import best_and_spread, table
from jobs.run import log
from udfs.encoder_recipe import Recipe
from udfs.model_files import find_model
from udfs.text_encoder import TextEncoder, batches, pool

OURS, ST, PLAIN = "TextEncoder", "sentence-transformers", "plain transformers loop"
DTYPES = {"float32": 4, "bfloat16": 2}  # bytes of a number
MAX_TOKENS, BATCH = 128, 32


def run(texts: int, seed: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Tokens/s of MiniLM on `texts` CiteULike titles and of SmolLM2 on an eighth of them.

    Returns:
        tables (one; without rows where the data is absent), cases: the figures behind it.
    """
    titles = pq.read_table(data_folder("citeulike-a") / "items.parquet", columns=["title"])["title"].to_pylist()
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(titles))
    chosen = [titles[row] for row in order[:texts]]
    cases, rows = [], []
    for model, part in (("minilm", chosen), ("smollm2", chosen[: max(len(chosen) // 8, 8)])):
        case = _measure(model, part)
        cases.append(case)
        weights, tokens = case["weights"], case["tokens"]
        for dtype, size in DTYPES.items():
            ours = min(case["seconds"][_key(OURS, dtype)])
            for name in (OURS, ST, PLAIN):
                key = _key(name, dtype)
                best = min(case["seconds"][key])
                # Every batch reads all weights; a token reads its embedding, a text's vector is written.
                moved = size * (weights * case["batches"][name] + case["width"] * (tokens + len(part)))
                reached = shares(ceilings, best, 2 * weights * tokens, moved, dtype)
                speed = [best_and_spread(case["seconds"][key]), best / ours, tokens / best, len(part) / best]
                rows.append([model, name, dtype, *speed, *reached, case["differ"][key]])
        log(f"encoding with {model}: {rows[-6:]}")
    columns = ["model", "method", "dtype", "time", "times TextEncoder's", "tokens/s", "texts/s", *SHARES, "differs by"]
    note = (
        f"{len(chosen)} titles of CiteULike (SmolLM2: an eighth of them), {torch.get_num_threads()} threads on {device()}, seed "
        f"{seed}; tokens without padding, from text to vector. sentence-transformers and the loop take batches of {BATCH}, the "
        "loop in the texts' order; times TextEncoder's of the same dtype. The last column is the largest distance from its "
        "float32 vectors, relative to their length. The matmul share counts 2 FLOP a weight of the layers and token, the "
        "memory's these weights once a batch, and what a token reads and a text leaves."
    )
    return {"tables": [table("Encoding", columns, rows, note)], "cases": cases}


def _measure(model: str, texts: list[str]) -> dict[str, Any]:
    directory = find_model(model).directory
    methods: dict[str, Callable[[], np.ndarray]] = {}
    for dtype in DTYPES:
        encoder = TextEncoder(directory, max_tokens=MAX_TOKENS, device=device(), dtype=dtype)  # type: ignore[arg-type]
        methods[_key(OURS, dtype)] = partial(encoder.encode, texts)
        methods[_key(ST, dtype)] = _sentence_transformers(directory, encoder.recipe, texts)
        methods[_key(PLAIN, dtype)] = _plain(directory, encoder.recipe, texts)
    lengths = [len(ids) for ids in encoder.tokens(texts)]
    vectors = {name: method() for name, method in methods.items()}
    exact = vectors[_key(OURS, "float32")]
    length = np.linalg.norm(exact, axis=1)
    return {
        "model": model,
        "texts": len(texts),
        "tokens": sum(lengths),
        "width": encoder.width,
        "weights": layer_weights(encoder.model),
        "batches": {
            OURS: len(list(batches(lengths, encoder.batch_tokens, encoder.device))),
            **dict.fromkeys((ST, PLAIN), -(-len(texts) // BATCH)),
        },
        "differ": {n: float((np.linalg.norm(v - exact, axis=1) / length).max()) for n, v in vectors.items()},
        "seconds": interleaved(methods, 4),
    }


def _key(name: str, dtype: str) -> str:
    return f"{name}, {dtype}"


def _sentence_transformers(directory: Path, recipe: Recipe, texts: list[str]) -> Callable[[], np.ndarray]:
    from sentence_transformers import SentenceTransformer, models

    # The text as it is: of a model with a chat template the default wraps each text in it.
    plain = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    body = models.Transformer(
        str(directory),
        max_seq_length=MAX_TOKENS,
        modality_config=plain,
        module_output_name="token_embeddings",
        model_kwargs={"dtype": getattr(torch, recipe.dtype)},
    )
    if body.tokenizer.pad_token is None:
        body.tokenizer.pad_token = body.tokenizer.eos_token
    pooling = models.Pooling(recipe.width, pooling_mode={"last_token": "lasttoken"}.get(recipe.pooling, recipe.pooling))
    model = SentenceTransformer(modules=[body, pooling], device=device())
    return lambda: model.encode(texts, batch_size=BATCH, normalize_embeddings=recipe.normalize, show_progress_bar=False)


def _plain(directory: Path, recipe: Recipe, texts: list[str]) -> Callable[[], np.ndarray]:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(directory),
        AutoModel.from_pretrained(directory, dtype=getattr(torch, recipe.dtype)).eval().to(device()),
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encode() -> np.ndarray:
        vectors = []
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                texts[start : start + BATCH], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            ).to(device())
            with torch.no_grad():
                hidden = model(**batch).last_hidden_state.float()
            pooled = pool(hidden, batch["attention_mask"], recipe.pooling)
            vectors.append(torch.nn.functional.normalize(pooled, dim=1) if recipe.normalize else pooled)
        return torch.cat(vectors).cpu().numpy()

    return encode
