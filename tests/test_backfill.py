"""The backfill without Ray, and as a real Ray job on a head node of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.backfill import dates
from jobs.lake import Lake
from jobs.run import OUTPUTS, STAGES
from jobs.settings import SettingsError
from tests import nights
from tests.small_lake import SmallLake

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def _environment() -> dict[str, str]:
    # Of other tests' clusters nothing is inherited; a job's `python` is found on the head node's PATH.
    kept = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS" and not k.startswith("RAY_JOB")}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}


@dataclass(frozen=True)
class Head:
    """A head node; `dashboard` is its URL."""

    dashboard: str

    def submit(self, first: date, last: date, conf: Path, *more: str) -> subprocess.CompletedProcess[str]:
        """Submit the backfill as a user would, and wait for it; the job's log is in stdout."""
        job = ["python", "-m", "jobs.backfill", "--from", f"{first}", "--to", f"{last}", "--conf", f"{conf}", *more]
        command = [str(BIN / "ray"), "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--", *job]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )

    def states(self) -> dict[str, str]:
        """Name of a date's task -> its state, of the latest job that ran it, as the dashboard shows it."""
        with urllib.request.urlopen(f"{self.dashboard}/api/v0/tasks", timeout=30) as answer:
            rows = json.load(answer)["data"]["result"]["result"]
        rows.sort(key=lambda row: row["job_id"])
        return {row["name"]: row["state"] for row in rows if row["name"].startswith("cold_refresh")}


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head node on free ports in a folder of its own. Only its processes are ended: others may run Ray here too."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets lie in it, and their paths have a limit
    gcs, dashboard, agent, client, metrics = _free_ports(5)
    options = {
        "--port": gcs,
        "--dashboard-port": dashboard,
        "--dashboard-agent-listen-port": agent,
        "--ray-client-server-port": client,
        "--metrics-export-port": metrics,
        "--min-worker-port": 0,
        "--max-worker-port": 0,
        "--num-cpus": 2,
        "--object-store-memory": 200_000_000,
        "--temp-dir": folder,
        "--dashboard-host": "127.0.0.1",
        "--node-ip-address": "127.0.0.1",
    }
    words = [f"{name}={value}" for name, value in options.items()]
    with open(f"{folder}/head.log", "w") as log:
        process = subprocess.Popen(
            [str(BIN / "ray"), "start", "--head", "--block", *words],
            env=_environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{dashboard}"
        _await_dashboard(url, process, Path(log.name))
        yield Head(url)
    finally:
        ours = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        _, alive = psutil.wait_procs([psutil.Process(process.pid), *ours] if ours else [], timeout=20)
        for one in alive:
            one.kill()
        process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def _await_dashboard(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the head node did not start:\n{log.read_text()[-4000:]}")


def _summary(ended: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    lines = [line for line in ended.stdout.splitlines() if line.startswith('{"published"')]
    assert lines, ended.stdout[-8000:]
    return json.loads(lines[-1])


def test_dates_are_inclusive_and_in_order() -> None:
    assert dates(date(2024, 2, 28), date(2024, 3, 1)) == [date(2024, 2, 28), date(2024, 2, 29), date(2024, 3, 1)]
    with pytest.raises(SettingsError, match="--from 2024-03-01 is after --to 2024-02-28"):
        dates(date(2024, 3, 1), date(2024, 2, 28))


def _alone(conf: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.backfill", "--from", "2026-03-01", "--to", "2026-03-02", "--conf", str(conf)]
    return subprocess.run([*command, *more], cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=300)


def test_failed_dates_are_named_and_the_later_ones_tried(tmp_path: Path) -> None:
    """A lake without tables: every date fails, with the message of its own refresh."""
    conf = tmp_path / "empty.yaml"
    conf.write_text(f"lake: {tmp_path}/lake\n")
    ended = _alone(conf)
    assert ended.returncode == 1
    assert "[backfill] 2026-03-01 (1 of 2): started" in ended.stderr
    assert "[backfill] 2026-03-01 (1 of 2): failed: exit status 1: no Delta table 'interactions'" in ended.stderr
    assert "error: 2 of 2 dates failed: 2026-03-01, 2026-03-02" in ended.stderr
    summary = json.loads(ended.stdout.splitlines()[-1])
    assert (summary["failed"], summary["published"]) == (["2026-03-01", "2026-03-02"], [])

    stopped = _alone(conf, "--stop-on-failure")
    assert stopped.returncode == 1
    summary = json.loads(stopped.stdout.splitlines()[-1])
    assert (summary["failed"], summary["not_run"]) == (["2026-03-01"], ["2026-03-02"])


def test_a_ray_job_that_fails_names_the_date_in_its_log_and_on_the_dashboard(head: Head, tmp_path: Path) -> None:
    conf = tmp_path / "empty.yaml"
    conf.write_text(f"lake: {tmp_path}/lake\n")
    day = date(2026, 1, 5)
    ended = head.submit(day, day, conf)
    assert ended.returncode == 1, ended.stdout[-8000:]
    assert "[backfill] 2026-01-05 (1 of 1): failed: exit status 1: no Delta table 'interactions'" in ended.stdout
    assert "error: 1 of 1 dates failed: 2026-01-05" in ended.stdout
    assert head.states()["cold_refresh 2026-01-05"] == "FAILED"


def test_a_ray_job_runs_in_a_copy_so_the_lake_is_named_in_full(head: Head, tmp_path: Path) -> None:
    conf = tmp_path / "relative.yaml"
    conf.write_text("lake: ./lake\n")
    ended = head.submit(date(2026, 1, 6), date(2026, 1, 6), conf)
    assert ended.returncode == 1
    assert "error: the lake './lake' is relative, and a Ray job runs in a copy of its folder" in ended.stdout


@pytest.mark.timeout(1200)
def test_a_ray_job_publishes_every_date_once(
    head: Head, small_lake: SmallLake, undisturbed: tuple[SmallLake, Any]
) -> None:
    """Two nights on two CPUs: the dates' own tasks take none of them, so the workers of the refresh have room."""
    first, last = small_lake.run_date, small_lake.run_date + timedelta(days=1)
    ended = head.submit(first, first, small_lake.conf)
    assert ended.returncode == 0, ended.stdout[-8000:]
    assert _summary(ended)["published"] == [f"{first}"]
    assert head.states()[f"cold_refresh {first}"] == "FINISHED"
    nights.assert_same_tables(small_lake.lake, undisturbed[0].lake, first)  # as spark-submit leaves them
    lake = Lake(str(small_lake.lake))
    before = {table: lake.version(table) for table in OUTPUTS}

    both = head.submit(first, last, small_lake.conf)
    assert both.returncode == 0, both.stdout[-8000:]
    summary = _summary(both)
    assert (summary["skipped"], summary["published"]) == ([f"{first}"], [f"{last}"])
    assert f"[backfill] {last} (2 of 2): published" in both.stdout
    for day in (first, last):
        runs = lake.read("runs", refresh_date=day).to_pylist()
        assert sorted(row["stage"] for row in runs) == sorted(["open", *STAGES])
    assert {table: lake.version(table) for table in OUTPUTS} == {table: n + 1 for table, n in before.items()}
