"""The Spark session of a driver, with the Delta connector."""

from __future__ import annotations

import os
import sys
from typing import Any

from jobs import connector
from jobs.run import log
from jobs.settings import Spark

_CONF = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    # The default of 50 tasks makes a table of ten rows take twenty seconds.
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.ui.showConsoleProgress": "true",
    "spark.driver.memory": "3g",
}
# Workers on other machines need the driver's true address, and a cluster's data more partitions. The driver's page, which
# would answer the whole network, asks nobody for a password.
_ONE_MACHINE = {
    "spark.ui.enabled": "false",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.sql.shuffle.partitions": "8",
}
# Read when Java starts, which spark-submit has done before there is a session.
_OF_THE_START = ("spark.driver.", "spark.jars")


def defaults(master: str) -> dict[str, str]:
    """What a session on `master` is told unless the settings or spark-submit say otherwise."""
    return {**_CONF, **(_ONE_MACHINE if master == "local" or master.startswith("local[") else {})}


def session(settings: Spark, name: str = "cold-refresh") -> Any:
    """The active session, or a new one. What spark-submit was told wins over the settings, they over the defaults.

    Raises:
        jobs.connector.ConnectorMissing: Spark has no Delta connector.
    """
    from pyspark import SparkConf, SparkContext
    from pyspark.sql import SparkSession

    if active := SparkSession.getActiveSession():
        return _of_utc(active)
    connector.check()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ
    if submitted:
        SparkContext._ensure_initialized()
    told = SparkConf()  # what spark-submit put into Java, when it started this process
    builder = SparkSession.builder.appName(name)
    # Which spark-submit says too when it was told nothing.
    master = told.get("spark.master", "local[*]")
    if master == "local[*]":
        master = settings.master or master
        builder = builder.master(master)
    wanted = {
        **defaults(master),
        **({"spark.ui.showConsoleProgress": "false"} if not sys.stderr.isatty() else {}),
        **settings.conf,
    }
    late = [k for k, v in settings.conf.items() if submitted and k.startswith(_OF_THE_START) and told.get(k) != v]
    if late:
        log(
            f"Spark runs already, without {', '.join(late)} of spark.conf: give them to spark-submit (--conf KEY=VALUE)"
        )
    for key, value in wanted.items():
        if not told.contains(key):
            builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    return _of_utc(spark)


def _of_utc(spark: Any) -> Any:
    """Dates and times without a zone are UTC, whatever a cluster's or a notebook's defaults say: the zone decides what a run
    date knows.
    """
    spark.conf.set("spark.sql.session.timeZone", "UTC")
    return spark


def spark_path(uri: str) -> str:
    """`uri` as Spark's Hadoop names it: Amazon's store is s3a there, s3 everywhere else."""
    return "s3a://" + uri[5:] if uri.startswith("s3://") else uri
