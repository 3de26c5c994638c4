"""Training on the workers of Ray Train that a run may use, or in this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from jobs import ray_cluster
from jobs.settings import RayCluster
from jobs.staging import Staging
from udfs import ray_training


def run(
    task: Callable[..., Any],
    arguments: tuple[Any, ...],
    ray: RayCluster,
    workers: int,
    checkpoints: Staging,
    log: Callable[[str], None],
) -> Any:
    """`udfs.ray_training.run` of `task` over `workers` workers of the run's cluster; 0: in this process.

    Args:
        checkpoints: of the training; the workers' journal lies there, too.

    Raises:
        jobs.ray_cluster.ClusterError: there is no cluster, or this machine alone has no room for the workers.
        udfs.ray_training.TrainingError: the workers failed again and again, or did not start.
        ColdRefreshError: the same that the task raised.
    """
    with ray_cluster.cluster(ray) if workers else nullcontext():
        if workers:
            ray_cluster.require_workers(ray, workers)
        return ray_training.run(
            task,
            arguments,
            workers=workers,
            cpus=ray.cpus_per_actor,
            gpus=ray.gpus_per_actor,
            folder=checkpoints.uri,
            log=log,
        )
