"""Shards through Ray actors, results in the order of the shards.

Order matters because results are committed as they come: what a killed run leaves is a prefix of the shards, and the next
run goes on with the same ones. A worker that dies is started again and its shard is done again; a worker that raises an
exception ends the map, since the same input would raise it again.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from schemas.errors import ColdRefreshError

RESTARTS, RETRIES = 2, 3  # of an actor, and of a shard whose actor died
_QUEUED = 2  # shards an actor has at a time: the next one lies there when one is done
_AHEAD = 4  # shards an actor may be ahead of the one that is waited for: bounds what is held of results


class WorkerError(ColdRefreshError):
    """A worker failed on a shard, or no worker could be started: the message says which and why."""


def map_ordered(
    worker: type,
    arguments: tuple[Any, ...],
    shards: Iterable[Any],
    *,
    actors: int,
    cpus: float,
    gpus: float = 0.0,
    start_seconds: float = 600.0,
) -> Iterator[Any]:
    """`worker(*arguments).work(shard)` for each shard, over `actors` Ray actors that each build one `worker`.

    Ray must be initialised (`jobs.ray_cluster.cluster`). `shards` is read lazily, a bounded number ahead of what has been
    consumed. Actors for which the cluster has no room are waited for by nobody: those that started do the work.

    Args:
        cpus: CPUs that an actor takes of the cluster; gpus: likewise.
        start_seconds: how long to wait for the first actor.

    Raises:
        WorkerError: `work` raised an exception, an actor could not be built or died again and again, or none started.
        ColdRefreshError: the same object's, if that is what the worker raised.
    """
    import ray

    remote = ray.remote(worker).options(num_cpus=cpus, num_gpus=gpus, max_restarts=RESTARTS, max_task_retries=RETRIES)
    pool = [remote.remote(*arguments) for _ in range(actors)]
    starting = {actor.__ray_ready__.remote(): actor for actor in pool}
    load: dict[Any, int] = {}  # of the actors that are ready: shards they have
    running: dict[Any, tuple[int, Any]] = {}  # task -> (number of the shard, actor)
    finished: dict[int, Any] = {}  # number of the shard -> task
    source, exhausted, submitted, consumed = iter(shards), False, 0, 0
    deadline = time.monotonic() + start_seconds
    try:
        while True:
            free = deque(sorted((a for a in load if load[a] < _QUEUED), key=lambda a: load[a]))
            while free and not exhausted and submitted - consumed < _AHEAD * max(len(load), 1):
                try:
                    shard = next(source)
                except StopIteration:
                    exhausted = True
                    break
                actor = free.popleft()
                running[actor.work.remote(shard)] = (submitted, actor)
                del shard
                submitted += 1
                load[actor] += 1
                if load[actor] < _QUEUED:
                    free.append(actor)
            if exhausted and submitted == consumed:
                return
            ready, _ = ray.wait([*starting, *running], num_returns=1, timeout=min(30.0, start_seconds))
            if not ready and not load:
                _waiting(actors, cpus, gpus, time.monotonic() > deadline)
            for task in ready:
                if task in starting:
                    _get(task, "a worker could not be started")
                    load[starting.pop(task)] = 0
                else:
                    number, actor = running.pop(task)
                    load[actor] -= 1
                    finished[number] = task
            while consumed in finished:
                result = _get(finished.pop(consumed), f"shard {consumed} failed")
                consumed += 1
                yield result
                del result
    finally:
        for actor in pool:
            ray.kill(actor)


def _get(task: Any, what: str) -> Any:
    """The task's result; its failure as an error that says `what` failed."""
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ColdRefreshError):
            raise type(cause)(str(cause)) from error
        raise WorkerError(f"{what} in a worker: {type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayActorError as error:
        # Of an error in the constructor Ray keeps the text alone; its last line is the exception.
        last = str(error).strip().splitlines()[-1].strip()
        raise WorkerError(
            f"{what}: {last} (a worker that dies is started again {RESTARTS} times; if it was killed, "
            "it may have lacked memory: fewer ray.actors or a smaller text.batch_tokens or shard need less)"
        ) from error
    except ray.exceptions.RayError as error:
        raise WorkerError(f"{what}: {error}") from error


def _waiting(actors: int, cpus: float, gpus: float, too_long: bool) -> None:
    """Say that no actor has started yet; raise WorkerError if that is `too_long`."""
    import ray

    total = {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
    state = f"no worker of {cpus:g} CPU and {gpus:g} GPU has started yet; the cluster has {total}"
    if too_long:
        raise WorkerError(f"{state}: set ray.cpus_per_actor and ray.gpus_per_actor to what is there, or add nodes")
    print(f"waiting: {state} ({actors} asked for)", file=sys.stderr, flush=True)
