"""The Spark session of a driver, with the Delta connector."""

from __future__ import annotations

import os
import sys
from typing import Any

from jobs import connector
from jobs.settings import Spark

_CONF = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    # The default of 50 tasks makes a table of ten rows take twenty seconds.
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.shuffle.partitions": "8",
    "spark.ui.showConsoleProgress": "true",
    "spark.driver.memory": "3g",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
}


def session(settings: Spark, name: str = "cold-refresh") -> Any:
    """The active session, or a new one. What spark-submit was told wins over the settings, they over the defaults.

    Raises:
        jobs.connector.ConnectorMissing: Spark has no Delta connector.
    """
    from pyspark import SparkConf
    from pyspark.sql import SparkSession

    connector.check()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    told = SparkConf()  # what spark-submit put into the JVM, when it started this process
    builder = SparkSession.builder.appName(name)
    wanted = {
        **_CONF,
        **({"spark.ui.showConsoleProgress": "false"} if not sys.stderr.isatty() else {}),
        **settings.conf,
    }
    if not told.contains("spark.master"):
        builder = builder.master(settings.master or "local[*]")
    elif told.get("spark.master", "").startswith("local") is False:
        wanted = {k: v for k, v in wanted.items() if not k.startswith("spark.driver.")}
    for key, value in wanted.items():
        if not told.contains(key):
            builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def spark_path(uri: str) -> str:
    """`uri` as Spark's Hadoop names it: Amazon's store is s3a there, s3 everywhere else."""
    return "s3a://" + uri[5:] if uri.startswith("s3://") else uri
