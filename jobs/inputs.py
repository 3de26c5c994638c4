"""The input tables, read by Spark at the versions that the run pinned, under our column names.

A user's own tables may use any Delta feature (deletion vectors, column mapping, clustering): only Spark reads them here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jobs.lake import LakeError
from jobs.run import Run, input_tables
from jobs.settings import InputTable
from jobs.spark_session import spark_path
from schemas.errors import ContractError
from schemas.table import table as schema

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

# Types that a table may hold for a contract's type without losing anything.
_ACCEPTED = {
    "string": ("string", "int", "bigint", "smallint", "varchar", "char"),
    "timestamp": ("timestamp", "timestamp_ntz", "date"),
    "double": ("double", "float", "int", "bigint", "smallint", "tinyint", "decimal"),
    "long": ("bigint", "int", "smallint", "tinyint"),
}
# What Hadoop says of a scheme that it does not know, or whose class is not there.
_NO_CLIENT = re.compile("FileSystem not found|No FileSystem for scheme")
# What Delta and Spark say of a version or of files that are not there any more.
_GONE = re.compile(
    "DELTA_VERSION_NOT_FOUND|DELTA_NO_REPRODUCIBLE_HISTORY_FOUND|DELTA_VERSIONS_NOT_CONTIGUOUS|DELTA_LOG_FILE_NOT_FOUND"
    "|TRUNCATED_TRANSACTION_LOG|FILE_NOT_EXIST|DELTA_FILE_NOT_FOUND|FileNotFoundException"
)


def _read(spark: SparkSession, run: Run, name: str, source: InputTable, version: int | None) -> DataFrame:
    from pyspark.sql import functions as F

    contract = schema(name)
    path = run.lake.path(source.table)
    pinned = run.input_versions[name] if version is None else version
    try:
        frame = spark.read.format("delta").option("versionAsOf", pinned).load(spark_path(path))
    except Exception as error:
        if _NO_CLIENT.search(str(error)):
            hadoop = spark.sparkContext._jvm.org.apache.hadoop.util.VersionInfo.getVersion()
            raise LakeError(
                f"Spark has no client for {spark_path(path)}. Give it one that fits its Hadoop, such as "
                f"org.apache.hadoop:hadoop-aws:{hadoop} for S3: `spark-submit --packages`, or spark.jars.packages in "
                "spark.conf where spark-submit is not used"
            ) from None
        if _GONE.search(str(error)):
            raise _gone(name, path, pinned) from error
        raise
    held = {column.lower(): (column, kind) for column, kind in frame.dtypes}
    unknown = sorted(set(source.columns) - {c.name for c in contract.columns})
    if unknown:
        raise ContractError(f"inputs.{name}.columns maps {unknown}, which are no columns of '{name}'")
    selected = []
    for column in contract.columns:
        theirs = source.columns.get(column.name, column.name)
        found, kind = held.get(theirs.lower(), (None, ""))
        if found is None:
            if not column.optional or column.name in source.columns:
                raise ContractError(
                    f"table '{source.table}' (version {pinned}) has no column '{theirs}' for {name}.{column.name}; it has "
                    f"{frame.columns}. Map it in conf: inputs.{name}.columns.{column.name}"
                )
            selected.append(F.lit(None).cast(column.type).alias(column.name))
            continue
        if kind.split("(")[0] not in _ACCEPTED[column.type]:
            raise ContractError(
                f"table '{source.table}' (version {pinned}): column '{found}' is {kind}, and {name}.{column.name} "
                f"needs {column.type}. Cast it in the table, or map another column in inputs.{name}.columns"
            )
        selected.append(F.col(f"`{found}`").cast(column.type).alias(column.name))
    return frame.select(*selected)


def _gone(name: str, path: str, version: int) -> ContractError:
    return ContractError(
        f"table '{name}' at {path} cannot be read at version {version} any more, which this run pinned: its files were "
        "removed (VACUUM, log clean-up) or it was made anew. Run again: the table is read as it is then. For what reads old "
        "versions (backfills, a date that is measured later) keep them longer than that: delta.deletedFileRetentionDuration "
        "and delta.logRetentionDuration"
    )


@contextmanager
def readable(run: Run) -> Iterator[None]:
    """Files of a pinned version that turn out to be gone while they are read are a ContractError, as in `interactions`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ContractError) or not _GONE.search(str(error)):
            raise
        for name, table in input_tables(run.settings).items():
            path = run.lake.path(table)
            # Relative or absolute, s3 or s3a: the folder's own name is what all have in common.
            if f"/{path.rstrip('/').rsplit('/', 1)[-1]}/" in str(error):
                raise _gone(name, path, run.input_versions[name]) from error
        raise


def interactions(spark: SparkSession, run: Run, *, version: int | None = None) -> DataFrame:
    """Events with the columns of schemas/interactions.yaml; optional ones that the table lacks are null.

    Args:
        version: Delta version to read; the pinned one by default.

    Raises:
        ContractError: a column is missing or has the wrong type, or the version cannot be read any more.
        LakeError: Spark has no client for the object store.
    """
    return _read(spark, run, "interactions", run.settings.inputs.interactions, version)


def items(spark: SparkSession, run: Run) -> DataFrame:
    """Items with the columns of schemas/items.yaml. Raises as `interactions` does."""
    return _read(spark, run, "items", run.settings.inputs.items, None)


def split(spark: SparkSession, run: Run) -> DataFrame:
    """The given split (schemas/split.yaml); needs snapshot.split in the settings. Raises as `interactions` does."""
    assert run.settings.snapshot.split is not None
    return _read(spark, run, "split", InputTable(table=run.settings.snapshot.split.table), None)
