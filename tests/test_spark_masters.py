"""jobs/spark_session.py: what a session is told where the work is on one machine, and on a cluster."""

from __future__ import annotations

import pytest

from jobs.spark_session import defaults


@pytest.mark.parametrize("master", ["local", "local[*]", "local[2]"])
def test_on_one_machine_few_partitions_are_enough(master: str) -> None:
    found = defaults(master)
    assert (found["spark.sql.shuffle.partitions"], found["spark.driver.host"]) == ("8", "127.0.0.1")
    assert found["spark.sql.session.timeZone"] == "UTC"


@pytest.mark.parametrize("master", ["yarn", "spark://host:7077", "k8s://https://host", "local-cluster[2,1,1024]"])
def test_a_cluster_keeps_its_own_partitions_and_address(master: str) -> None:
    found = defaults(master)
    assert not {"spark.sql.shuffle.partitions", "spark.driver.host", "spark.driver.bindAddress"} & set(found)
    assert found["spark.sql.session.timeZone"] == "UTC"
