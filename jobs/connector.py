"""The Delta connector for Spark: which jars it is made of, how they get into the environment, whether they are there.

`python -m jobs.connector` (called by `make setup`) puts seven jars into the environment's `pyspark/jars`, as images for
clusters do, so that a plain `spark-submit` finds them. It also makes the environment's own `spark-submit` work without
activation, by naming this interpreter and this Spark in it, and quiets Spark's log.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from schemas.errors import ColdRefreshError

PACKAGE = "io.delta:delta-spark_4.2_2.13:4.4.0"
INSTALL_COMMAND = "python -m jobs.connector"

#: File name -> first 16 digits of its SHA-256.
JARS = {
    "delta-kernel-api-4.4.0.jar": "ee9b5a14ac3b7efd",
    "delta-kernel-defaults-4.4.0.jar": "225c975199e4718b",
    "delta-kernel-unitycatalog-4.4.0.jar": "cea22dfb4ac562b3",
    "delta-spark_4.2_2.13-4.4.0.jar": "27d4fd8b1f879535",
    "delta-storage-4.4.0.jar": "c46735481fa8e326",
    "unitycatalog-client-0.6.0.jar": "48257499a86b801a",
    "unitycatalog-hadoop-0.6.0.jar": "c47b63c961c87102",
}

# What the connector's POM names and Spark's own distribution already holds.
_IN_SPARK = (
    "org.scala-lang:scala-library",
    "org.apache.logging.log4j:log4j-slf4j2-impl",
    "org.apache.logging.log4j:log4j-core",
    "org.apache.logging.log4j:log4j-api",
    "org.roaringbitmap:RoaringBitmap",
    "org.roaringbitmap:shims",
    "org.slf4j:slf4j-api",
    "com.fasterxml.jackson.core:jackson-databind",
    "com.fasterxml.jackson.core:jackson-core",
    "com.fasterxml.jackson.core:jackson-annotations",
    "com.fasterxml.jackson.datatype:jackson-datatype-jdk8",
    "com.google.code.findbugs:jsr305",
    "org.apache.hadoop:hadoop-client-runtime",
    "org.apache.hadoop:hadoop-client-api",
    "org.apache.parquet:parquet-hadoop",
)

_SPARK_SUBMIT = """#!/usr/bin/env bash
# Written by `python -m jobs.connector`: this environment's Spark, run by this environment's Python, activated or not.
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
export SPARK_HOME="{spark_home}"
export PYSPARK_PYTHON="${{PYSPARK_PYTHON:-$here/python}}"
export SPARK_DRIVER_MEMORY="${{SPARK_DRIVER_MEMORY:-3g}}"
export PATH="$here:$PATH"
exec "$SPARK_HOME/bin/spark-submit" "$@"
"""


# Spark's own default prints its start at INFO, hundreds of lines before a session can say otherwise.
_LOGGING = """# Written by `python -m jobs.connector`: warnings and errors only.
rootLogger.level = warn
rootLogger.appenderRef.stderr.ref = stderr
appender.stderr.type = Console
appender.stderr.name = stderr
appender.stderr.target = SYSTEM_ERR
appender.stderr.layout.type = PatternLayout
appender.stderr.layout.pattern = %d{yy/MM/dd HH:mm:ss} %p %c{1}: %m%n%ex
"""


class ConnectorMissing(ColdRefreshError):
    """Spark cannot read Delta tables: a jar of the connector is absent or is not the one that was tried."""


def spark_home() -> Path:
    """The folder of the installed pyspark."""
    spec = find_spec("pyspark")
    if spec is None or spec.origin is None:
        raise ConnectorMissing("pyspark is not installed: run `make setup`")
    return Path(spec.origin).parent


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def missing(folder: Path) -> list[str]:
    """The jars that `folder` lacks or holds in another version than the one that was tried."""
    return [name for name, digest in JARS.items() if not (folder / name).is_file() or _digest(folder / name) != digest]


def _resolve(into: Path, mirror: str | None) -> Path:
    """Let Spark's own resolver fetch the package; returns the folder of its jars."""
    script = into / "nothing.py"
    script.write_text("")
    command = [str(spark_home() / "bin" / "spark-submit"), "--master", "local[1]", "--packages", PACKAGE]
    command += ["--exclude-packages", ",".join(_IN_SPARK), "--conf", f"spark.jars.ivy={into / 'ivy'}"]
    command += ["--repositories", mirror] if mirror else []
    env = {**os.environ, "PYSPARK_PYTHON": sys.executable, "SPARK_HOME": str(spark_home())}
    done = subprocess.run([*command, str(script)], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
        raise ConnectorMissing(
            f"could not fetch {PACKAGE} from {mirror or 'the Maven repositories that Spark knows'} (its own words are above). "
            "Name a mirror (`make setup MAVEN_MIRROR=https://host/maven2`), or a folder that holds "
            f"{', '.join(JARS)} (`make setup JARS=/folder`). A ~/.m2 that holds a POM without its jar makes this fail too."
        )
    return into / "ivy" / "jars"


def install(jars: str | None = None, mirror: str | None = None) -> None:
    """Put the connector's jars into the environment, from `jars` (a folder), `mirror` (a URL) or where Spark looks."""
    target = spark_home() / "jars"
    lacking = missing(target)
    if lacking:
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(jars) if jars else _resolve(Path(scratch), mirror)
            for name in lacking:
                # Spark's resolver puts the group before the name: io.delta_delta-storage-4.4.0.jar
                found = next(iter(sorted(source.glob(f"*{name}"))), None)
                if found is None or _digest(found) != JARS[name]:
                    raise ConnectorMissing(
                        f"{name} (SHA-256 {JARS[name]}...) is not in {jars or mirror or 'what Spark resolved'}; "
                        f"looked for *{name} in {source}" + (f", found another file {found}" if found else "")
                    )
                shutil.copyfile(found, target / name)
    logging = spark_home() / "conf" / "log4j2.properties"
    logging.parent.mkdir(exist_ok=True)
    logging.write_text(_LOGGING)
    script = Path(sys.executable).parent / "spark-submit"
    if script.exists():
        # A new file, never the old one rewritten: installers link it to their cache.
        script.unlink()
        script.write_text(_SPARK_SUBMIT.format(spark_home=spark_home()))
        script.chmod(0o755)


def check() -> None:
    """Raise ConnectorMissing unless every jar is in the environment (by name; `install` has checked the bytes)."""
    folder = Path(os.environ.get("SPARK_HOME", spark_home())) / "jars"
    lacking = [name for name in JARS if not (folder / name).is_file()]
    if lacking:
        raise ConnectorMissing(
            f"Spark has no Delta connector: {', '.join(lacking)} not in {folder}. It is {PACKAGE}; `{INSTALL_COMMAND}` installs it."
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jars", help="a folder that holds the seven jars")
    parser.add_argument("--mirror", help="the URL of a Maven repository")
    args = parser.parse_args()
    try:
        install(args.jars, args.mirror)
    except ConnectorMissing as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"The Delta connector ({PACKAGE}) is in {spark_home() / 'jars'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
