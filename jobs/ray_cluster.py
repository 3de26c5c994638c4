"""The Ray cluster of a run: the one at ray.address, the one this process is part of already, or one started here."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.settings import RayCluster
from schemas.errors import ColdRefreshError

_LEAST_STORE = 256 * 2**20
_CONNECT_SECONDS, _ANSWER_SECONDS = 10, 30


class ClusterError(ColdRefreshError):
    """Ray cannot be started or reached: the message names the address and the remedy."""


@contextmanager
def cluster(settings: RayCluster) -> Iterator[None]:
    """Within it, Ray is initialised in this process.

    Joins the cluster at `settings.address` (inside a Ray job: the job's, which $RAY_ADDRESS names); without an address
    starts one on this machine, of all its CPUs and GPUs. Either ends with the process, not with the context: the next stage
    of a night need not start it again. If Ray is initialised already, that is used. Whoever reaches a cluster may run code
    on it: Ray's token authentication stays as the environment sets it (RAY_AUTH_MODE).

    Raises:
        ClusterError: no Ray answers at the address (known within about a minute), or one actor wants more than there is.
    """
    _leave_out_jars()
    import ray

    if ray.is_initialized():
        yield
        return
    require(settings)
    address = _address(settings)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers' output is in Ray's own log folder: stdout belongs to the summary.
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address and address != "local":
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, object_store_memory=_object_store(), **quiet)
    except (Exception, SystemExit) as error:  # Ray ends the process where it gives up on an address
        where = f"at {address}" if address else "on this machine"
        raise ClusterError(f"Ray {where} cannot be used: {error}. {_remedy(address)}") from error
    if not address:
        require_workers(settings, 1)
    yield


def _object_store() -> int | None:
    """Bytes of the object store; None for what Ray takes itself: 30 % of the free memory, in /dev/shm.

    What it holds are shards of a few MB each and, for scoring, the keys of all users once: 13 GB of 50 million users. What does not
    fit is mapped from a file in /tmp/ray: slow, and no error while the disk has room. Where /dev/shm has less room, as in
    containers, Ray would map all of it from that file: the store is made as large as /dev/shm then, and only the rest is.
    """
    if not os.path.isdir("/dev/shm"):
        return None
    room = int(0.95 * shutil.disk_usage("/dev/shm").free)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return room if _LEAST_STORE <= room < 0.3 * memory else None


def _leave_out_jars() -> None:
    """spark-submit --packages puts its jars on Python's path, where each process of Ray's would look for every module: with S3's
    client (700 MB) Ray takes longer to start than it waits."""
    sys.path[:] = [path for path in sys.path if not path.endswith(".jar")]
    if "PYTHONPATH" in os.environ:
        paths = os.environ["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if not path.endswith(".jar"))


def _address(settings: RayCluster) -> str | None:
    return settings.address or os.environ.get("RAY_ADDRESS") or None


def require(settings: RayCluster) -> None:
    """Raises ClusterError unless a cluster answers at the address, if one is set; starts and joins nothing."""
    address = _address(settings)
    if address and address not in ("auto", "local"):
        _require_answer(address)


def _remedy(address: str | None) -> str:
    if address:
        return (
            "Start one (`ray start --head`) and name its host:port in ray.address; leave ray.address (and RAY_ADDRESS) "
            "out to start one here. Both sides need the same Ray version, RAY_AUTH_MODE and token"
        )
    return "Ray needs a writable home folder for its token (or RAY_AUTH_MODE=disabled) and a writable /tmp"


def _require_answer(address: str) -> None:
    """Raises ClusterError unless a Ray head node answers: Ray itself would try for minutes, then end the process."""
    plain = address.removeprefix("ray://")
    host, _, port = plain.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"ray.address {address!r} is not of the form host:port (or auto)")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no Ray cluster answers at {address} ({error}). {_remedy(address)}") from error
    if address.startswith("ray://"):
        return
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", plain]
    try:
        checked = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        raise ClusterError(
            f"something listens at {address}, but it did not answer as a Ray head node within {_ANSWER_SECONDS} s. "
            f"{_remedy(address)}"
        ) from None
    if checked.returncode:
        said = (checked.stderr or checked.stdout).strip().splitlines()[-1:] or [f"exit status {checked.returncode}"]
        raise ClusterError(f"the Ray cluster at {address} refuses: {said[0]}. {_remedy(address)}")


def require_workers(settings: RayCluster, workers: int) -> None:
    """Raises ClusterError if a cluster of this machine alone has no room for so many workers at once: it will never grow."""
    import ray

    if _address(settings) or len(ray.nodes()) > 1:
        return
    there = ray.cluster_resources()
    for name, each, key in (
        ("CPU", settings.cpus_per_actor, "cpus_per_actor"),
        ("GPU", settings.gpus_per_actor, "gpus_per_actor"),
    ):
        if workers * each > there.get(name, 0):
            times = f"ray.training_workers ({workers}) x " if workers > 1 else ""
            raise ClusterError(
                f"{times}ray.{key} ({each:g}) is more than this machine's {there.get(name, 0):g} {name}; lower it"
            )
