"""Running whole nights in processes of their own, and comparing the tables that they leave.

spark-submit hands on both streams of the Python that it runs as its own stdout; the summary stays the last line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.lake import Lake
from jobs.run import OUTPUTS

REPOSITORY = Path(__file__).parents[1]
SPARK_SUBMIT = Path(sys.executable).parent / "spark-submit"


def command(conf: Path, run_date: object, *more: str) -> list[str]:
    """The command that a person types: no variable, no activated environment."""
    return [str(SPARK_SUBMIT), "jobs/cold_refresh.py", "--conf", str(conf), "--run-date", str(run_date), *more]


def environment() -> dict[str, str]:
    """This process's environment without what activating a virtual environment would add."""
    kept = {
        k: v for k, v in os.environ.items() if k not in ("SPARK_HOME", "PYSPARK_PYTHON", "VIRTUAL_ENV", "PYTHONPATH")
    }
    venv = str(Path(sys.executable).parent)
    return {**kept, "PATH": os.pathsep.join(p for p in kept["PATH"].split(os.pathsep) if p != venv)}


def night(conf: Path, run_date: object, *more: str) -> dict[str, Any]:
    """Run a night to its end; the summary, the last line of stdout."""
    done = run(conf, run_date, *more)
    assert done.returncode == 0, done.stdout[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def run(conf: Path, run_date: object, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a night, whatever its exit status; all that it said is in stdout."""
    line = command(conf, run_date, *more)
    said: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(line, cwd=REPOSITORY, env=environment(), timeout=500, **said)


def kill_at(conf: Path, run_date: object, stage: str, delay: float) -> None:
    """Run a night and kill it, with everything it started, `delay` seconds after `stage` began.

    Without spark-submit, so that Java starts only where a stage needs Spark.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cold_refresh", "--conf", str(conf), "--run-date", str(run_date)],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(f"[{stage}] started"):
            break
    else:
        raise AssertionError(f"{stage} never started:\n{''.join(seen[-40:])}")
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait()


def tables(lake: Path | str, run_date: date) -> dict[str, pa.Table]:
    """The output tables of a night, in the order of their keys."""
    found = {}
    for name in (*OUTPUTS, "rejected_rows", "metrics"):
        read = Lake(str(lake)).read(name, refresh_date=run_date)
        found[name] = read.sort_by([(c, "ascending") for c in read.column_names if not pa.types.is_list(read[c].type)])
    return found


def assert_same_tables(one: Path | str, two: Path | str, run_date: date) -> None:
    """Both lakes hold the same output tables of a night: numbers within 1e-5, everything else to the last character."""
    left, right = tables(one, run_date), tables(two, run_date)
    for name, table in left.items():
        other = right[name]
        assert table.num_rows == other.num_rows > 0 or name == "rejected_rows", name
        for column in table.column_names:
            a, b = table[column].combine_chunks(), other[column].combine_chunks()
            if pa.types.is_list(a.type):
                np.testing.assert_allclose(a.flatten(), b.flatten(), atol=1e-5, err_msg=f"{name}.{column}")
            elif pa.types.is_floating(a.type):
                np.testing.assert_allclose(a.to_numpy(False), b.to_numpy(False), atol=1e-5, err_msg=f"{name}.{column}")
            else:
                assert a.equals(b), f"{name}.{column}"
