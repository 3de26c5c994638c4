"""udfs/ray_training.py: what ends a training of several workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import ray_cluster
from jobs.settings import RayCluster
from schemas.errors import ColdRefreshError
from udfs import ray_training


def test_an_error_of_the_first_worker_alone_is_the_training_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for the first: it must not end as if all were well."""

    def task(*, group: Any, device: Any, log: Any) -> None:
        import torch

        if group.rank == 0:
            raise ColdRefreshError("another language model is here")
        torch.distributed.barrier()

    monkeypatch.setattr(ray_training, "RESTARTS", 0)
    with ray_cluster.cluster(RayCluster()), pytest.raises(ColdRefreshError, match=r"^another language model is here$"):
        ray_training.run(task, (), workers=2, cpus=0.5, gpus=0.0, folder=str(tmp_path), log=print)
