"""How a model turns a text into one vector, read from the model's own configuration without loading its weights."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from udfs.model_files import ModelError, ModelFiles

Pooling = Literal["mean", "last_token", "cls"]
_POOLINGS: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last_token"}
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")
_LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


@dataclass(frozen=True)
class Recipe:
    """What is done with a text. `max_tokens` is never more than the model was made for; `normalize`: to length 1."""

    pooling: Pooling
    normalize: bool
    lowercase: bool
    max_tokens: int
    dtype: Literal["float32", "bfloat16"]
    model_type: str
    width: int


def read_recipe(
    directory: Path,
    *,
    pooling: Literal["auto", "mean", "last_token", "cls"] = "auto",
    max_tokens: int = 128,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Recipe:
    """The recipe of the model in `directory`.

    `auto` is what the model's own pooling configuration says (sentence-transformers' `modules.json`); without one, the
    last token for a causal LM, whose last position alone has read the whole text, and the mean for an encoder. A
    `Normalize` module of the model is applied whichever pooling is chosen.

    Raises:
        ModelError: an encoder-decoder, or a module or pooling that is not known here.
    """
    config = _json(directory / "config.json")
    text_config = {**config, **config.get("text_config", {})}
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{directory} is an encoder-decoder model; name an encoder or a causal LM")
    if "hidden_size" not in text_config and "n_embd" not in text_config and "dim" not in text_config:
        raise ModelError(f"{directory}/config.json does not say how wide the hidden states are (hidden_size)")
    modules = _modules(directory)
    sentence = directory / "sentence_bert_config.json"
    sentence_facts = _json(sentence) if sentence.is_file() else {}
    limits = [max_tokens, sentence_facts.get("max_seq_length"), _positions(text_config)]
    if pooling == "auto":
        own = modules.get("Pooling")
        chosen = _own_pooling(directory / own) if own else ("last_token" if is_causal(config) else "mean")
    else:
        chosen = pooling
    return Recipe(
        pooling=chosen,
        normalize="Normalize" in modules,
        lowercase=bool(sentence_facts.get("do_lower_case")),
        max_tokens=min(limit for limit in limits if limit),
        dtype=dtype,
        model_type=str(config.get("model_type", "model")),
        width=int(next(text_config[key] for key in ("hidden_size", "n_embd", "dim") if key in text_config)),
    )


def version(files: ModelFiles, recipe: Recipe) -> str:
    """The name of a model's embeddings: of the content of its files and of the recipe, the same on every machine."""
    facts = json.dumps({"files": files.identity, **asdict(recipe)}, sort_keys=True)
    kind = re.sub(r"[^a-z0-9]+", "_", recipe.model_type.lower())
    return f"{kind}-{recipe.width}-{recipe.pooling}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


def is_causal(config: dict[str, Any]) -> bool:
    """Whether a model of this configuration reads from left to right only."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.get("model_type")
    names = " ".join(config.get("architectures") or ())
    if "ForCausalLM" in names or "LMHeadModel" in names:
        return True
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error


def _modules(directory: Path) -> dict[str, str]:
    """Class of each module of `modules.json` -> its folder; empty for a model that has none."""
    file = directory / "modules.json"
    listed = _json(file) if file.is_file() else []
    modules = {str(module["type"]).rsplit(".", 1)[-1]: str(module["path"]) for module in listed}
    unknown = sorted(set(modules) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ModelError(f"{file} names modules that are not supported: {unknown}")
    return modules


def _own_pooling(folder: Path) -> Pooling:
    config = _json(folder / "config.json")
    modes = config.get("pooling_mode", [mode for key, mode in _LEGACY.items() if config.get(key)])
    modes = [modes] if isinstance(modes, str) else list(modes) or ["mean"]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ModelError(f"{folder}/config.json asks for the pooling {modes}; known here are {sorted(_POOLINGS)}")
    return _POOLINGS[modes[0]]


def _positions(config: dict[str, Any]) -> int | None:
    """How many tokens a model has positions for, if it has a limit."""
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    # These number their positions from pad_token_id + 1 on.
    offset = int(config.get("pad_token_id") or 0) + 1 if config.get("model_type") in _OFFSET_POSITIONS else 0
    return int(limit) - offset if limit else None
