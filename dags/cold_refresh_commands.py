"""What the DAGs share: how their tasks are run, the command line of a job, the run date, and the assets of the published tables.

The jobs run as commands, so Airflow may live in an environment without Spark, Ray and torch. Where they are is read from
the environment of the workers when a task runs:

- COLD_REFRESH_HOME: the project's folder; the one above this file by default.
- COLD_REFRESH_PYTHON: the jobs' Python; `.venv/bin/python` of that folder by default.
- COLD_REFRESH_SPARK_SUBMIT: when set, stages, evaluation and report are started by it, such as
  `/opt/spark/bin/spark-submit --master yarn`, with the jobs' Python unless PYSPARK_PYTHON names another.
- COLD_REFRESH_CONF: the settings file; `conf/demo.yaml` by default. One of your own wants COLD_REFRESH_LAKE, too.
- COLD_REFRESH_SET: overrides of settings, separated by spaces, such as `ray.actors=4 sampling.k=50`.

And when the DAGs are parsed, so set these for the DAG processor and the workers alike:

- COLD_REFRESH_LAKE: the lake, in place of the one that the settings file names; the assets' URIs are made of it (of the folder
  `lake` by default).
- COLD_REFRESH_CRON: when the night runs (UTC), such as `30 4 * * *` where yesterday's events have come by then only; midnight by
  default. Once a day: the run date is the day on which the interval ends, at any hour.
- COLD_REFRESH_POOL: the pool of all tasks but the ranker's. With one slot nothing of this runs at the same time, which one
  machine without a cluster of Ray and Spark needs: a backfill's runs do not count among a DAG's max_active_runs.
- COLD_REFRESH_HOURS: how long a task may take, in place of each DAG's own limit.
- COLD_REFRESH_ON_FAILURE: `module:function`, called as Airflow calls an on_failure_callback when a run has failed.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

from airflow.sdk import Asset, Param
from airflow.sdk.exceptions import AirflowFailException

DATE_PATTERN = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"


# Exit status of a job that refuses its settings, its input tables or what a gate found: of jobs/cli.py.
REFUSED = 3


class _Final:
    """The exit statuses after which a task is not tried again: for BashOperator's skip_on_exit_code, which asks whether a status
    is among them, and would skip the task."""

    def __contains__(self, status: object) -> bool:
        if status == REFUSED:
            raise AirflowFailException(
                "the job refuses what it was given (the log says what): to try again would not help"
            )
        return False


FINAL = _Final()


def on_failure() -> Callable[[Any], None] | None:
    """What COLD_REFRESH_ON_FAILURE names."""
    module, _, function = (os.environ.get("COLD_REFRESH_ON_FAILURE") or "").partition(":")
    return getattr(import_module(module), function) if module else None


def common(doc: str | None) -> dict[str, Any]:
    """What all DAGs have in common."""
    return {
        "start_date": datetime(2017, 1, 1, tzinfo=UTC),
        "catchup": False,
        "max_active_runs": 1,  # nights build on each other: the space, the text cache, yesterday's vectors
        "on_failure_callback": on_failure(),
        "tags": ["cold-refresh"],
        "doc_md": doc,
    }


def limit(hours: float) -> timedelta:
    """How long a task may take, which is `hours` long at most unless the environment says otherwise."""
    return timedelta(hours=float(os.environ.get("COLD_REFRESH_HOURS") or hours))


def tasks(retries: int, minutes: int, hours: float) -> dict[str, Any]:
    """default_args: how often a task is tried again, and after how long; how long it may take."""
    return {
        "retries": retries,
        "retry_delay": timedelta(minutes=minutes),
        "retry_exponential_backoff": True,
        "execution_timeout": limit(hours),
        "pool": os.environ.get("COLD_REFRESH_POOL") or "default_pool",
    }


def home() -> Path:
    """The project's folder, where every job is started."""
    return Path(os.environ.get("COLD_REFRESH_HOME") or Path(__file__).resolve().parent.parent)


def lake() -> str:
    """The lake that the environment names, or the default settings' one.

    Raises:
        ValueError: other settings are named, and no lake.
    """
    if os.environ.get("COLD_REFRESH_CONF") and not os.environ.get("COLD_REFRESH_LAKE"):
        raise ValueError(
            "COLD_REFRESH_CONF is set: set COLD_REFRESH_LAKE to its lake, which the assets are of and is pruned"
        )
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


def run_date(params: Mapping[str, Any], data_interval_start: datetime | None, days: int, name: str = "run_date") -> str:
    """The --run-date of a DAG run: its parameter `name`, or the day on which its interval of `days` days ends.

    A refresh with the run date D knows what happened before the midnight at which D begins, so the interval [D - 1, D)
    belongs to D. Only `data_interval_start` is read: a backfill and a late run get the same date.

    Raises:
        AirflowFailException: the run has neither (it was triggered without a logical date), or the parameter is no date.
    """
    if params.get(name):
        return checked_date(params[name])
    if data_interval_start is None:
        raise AirflowFailException(f"this run has no data interval: trigger it with the parameter {name}")
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


def _python() -> str:
    return os.environ.get("COLD_REFRESH_PYTHON") or str(home() / ".venv/bin/python")


def python(*words: str) -> str:
    """The shell command that starts the jobs' Python with `words`."""
    return _shell([_python(), *words])


def job(name: str, *flags: str) -> str:
    """The shell command that runs the job `name` (a module of jobs/) with the settings that the environment names."""
    words = ["--conf", os.environ.get("COLD_REFRESH_CONF") or "conf/demo.yaml", *flags]
    overrides = shlex.split(os.environ.get("COLD_REFRESH_SET") or "")
    if os.environ.get("COLD_REFRESH_LAKE"):
        overrides.append(f"lake={lake()}")
    for override in overrides:
        words += ["--set", override]
    if submit := os.environ.get("COLD_REFRESH_SPARK_SUBMIT"):
        # A spark-submit that is not of the jobs' environment takes the first python3 that it finds.
        interpreter = os.environ.get("PYSPARK_PYTHON") or _python()
        return _shell(["env", f"PYSPARK_PYTHON={interpreter}", *shlex.split(submit), f"jobs/{name}.py", *words])
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
