"""What the DAGs share: the command line of a job, the run date, and the assets that stand for the published tables.

The jobs run as commands, so Airflow may live in an environment without Spark, Ray and torch. Where they are is read from
the environment of the workers when a task runs:

- COLD_REFRESH_HOME: the project's folder; the one above this file by default.
- COLD_REFRESH_PYTHON: the jobs' Python; `.venv/bin/python` of that folder by default.
- COLD_REFRESH_SPARK_SUBMIT: when set, stages, evaluation and report are started by it, such as
  `/opt/spark/bin/spark-submit --master yarn`.
- COLD_REFRESH_CONF: the settings file; `conf/demo.yaml` by default.
- COLD_REFRESH_SET: overrides of settings, separated by spaces, such as `ray.actors=4 sampling.k=50`.
- COLD_REFRESH_LAKE: the lake, in place of the one that the settings file names. The assets' URIs are made of it (of the
  folder `lake` by default), when the DAGs are parsed: set it for the DAG processor and the workers alike.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import Asset, Param
from airflow.sdk.exceptions import AirflowFailException

DATE_PATTERN = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"


def home() -> Path:
    """The project's folder, where every job is started."""
    return Path(os.environ.get("COLD_REFRESH_HOME") or Path(__file__).resolve().parent.parent)


def lake() -> str:
    """The lake that the environment names, or the default settings' one."""
    return os.environ.get("COLD_REFRESH_LAKE") or str(home() / "lake")


def _asset(table: str) -> Asset:
    root = lake().rstrip("/")
    root = root if "://" in root else (home() / root).as_uri()
    # Its name is its URI: two assets of one name (another lake's) would keep each other from being active.
    return Asset(uri=f"{root}/{table}", group="cold_refresh")


OUTPUTS = {table: _asset(table) for table in ("sampled_interactions", "item_embeddings", "user_embeddings")}


def date_param(what: str) -> Param:
    """A parameter for a run by hand; it has no default, so that scheduled runs go by their interval."""
    return Param(None, type=["null", "string"], pattern=DATE_PATTERN, description=what)


def checked_date(text: str) -> str:
    """`text` if it is a date (YYYY-MM-DD).

    Raises:
        AirflowFailException: it is none; trying again would not help.
    """
    try:
        return datetime.strptime(text, "%Y-%m-%d").date().isoformat()
    except (TypeError, ValueError):
        raise AirflowFailException(f"{text!r} is no date; expected YYYY-MM-DD, such as 2026-01-31") from None


def run_date(params: Mapping[str, Any], data_interval_start: datetime | None, days: int) -> str:
    """The --run-date of a DAG run: its parameter `run_date`, or the day on which its interval of `days` days ends.

    A refresh with the run date D knows what happened before the midnight at which D begins, so the interval [D - 1, D)
    belongs to D. Only `data_interval_start` is read: a backfill and a late run get the same date.

    Raises:
        AirflowFailException: the run has neither (it was triggered without a logical date), or the parameter is no date.
    """
    if params.get("run_date"):
        return checked_date(params["run_date"])
    if data_interval_start is None:
        raise AirflowFailException("this run has no data interval: trigger it with the parameter run_date")
    day: date = data_interval_start.astimezone(UTC).date()
    return (day + timedelta(days=days)).isoformat()


def _shell(words: Sequence[str]) -> str:
    """The shell command that runs `words`, each quoted, in the project's folder; the last line of stdout comes last of all."""
    # @task.bash renders what it is given as a template: a name from outside must not be one.
    for word in words:
        if "{{" in word or "{%" in word or "{#" in word:
            raise AirflowFailException(f"{word!r} holds template marks")
    # Airflow takes stdout and stderr as one stream and the last line as the result, and spark-submit logs to the very end. What
    # it writes to stdout, an error's message among it, is shown as it comes.
    shown = f"{shlex.join(words)} | tee /dev/stderr | tail -n 1"
    return f"set -o pipefail; cd {shlex.quote(str(home()))} && out=$({shown}) && printf '%s\\n' \"$out\""


def python(*words: str) -> str:
    """The shell command that starts the jobs' Python with `words`."""
    return _shell([os.environ.get("COLD_REFRESH_PYTHON") or str(home() / ".venv/bin/python"), *words])


def job(name: str, *flags: str) -> str:
    """The shell command that runs the job `name` (a module of jobs/) with the settings that the environment names."""
    words = ["--conf", os.environ.get("COLD_REFRESH_CONF") or "conf/demo.yaml", *flags]
    overrides = shlex.split(os.environ.get("COLD_REFRESH_SET") or "")
    if os.environ.get("COLD_REFRESH_LAKE"):
        overrides.append(f"lake={lake()}")
    for override in overrides:
        words += ["--set", override]
    if submit := os.environ.get("COLD_REFRESH_SPARK_SUBMIT"):
        return _shell([*shlex.split(submit), f"jobs/{name}.py", *words])
    return python("-m", f"jobs.{name}", *words)


def stage(name: str, day: str, *flags: str) -> str:
    """The shell command that runs one stage of the run of `day`."""
    return job("cold_refresh", "--run-date", day, *flags, "--stage", name)


def describe_publication(context: Mapping[str, Any], result: str) -> None:
    """Say in the asset events what was published: the table and its version, the date, the run and the lake.

    `result` is the last line of the publishing stage's stdout. Consumers go by this and not by Airflow's run ids.
    """
    summary = json.loads(result)
    for table, asset in OUTPUTS.items():
        context["outlet_events"][asset].extra = {
            "table": table,
            "version": summary["output_versions"][table],
            "date": summary["run_date"],
            "run_id": summary["run_id"],
            "lake": summary["lake"],
        }
