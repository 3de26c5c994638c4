"""How the tests' Java starts: quickly. A night loads some 15,000 classes of Spark's, which an archive of them halves.

python -m tests.java            # makes the archive (`make test` does)
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from jobs.connector import spark_home
from tests.small_lake import SPARK_CONF

ARCHIVE = Path(__file__).parents[1] / ".cache" / "spark_classes.jsa"
# Many short JVMs on few cores: most of their time would go to the optimising compiler.
_QUICK = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xlog:disable"


def environment() -> dict[str, str]:
    """The variables for it. Without the archive Java does without, and what does not fit the archive it loads as ever."""
    # Java archives nothing where a folder with files is among its paths, as Spark's conf is: its one file is named instead.
    logging = f'"-Dlog4j2.configurationFile={spark_home() / "conf" / "log4j2.properties"}"'
    archived = f'"-XX:SharedArchiveFile={ARCHIVE}"' if ARCHIVE.exists() else ""
    return {
        "JDK_JAVA_OPTIONS": f"{_QUICK} {logging} {archived}",
        "SPARK_CONF_DIR": str(ARCHIVE.parent / "no-spark-conf"),
    }


def make() -> None:
    """Do what every night does with Spark, and keep the classes that it took."""
    from jobs.settings import Spark
    from jobs.spark_session import session

    ARCHIVE.parent.mkdir(parents=True, exist_ok=True)
    ARCHIVE.unlink(missing_ok=True)
    os.environ.update(environment())
    half_made = ARCHIVE.with_suffix(".part")
    conf = {**SPARK_CONF, "spark.driver.extraJavaOptions": f'"-XX:ArchiveClassesAtExit={half_made}"'}
    spark = session(Spark(master="local[2]", conf=conf), "classes")
    with tempfile.TemporaryDirectory() as folder:
        rows = spark.createDataFrame(
            [(i, str(i % 7), [0.1 * i]) for i in range(100)], "a int, b string, c array<double>"
        )
        rows.write.format("delta").save(f"{folder}/table")
        spark.read.format("delta").load(f"{folder}/table").groupBy("b").count().orderBy("b").toPandas()
    java = spark.sparkContext._gateway.proc
    spark.stop()
    java.stdin.close()  # Java ends with this, and writes the archive first
    java.wait(timeout=600)
    if half_made.exists():
        half_made.rename(ARCHIVE)
    else:
        print(f"this Java made no archive of its classes ({ARCHIVE}): the tests take longer")


if __name__ == "__main__":
    make()
