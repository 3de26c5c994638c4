"""A trained module as two files, model.safetensors and config.json, and back: what fits neither is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import nn

from schemas.errors import ColdRefreshError

#: The names of both.
FILES = _WEIGHTS, _CONFIG = ("model.safetensors", "config.json")

Module = TypeVar("Module", bound=nn.Module)


def dump(module: nn.Module, config: dict[str, Any]) -> dict[str, bytes]:
    """The module's parameters and buffers, and `config` (JSON), from which it can be built."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    body = json.dumps(config, indent=1, sort_keys=True)
    return {_WEIGHTS: safetensors.torch.save(tensors), _CONFIG: body.encode()}


def load(
    files: dict[str, bytes], build: Callable[[dict[str, Any]], Module], name: str, error: type[ColdRefreshError]
) -> Module:
    """The module of `dump`'s files, in evaluation mode.

    Args:
        build: makes an untrained one from the config. name: what it is called in messages.

    Raises:
        error: a file is unreadable, a tensor is absent, unexpected, of another shape or type, or not finite.
    """
    try:
        module = build(json.loads(files[_CONFIG]))
        tensors = safetensors.torch.load(files[_WEIGHTS])
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as reason:
        raise error(f"a saved {name} cannot be read: {reason}; remove its folder and train again") from reason
    expected = module.state_dict()
    wrong = [
        f"{key}: {_facts(tensors.get(key))}, expected {_facts(expected.get(key))}"
        for key in sorted(expected.keys() | tensors.keys())
        if _facts(tensors.get(key)) != _facts(expected.get(key))
    ]
    wrong += [f"{key}: holds a value that is not finite" for key, t in tensors.items() if not torch.isfinite(t).all()]
    if wrong:
        raise error("; ".join([f"a saved {name} is not what its config.json says", *wrong, "train again"]))
    module.load_state_dict(tensors)
    return module.eval()


def _facts(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
