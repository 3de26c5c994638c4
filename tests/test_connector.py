"""The Delta connector's set-up: from a folder, without a network, and with the wrong file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import connector


@pytest.fixture
def empty_spark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Spark without the connector."""
    home = tmp_path / "spark"
    (home / "jars").mkdir(parents=True)
    monkeypatch.setattr(connector, "spark_home", lambda: home)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.delenv("SPARK_HOME", raising=False)
    return home


@pytest.fixture
def jars(tmp_path: Path) -> Path:
    """A folder of the seven jars, as an administrator would hand it over."""
    folder, installed = tmp_path / "handed-over", connector.spark_home() / "jars"
    folder.mkdir()
    for name in connector.JARS:
        shutil.copyfile(installed / name, folder / name)
    return folder


def test_a_folder_of_jars_is_enough(jars: Path, empty_spark: Path) -> None:
    with pytest.raises(connector.ConnectorMissing, match=r"io\.delta:delta-spark.*python -m jobs\.connector"):
        connector.check()
    connector.install(jars=str(jars))
    connector.check()
    assert connector.missing(empty_spark / "jars") == []


def test_a_jar_with_other_bytes_is_refused(jars: Path, empty_spark: Path) -> None:
    (jars / "delta-storage-4.4.0.jar").write_bytes(b"not the one that was tried")
    with pytest.raises(connector.ConnectorMissing, match=r"delta-storage-4\.4\.0\.jar \(SHA-256 c46735481fa8e326"):
        connector.install(jars=str(jars))


def test_without_a_network_it_says_what_it_looked_for_and_how_to_name_a_mirror(tmp_path: Path) -> None:
    """The real resolver, behind a proxy that is not there, into a Spark that lacks the connector."""
    home = tmp_path / "spark"
    home.mkdir()
    for entry in connector.spark_home().iterdir():
        if entry.name != "jars":
            (home / entry.name).symlink_to(entry)
    (home / "jars").mkdir()
    for jar in (connector.spark_home() / "jars").iterdir():
        if jar.name not in connector.JARS:
            (home / "jars" / jar.name).symlink_to(jar)
    program = (
        f"import pathlib; from jobs import connector; connector.spark_home = lambda: pathlib.Path({str(home)!r}); "
    )
    nowhere = "-Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort=9 -Dhttp.proxyHost=127.0.0.1 -Dhttp.proxyPort=9"
    # An empty home: a resolver's cache in the real one would do without a network.
    env = {**os.environ, "JAVA_TOOL_OPTIONS": f"{nowhere} -Duser.home={tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", program + "import sys; sys.argv = ['connector']; sys.exit(connector.main())"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    for part in ("io.delta:delta-spark_4.2_2.13:4.4.0", "make setup MAVEN_MIRROR=", "make setup JARS="):
        assert part in last
