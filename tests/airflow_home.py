"""A throwaway AIRFLOW_HOME over this project's DAGs.

Never a home that is kept: asset events of a test run would reach real consumers later.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
AIRFLOW = str(Path(sys.executable).with_name("airflow"))


@dataclass(frozen=True)
class AirflowHome:
    """A migrated home in `folder`; `environment` is what its processes get."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `command` in the home's environment, with `environment` added; stdout and stderr are kept together."""
        with subprocess.Popen(
            command,
            env={**self.environment, **environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                said, _ = process.communicate(timeout=timeout)
            except BaseException:
                # A task's command has a session of its own: it would outlive the task.
                for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                    child.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, said)

    def airflow(self, *arguments: str, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(AIRFLOW, *arguments, timeout=timeout, **environment)


def make(folder: Path) -> AirflowHome:
    """A new home in `folder` with a migrated SQLite database."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "COLD_REFRESH_"))}
    environment = {
        **kept,
        "AIRFLOW_HOME": str(folder),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{folder}/airflow.db?timeout=60",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(folder / "logs"),
        "PYTHONPATH": "",
    }
    home = AirflowHome(folder, environment)
    migrated = home.airflow("db", "migrate")
    if migrated.returncode:
        raise RuntimeError(f"airflow db migrate failed:\n{migrated.stdout[-4000:]}")
    return home
