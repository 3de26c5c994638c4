"""Encoding texts: TextEncoder against sentence_transformers.encode and a plain loop over transformers, same outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from jobs.benchmark.measure import device, interleaved
from jobs.benchmark.table import best_and_spread, table
from jobs.run import log
from udfs.encoder_recipe import Recipe
from udfs.model_files import find_model
from udfs.text_encoder import TextEncoder, pool

OURS, OURS_BF16, ST, PLAIN = "TextEncoder", "TextEncoder, bfloat16", "sentence-transformers", "plain transformers loop"
MAX_TOKENS, BATCH = 128, 32


def run(texts: int, seed: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Tokens/s of MiniLM on `texts` CiteULike titles and of SmolLM2 on an eighth of them.

    Returns:
        tables (one; without rows where the data is absent), cases: the figures behind it.
    """
    from jobs.benchmark.judgment import data_folder

    titles = pq.read_table(data_folder() / "items.parquet", columns=["title"])["title"].to_pylist()
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(titles))
    chosen = [titles[row] for row in order[:texts]]
    cases, rows = [], []
    for model, part in (("minilm", chosen), ("smollm2", chosen[: max(len(chosen) // 8, 8)])):
        case = _measure(model, part)
        cases.append(case)
        ours = min(case["seconds"][OURS])
        for name, seconds in case["seconds"].items():
            best = min(seconds)
            kind = "bfloat16" if name == OURS_BF16 else "float32"
            share = 2 * case["weights"] * case["tokens"] / best / ceilings[f"{kind} FLOP/s"]
            speed = [case["tokens"] / best, len(part) / best]
            rows.append([model, name, best_and_spread(seconds), best / ours, *speed, share, case["differ"][name]])
        log(f"encoding with {model}: {rows[-4:]}")
    columns = ["model", "method", "time", "times TextEncoder's", "tokens/s", "texts/s", "share of the matmul ceiling"]
    note = (
        f"{len(chosen)} titles of CiteULike (SmolLM2: an eighth of them), {torch.get_num_threads()} threads on {device()}, seed "
        f"{seed}; tokens without padding, from text to vector. sentence-transformers and the loop take batches of {BATCH}, the "
        "loop in the texts' order; float32 where nothing is said. The last column is the largest distance from TextEncoder's "
        "vectors, relative to their length. The share counts 2 FLOP a weight of the layers and token."
    )
    return {"tables": [table("Encoding", [*columns, "differs by"], rows, note)], "cases": cases}


def _measure(model: str, texts: list[str]) -> dict[str, Any]:
    directory = find_model(model).directory
    encoder = TextEncoder(directory, max_tokens=MAX_TOKENS, device=device())
    rough = TextEncoder(directory, max_tokens=MAX_TOKENS, device=device(), dtype="bfloat16")
    methods: dict[str, Callable[[], np.ndarray]] = {
        OURS: lambda: encoder.encode(texts),
        OURS_BF16: lambda: rough.encode(texts),
        ST: _sentence_transformers(directory, encoder.recipe, texts),
        PLAIN: _plain(directory, encoder.recipe, texts),
    }
    vectors = {name: method() for name, method in methods.items()}
    length = np.linalg.norm(vectors[OURS], axis=1)
    embedded = {id(parameter) for module in encoder.model.modules() if isinstance(module, torch.nn.Embedding)
                for parameter in module.parameters()}  # fmt: skip
    return {
        "model": model,
        "texts": len(texts),
        "tokens": sum(map(len, encoder.tokens(texts))),
        "weights": sum(p.numel() for p in encoder.model.parameters() if id(p) not in embedded),
        "differ": {n: float((np.linalg.norm(v - vectors[OURS], axis=1) / length).max()) for n, v in vectors.items()},
        "seconds": interleaved(methods, 4),
    }


def _sentence_transformers(directory: Path, recipe: Recipe, texts: list[str]) -> Callable[[], np.ndarray]:
    from sentence_transformers import SentenceTransformer, models

    # The text as it is: of a model with a chat template the default wraps each text in it.
    plain = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    body = models.Transformer(
        str(directory), max_seq_length=MAX_TOKENS, modality_config=plain, module_output_name="token_embeddings"
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
        AutoModel.from_pretrained(directory).eval().to(device()),
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encode() -> np.ndarray:
        vectors = []
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                texts[start : start + BATCH], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            ).to(device())
            with torch.no_grad():
                hidden = model(**batch).last_hidden_state
            pooled = pool(hidden, batch["attention_mask"], recipe.pooling)
            vectors.append(torch.nn.functional.normalize(pooled, dim=1) if recipe.normalize else pooled)
        return torch.cat(vectors).cpu().numpy()

    return encode
