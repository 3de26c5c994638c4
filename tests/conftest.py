"""Fixtures that several tests share; engines are started once a session."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests import java, nights
from tests import small_lake as small

# Whole nights in processes of their own, and many starts of Ray or jobs of Spark: the longest, so that none of them is left over
# for one worker at the end.
_LONGEST = [
    f"test_{name}.py"
    for name in (
        *("dags", "cold_refresh", "backfill", "filterllm_stages", "quality_benchmark", "gates"),
        *("snapshot", "text_embeddings", "recommend"),
    )
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; two workers take file by file (-n 2 --dist loadfile), so what tests of a file share is made once."""
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _offline() -> None:
    """Nothing is fetched while tests run, and Ray's loopback cluster needs no token."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"})
    # pyspark takes a main module without a file, as a worker of xdist has, for a doctest and ends the process.
    main = sys.modules["__main__"]
    main.__file__ = getattr(main, "__file__", None) or __file__
    os.environ.update(java.environment())


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    """A Spark session with the Delta connector."""
    from jobs.settings import Spark
    from jobs.spark_session import session

    running = session(Spark(master="local[2]", conf=small.SPARK_CONF), "tests")
    yield running
    running.stop()


@pytest.fixture
def small_lake(tmp_path: Path) -> small.SmallLake:
    """A lake of 80 users, 48 warm and 12 cold items, and its settings file."""
    return small.build(tmp_path)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[small.SmallLake, dict[str, Any]]:
    """A lake after one night that nothing disturbed, run by spark-submit, and the night's summary.

    The night is run once for all workers of pytest; each has a copy of its own.
    """
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "undisturbed-night"
    with FileLock(f"{made}.lock"):
        if not (made / "summary.json").exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            lake = small.build(made)
            (made / "summary.json").write_text(json.dumps(nights.night(lake.conf, lake.run_date)))
    own = small.copied(made / "lake", tmp_path_factory.mktemp("undisturbed"))
    return own, json.loads((made / "summary.json").read_text())


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tests/small_llm.py's language model; nobody writes there."""
    from tests import small_llm

    return small_llm.build(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real datasets, where there is one."""
    folder = Path(os.environ.get("COLD_REFRESH_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real datasets at {folder} (COLD_REFRESH_DATA names another folder)")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrices as small as many tests' are slower on several threads, much slower beside other tests."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
