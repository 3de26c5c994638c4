"""The Ray that a run starts for itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import ray_cluster

# What is put is as large as the keys of a million users.
_PUT = """
import numpy as np, ray
from jobs.ray_cluster import cluster
from jobs.settings import RayCluster

with cluster(RayCluster()):
    keys = ray.put(np.ones((300, 1 << 18), np.float32))
    store = ray.cluster_resources()["object_store_memory"]
    assert store > ray.get(keys).nbytes, f"{store} bytes: the keys went to the disk"
"""


@pytest.mark.parametrize(("free", "bytes_"), [(64 * 2**20, None), (2**30, int(0.95 * 2**30)), (2**50, None)])
def test_a_container_s_shared_memory_is_used_as_far_as_it_goes(
    monkeypatch: pytest.MonkeyPatch, free: int, bytes_: int | None
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    monkeypatch.setattr(ray_cluster.os.path, "isdir", lambda folder: True)
    assert ray_cluster._object_store() == bytes_


@pytest.mark.skipif(ray_cluster._object_store() is not None, reason="/dev/shm is small here")
def test_the_keys_of_many_users_fit_into_the_object_store() -> None:
    subprocess.run([sys.executable, "-c", _PUT], cwd=Path(__file__).parents[1], timeout=300, check=True)
