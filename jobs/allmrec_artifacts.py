"""Trained parts of A-LLMRec as artifacts: the one that is there, or a new one, whose training goes on where it was killed.

Kinds: `backbones`, `alignments` and `readers` under `_artifacts/`. What a part is made for (its identity: what it stands on, and
the settings) is in its facts; its version is a hash of that and of the data. The state of a training is saved every epoch under
`_artifacts/checkpoints/<version>`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from jobs import cf, training_workers
from jobs.run import Run, log
from jobs.staging import Staging
from udfs import devices
from udfs.checkpoints import Checkpoints
from udfs.fingerprint import fingerprint
from udfs.module_files import FILES
from udfs.worker_group import Group


@dataclass(frozen=True)
class Training:
    """A part in the making: what it will be called, where its files go and its state is saved, and the device that trains it.
    log: is called with lines for a person."""

    version: str
    artifact: Staging
    checkpoints: Checkpoints
    device: str
    log: Callable[[str], None]


Fit = Callable[[Training], dict[str, Any]]


def conf_digest(section: BaseModel, seed: int, without: Any = None) -> str:
    """Hash of the settings that decide a part, beside what it stands on. `without`: fields to leave out, as pydantic has it."""
    body = json.dumps([section.model_dump(mode="json", exclude=without), seed], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def newest(run: Run, kind: str, identity: dict[str, str], days: int | None = None) -> str | None:
    """The newest part of this identity that the run may choose (see Run.trained): what was trained before the training run
    (--train) of its date learnt from what may have been mended for that. days: it is less than so many old.
    """
    found = [
        version
        for day, version, facts in run.trained(kind)
        if (not days or (run.run_date - day).days < days) and identity.items() <= facts.items()
    ]
    return found[-1] if found else None


def train(
    run: Run,
    kind: str,
    identity: dict[str, str],
    data: Any,
    arrays: Sequence[np.ndarray],
    fit: Fit,
    *,
    here: bool = False,
) -> str:
    """Train a part and leave it; returns its version.

    Args:
        data (JSON), arrays: what it is trained on.
        fit: leaves the part's files in its artifact; returns facts. With ray.training_workers above 0 it runs on one worker of
            Ray Train, unless `here`: it sends its work to Ray itself.

    Raises:
        jobs.ray_cluster.ClusterError, udfs.ray_training.TrainingError: Ray or the worker failed.
    """
    run = run.anywhere()
    version = fingerprint([identity, run.run_date.isoformat(), data], *arrays)[:16]
    artifact, checkpoints = run.artifact(kind, version), run.artifact("checkpoints", version)
    training = run.trainings().get(run.run_date)
    if not artifact.is_complete():
        artifact.clear()
        state = Checkpoints(checkpoints.path("state"))
        if run.settings.ray.training_workers and not here:
            arguments = (fit, version, artifact, state)
            found = training_workers.run(_on_worker, arguments, run.settings.ray, 1, checkpoints, _told)
        else:
            device = "cpu" if here else cf.params(run.settings).torch_device()
            found = fit(Training(version, artifact, state, device, _told))
            devices.release(device)
        dated = {"run_id": run.run_id, "trained_on": run.run_date.isoformat(), "training": training}
        artifact.complete({**identity, **dated, **found})
    elif artifact.facts().get("training") != training:  # which found the same data
        artifact.complete({**artifact.facts(), "training": training})
    # Not before the part is complete: until then a killed run goes on from them.
    checkpoints.clear()
    return version


def _told(line: str) -> None:
    log(f"[allmrec] {line}")


def _on_worker(
    fit: Fit,
    version: str,
    artifact: Staging,
    state: Checkpoints,
    *,
    group: Group,
    device: torch.device,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """A task of `udfs.ray_training.run`."""
    return fit(Training(version, artifact, state, str(device), log))


def files(run: Run, kind: str, version: str) -> dict[str, bytes]:
    """The files of a trained module.

    Raises:
        jobs.staging.StagingError: it is not there, or not complete.
    """
    artifact = run.artifact(kind, version)
    artifact.facts()
    return {name: artifact.read_bytes(name) for name in FILES}


def write(artifact: Staging, made: dict[str, bytes]) -> None:
    """Leave a module's files."""
    for name, body in made.items():
        artifact.write_bytes(name, body)
