"""The nightly cold refresh: the stages of jobs/cold_refresh.py as tasks, one after the other.

The run of the interval [D - 1, D) refreshes with --run-date D. A stage that is complete is skipped when it is tried again,
and one that was killed goes on where it was, so retries cost only what was lost. By hand, for any date:

    airflow dags test cold_refresh_nightly --conf '{"run_date": "2017-11-01"}'

and for past nights, whose dates name the intervals' first days (here the run dates 2017-11-01 to 2017-11-07):

    airflow backfill create --dag-id cold_refresh_nightly --from-date 2017-10-31 --to-date 2017-11-06 \\
        --max-active-runs 1 --reprocess-behavior completed

Where the jobs are and what they read is set as dags/cold_refresh_commands.py says.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import cold_refresh_commands as commands
from airflow.sdk import CronDataIntervalTimetable, chain, dag, task

STAGES = (
    "snapshot",
    "text_embeddings",
    "cf",
    "filterllm_train",
    "filterllm_score",
    "refresh",
    "gates",
    "publish",
    "evaluate",
    "report",
)


@dag(
    schedule=CronDataIntervalTimetable("0 0 * * *", timezone="UTC"),
    start_date=datetime(2017, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,  # nights build on each other: the space, the text cache, yesterday's vectors
    default_args={
        "retries": 2,
        "retry_delay": timedelta(minutes=5),
        "retry_exponential_backoff": True,
        "execution_timeout": timedelta(hours=4),
    },
    params={"run_date": commands.date_param("refresh with this --run-date (YYYY-MM-DD) and not the interval's")},
    tags=["cold-refresh"],
    doc_md=__doc__,
)
def cold_refresh_nightly() -> None:
    @task.bash(do_xcom_push=False)
    def stage(name: str, params: Any = None, data_interval_start: Any = None) -> str:
        return commands.stage(name, commands.run_date(params, data_interval_start, days=1))

    special: dict[str, dict[str, Any]] = {
        # The same staged rows fail the same gate again: a person must look.
        "gates": {"retries": 0},
        "publish": {"outlets": list(commands.OUTPUTS.values()), "post_execute": commands.describe_publication},
    }
    chain(*(stage.override(task_id=name, **special.get(name, {}))(name) for name in STAGES))


cold_refresh_nightly()
