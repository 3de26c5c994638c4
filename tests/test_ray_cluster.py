"""The Ray that a run starts for itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_the_keys_of_many_users_fit_into_the_object_store() -> None:
    subprocess.run([sys.executable, "-c", _PUT], cwd=Path(__file__).parents[1], timeout=300, check=True)
