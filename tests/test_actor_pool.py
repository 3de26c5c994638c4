"""The ordered map over real Ray actors: order, bounds, workers that die, workers that fail; and reaching a cluster."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from jobs.ray_cluster import ClusterError, cluster
from jobs.settings import RayCluster
from schemas.errors import ColdRefreshError
from udfs.actor_pool import WorkerError, map_ordered


class NoGoodError(ColdRefreshError):
    """What a worker says of a shard that a person can mend."""


class Doubler:
    """Doubles numbers; `folder` holds the marks of what went wrong once already."""

    def __init__(self, folder: str, fails: bool = False) -> None:
        if fails:
            raise ValueError("no weights here")
        self._folder = Path(folder)

    def work(self, shard: int) -> int:
        if shard == 3 and not (self._folder / "died").exists():
            (self._folder / "died").touch()
            os._exit(1)
        if shard == 100:
            raise ValueError("a hundred is too many")
        if shard == 101:
            raise NoGoodError("101 is no shard")
        if shard == 102:
            os._exit(1)
        time.sleep(0.3 if shard == 0 else 0)  # the first is the slowest: order is not that of finishing
        return 2 * shard


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with cluster(RayCluster()):
        yield


def test_results_in_order_although_a_worker_died(tmp_path: Path) -> None:
    assert list(map_ordered(Doubler, (str(tmp_path),), range(12), actors=2, cpus=0.5)) == [2 * n for n in range(12)]
    assert (tmp_path / "died").exists()


def test_shards_are_read_a_bounded_number_ahead(tmp_path: Path) -> None:
    read = []

    def shards() -> Iterator[int]:
        for number in range(4, 1000):
            read.append(number)
            yield number

    results = map_ordered(Doubler, (str(tmp_path),), shards(), actors=1, cpus=0.5)
    assert [next(results) for _ in range(3)] == [8, 10, 12]
    assert len(read) <= 10
    results.close()


def test_an_exception_ends_the_map_and_says_which_shard(tmp_path: Path) -> None:
    (tmp_path / "died").touch()
    results = map_ordered(Doubler, (str(tmp_path),), [1, 2, 100, 4], actors=1, cpus=0.5)
    assert [next(results), next(results)] == [2, 4]
    with pytest.raises(WorkerError, match=r"shard 2 failed in a worker: ValueError: a hundred is too many"):
        next(results)
    with pytest.raises(NoGoodError, match="101 is no shard"):
        list(map_ordered(Doubler, (str(tmp_path),), [101], actors=1, cpus=0.5))


def test_a_shard_that_kills_every_worker_is_no_endless_loop(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"shard 0 failed.*restarted|shard 0 failed.*died"):
        list(map_ordered(Doubler, (str(tmp_path),), [102], actors=1, cpus=0.5))


def test_a_worker_that_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="ValueError: no weights here"):
        list(map_ordered(Doubler, (str(tmp_path), True), [1], actors=1, cpus=0.5))


def test_actors_without_room_are_not_waited_for(tmp_path: Path) -> None:
    cpus = ray.cluster_resources()["CPU"]
    (tmp_path / "died").touch()
    assert list(map_ordered(Doubler, (str(tmp_path),), range(6), actors=3, cpus=cpus)) == [0, 2, 4, 6, 8, 10]
    with pytest.raises(WorkerError, match="no worker of 1000 CPU"):
        list(map_ordered(Doubler, (str(tmp_path),), [1], actors=1, cpus=1000, start_seconds=1))


def test_a_cluster_within_a_cluster_is_the_same_one() -> None:
    before = ray.get_runtime_context().get_job_id()
    with cluster(RayCluster()):
        assert ray.get_runtime_context().get_job_id() == before
    assert ray.is_initialized()


def test_jars_that_spark_put_on_the_path_are_left_out_of_rays_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", ["/jars/client.jar", *sys.path])
    monkeypatch.setenv("PYTHONPATH", f"/jars/client.jar{os.pathsep}/modules{os.pathsep}/modules.zip")
    with cluster(RayCluster(actors=1)):
        assert "/jars/client.jar" not in sys.path
        assert os.environ["PYTHONPATH"] == f"/modules{os.pathsep}/modules.zip"


def test_unreachable_addresses_are_known_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # this module's own cluster would be used otherwise
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr("jobs.ray_cluster._ANSWER_SECONDS", 5)
        begun = time.monotonic()
        with pytest.raises(ClusterError, match=f"127.0.0.1:{port}.*did not answer"), cluster(_at(f"127.0.0.1:{port}")):
            pass
        assert time.monotonic() - begun < 30
    with (
        pytest.raises(ClusterError, match=rf"no Ray cluster answers at 127\.0\.0\.1:{port}"),
        cluster(_at(f"127.0.0.1:{port}")),
    ):
        pass
    with pytest.raises(ClusterError, match="host:port"), cluster(_at("somewhere")):
        pass


def _at(address: str) -> RayCluster:
    return RayCluster(address=address)
