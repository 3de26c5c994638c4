"""Fixtures that several tests share; engines are started once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import small_lake as small


@pytest.fixture(scope="session", autouse=True)
def _offline() -> None:
    """Nothing is fetched while tests run, and Ray's loopback cluster needs no token."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"})
    # Many short JVMs on few cores: most of their time would go to the optimising compiler.
    os.environ["JDK_JAVA_OPTIONS"] = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    """A Spark session with the Delta connector."""
    from jobs.settings import Spark
    from jobs.spark_session import session

    conf = {"spark.driver.memory": "1g", "spark.sql.shuffle.partitions": "2", "spark.ui.enabled": "false"}
    running = session(Spark(master="local[2]", conf=conf), "tests")
    yield running
    running.stop()


@pytest.fixture
def small_lake(tmp_path: Path) -> small.SmallLake:
    """A lake of 80 users, 48 warm and 12 cold items, and its settings file."""
    return small.build(tmp_path)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real datasets, where there is one."""
    folder = Path(os.environ.get("COLD_REFRESH_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real datasets at {folder} (COLD_REFRESH_DATA names another folder)")
    return folder
