"""The state of a training, saved every epoch: a training that was killed goes on as if it had not been.

One file (safetensors; the facts are JSON in its header) that is replaced whole, so that a kill at any moment leaves the
state of one epoch. What is drawn at random in an epoch comes from (seed, epoch, process), so no generator's state is needed.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from typing import Any

import safetensors
import safetensors.torch
import torch
from pyarrow import fs

from schemas.errors import ColdRefreshError
from udfs.filesystems import located

_FILE = "state.safetensors"
_FORMAT = 1


class CheckpointError(ColdRefreshError):
    """A checkpoint cannot be used: the message names the file and the remedy."""


class Checkpoints:
    """Where a training keeps its state: the folder `uri` (a path, or s3://, gs://, ...), which all its processes see."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def save(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Replace the saved state by this one, all or nothing. `facts`: JSON."""
        body = safetensors.torch.save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            metadata={"facts": json.dumps({"format": _FORMAT, **facts})},
        )
        filesystem, root = located(self.uri)
        filesystem.create_dir(root, recursive=True)
        # These show a file when it is whole, and to move it would be a copy (of 5 GB at most).
        at_once = filesystem.type_name in ("s3", "gcs")
        # Elsewhere a name of its own: two trainings of the same model at once must not write into one file.
        part = f"{root}/{_FILE if at_once else uuid.uuid4().hex + '.part'}"
        with filesystem.open_output_stream(part) as stream:
            stream.write(body)
        if not at_once:
            filesystem.move(part, f"{root}/{_FILE}")

    def load(self, expected: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The saved tensors and facts, or None if there are none.

        Raises:
            CheckpointError: the file is unreadable, of another version of this code, or of another training than that
                whose `facts["training"]` is `expected`.
        """
        filesystem, root = located(self.uri)
        path = f"{root}/{_FILE}"
        if filesystem.get_file_info(path).type != fs.FileType.File:
            return None
        with filesystem.open_input_stream(path) as stream:
            body = stream.read()
        try:
            # safetensors gives the header of files only, not of bytes: its length in 8 bytes, then JSON.
            header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
            facts = json.loads(header["__metadata__"]["facts"])
            tensors = safetensors.torch.load(body)
        except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint {path} cannot be read: {error}; remove the folder {self.uri} and train again"
            ) from error
        if facts["format"] != _FORMAT or facts["training"] != expected:
            raise CheckpointError(
                f"the checkpoint {path} is of another training (other settings, items or code); remove the folder "
                f"{self.uri}, or keep this training's checkpoints in another one"
            )
        return tensors, facts


Named = dict[str, torch.nn.Parameter]


def state(
    named: Named, optimizers: Iterable[torch.optim.Optimizer], best: list[torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Everything that training changes, as tensors: parameters, their optimizer's state, and the best epoch's parameters,
    if those are others.
    """
    slots = {parameter: found for optimizer in optimizers for parameter, found in optimizer.state.items()}
    tensors: dict[str, torch.Tensor] = {f"parameter/{name}": parameter for name, parameter in named.items()}
    for name, parameter in named.items():
        tensors.update({f"optimizer/{slot}/{name}": value for slot, value in slots.get(parameter, {}).items()})
    if best is not None:
        tensors.update({f"best/{name}": value for name, value in zip(named, best, strict=True)})
    return tensors


@torch.no_grad()
def restore(
    tensors: dict[str, torch.Tensor], named: Named, optimizers: Iterable[torch.optim.Optimizer]
) -> list[torch.Tensor]:
    """Put what `state` gave back into parameters and optimizers; returns the best epoch's parameters.

    Raises:
        CheckpointError: a parameter is absent or of another shape.
    """
    for name, parameter in named.items():
        saved = tensors.get(f"parameter/{name}")
        if saved is None or saved.shape != parameter.shape:
            shape = "absent" if saved is None else tuple(saved.shape)
            raise CheckpointError(
                f"the checkpoint does not fit the model: {name} is {shape}, not {tuple(parameter.shape)}"
            )
        parameter.copy_(saved)
    slots: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, slot, name = key.split("/", 2)
            slots.setdefault(name, {})[slot] = value
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in named.items():
        # torch keeps a parameter's number of steps, a scalar, in main memory.
        owner[parameter].state[parameter] = {
            slot: value if value.ndim == 0 else value.to(parameter.device)
            for slot, value in slots.get(name, {}).items()
        }
    return [tensors.get(f"best/{name}", tensors[f"parameter/{name}"]).to(p.device) for name, p in named.items()]
