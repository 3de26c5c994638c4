"""Training over Ray Train's workers (ray.train.torch.TorchTrainer): the same code in this process, on CPUs, or on many GPUs.

A worker that dies (or whose machine does) ends its group; a new one is started and goes on from what the task has saved,
which is the task's own matter. What the first worker says reaches the driver through small files in a folder that all see,
since workers' output stays in Ray's logs, on their machines.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from pyarrow import fs

from schemas.errors import ColdRefreshError
from udfs.filesystems import located
from udfs.worker_group import Group

RESTARTS = 3  # of the group of workers
_POLL_SECONDS = 1.0
#: Ray Train's own settings, where the environment does not set them already.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # As long as the other stages wait for a worker: a cluster may have to grow first.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    # Relative paths in settings mean the same to a worker as to the driver.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


class TrainingError(ColdRefreshError):
    """Workers failed again and again, or could not be started: the message says why."""


class Journal:
    """Lines from one process to another, a file each, in the folder `uri` (a path, or s3://, gs://, ...)."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._next: int | None = None

    def _names(self) -> list[str]:
        filesystem, root = located(self.uri)
        listing = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
        return sorted(info.base_name for info in listing if info.base_name.endswith(".txt"))

    def __len__(self) -> int:
        return len(self._names())

    def write(self, line: str) -> None:
        """Add a line; one process writes at a time."""
        filesystem, root = located(self.uri)
        if self._next is None:
            filesystem.create_dir(root, recursive=True)
            self._next = len(self)
        name = f"{root}/{self._next:08d}"
        with filesystem.open_output_stream(f"{name}.part") as stream:
            stream.write(line.encode())
        filesystem.move(f"{name}.part", f"{name}.txt")
        self._next += 1

    def read(self, seen: int) -> list[str]:
        """The lines behind the first `seen`."""
        filesystem, root = located(self.uri)
        found = []
        for name in self._names()[seen:]:
            with filesystem.open_input_stream(f"{root}/{name}") as stream:
                found.append(stream.read().decode())
        return found


def run(
    task: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    workers: int,
    cpus: float,
    gpus: float,
    folder: str,
    log: Callable[[str], None],
) -> Any:
    """`task(*arguments, group=..., device=..., log=...)` in every worker at once; what the first one returns.

    Within a task torch.distributed is set up (gloo on CPUs, NCCL on GPUs). Unless `workers` is 0, Ray must be initialised
    (`jobs.ray_cluster.cluster`), and `task` and `arguments` travel to the workers.

    Args:
        workers: 0: the task runs in this process (Ray Train's local mode), which needs no Ray cluster.
        cpus: CPUs a worker; gpus: likewise; above 0, the device is a GPU (without workers only if this process has one).
        folder: a path or URI that all workers see, for the journal and for what Ray Train keeps of a run.
        log: called here with the lines that the first worker logs.

    Raises:
        TrainingError: the workers failed more than `RESTARTS` times, or did not start.
        ColdRefreshError: the same that the task raised.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    filesystem, root = located(folder)
    journal = Journal(f"{folder}/journal")
    config = {"task": task, "arguments": arguments, "gpus": gpus, "log": log if workers == 0 else journal.write}
    with _environment(), _following(journal, log) if workers else nullcontext():
        trainer = TorchTrainer(
            _work,
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=workers > 0 and gpus > 0,
                resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus > 0 else {})} if workers else None,
            ),
            run_config=RunConfig(
                name="run",
                storage_path=f"{root}/ray_train",
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=RESTARTS, controller_failure_limit=0),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            kind, value = trainer.fit().return_value
        except TrainingFailedError as error:
            raise _reason(error, workers, cpus, gpus) from error
        except SystemExit as error:  # Ray Train ends the process, with status 0, on Ctrl-C
            raise KeyboardInterrupt from error
    if kind == "error":
        raise value
    return value


def _work(config: dict[str, Any]) -> tuple[str, Any]:
    """What every worker runs: ("value", what the task returned), or ("error", what it raised) of a single worker, if that is
    worth no retry. Of several one may fail alone, and the others would wait for it: then it is raised, and Ray Train tries all
    of them again.
    """
    import ray.train
    import ray.train.torch
    import torch

    from udfs.devices import release

    context = ray.train.get_context()
    group, log = Group(context.get_world_rank(), context.get_world_size()), config["log"]
    local = not torch.distributed.is_initialized()
    try:
        device = torch.device("cpu")
        if config["gpus"] > 0 and torch.cuda.is_available():
            device = torch.device("cuda") if local else ray.train.torch.get_device()
        elif config["gpus"] > 0 and not local:
            raise TrainingError("ray.gpus_per_actor is above 0, but torch finds no usable GPU in the worker")
        elif config["gpus"] > 0:
            log(
                "no usable GPU in this process, so it trains on the CPU; ray.training_workers=1 trains on a GPU of the cluster"
            )
        if not local and group.rank == 0:
            log(f"{group.size} workers on {device.type}; the first has the process id {os.getpid()}")
        try:
            return "value", config["task"](*config["arguments"], group=group, device=device, log=log)
        finally:
            release(device)
    except ColdRefreshError as error:
        # The same input would raise it again. Of several workers the others would wait for one that returns.
        if group.size == 1 and not local:
            return "error", error
        raise


def _reason(error: Exception, workers: int, cpus: float, gpus: float) -> ColdRefreshError:
    """What ended the training, as an error that a person can act on."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, ColdRefreshError):
            return cause
    if not failures:
        wanted = f"{workers} workers of {cpus:g} CPU and {gpus:g} GPU"
        return TrainingError(
            f"training could not be started with {wanted}: {error}. Set ray.training_workers, ray.cpus_per_actor and "
            "ray.gpus_per_actor to what the cluster has"
        )
    last = "; ".join(f"worker {rank}: {str(e).strip().splitlines()[-1]}" for rank, e in failures.items())
    return TrainingError(
        f"training failed {RESTARTS + 1} times; {last}. What was saved stays: the same command goes on from there. A worker "
        "that was killed may have lacked memory: a smaller batch_size (of FilterLLM also a smaller vocabulary_chunk) needs less"
    )


@contextmanager
def _environment() -> Iterator[None]:
    """Ray Train's settings in the environment, and its warnings only, for as long as it runs; the handler of Ctrl-C that it
    leaves is taken back.
    """
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    handler, logger = signal.getsignal(signal.SIGINT), logging.getLogger("ray.train")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _following(journal: Journal, log: Callable[[str], None]) -> Iterator[None]:
    """Within it, lines that are added to the journal go to `log`."""
    seen, done = len(journal), threading.Event()

    def follow() -> None:
        nonlocal seen
        while True:
            last = done.wait(_POLL_SECONDS)
            for line in journal.read(seen):
                log(line)
                seen += 1
            if last:
                return

    thread = threading.Thread(target=follow, name="journal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
