"""Weekly: a new embedding space and FilterLLM model, trained off the nightly run's path. It publishes nothing.

It runs on Saturdays at noon with that Saturday as --run-date, on what was known at midnight; the next night finds its
space and model and uses them. The nightly run trains by itself only when this one did not come: `retrain_days`
(jobs/settings.py) is a day more than a week.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import cold_refresh_commands as commands
from airflow.sdk import CronDataIntervalTimetable, chain, dag, task

STAGES = ("snapshot", "text_embeddings", "cf", "filterllm_train")


@dag(
    schedule=CronDataIntervalTimetable("0 12 * * 6", timezone="UTC"),
    start_date=datetime(2017, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args={
        "retries": 2,
        "retry_delay": timedelta(minutes=15),
        "retry_exponential_backoff": True,
        "execution_timeout": timedelta(hours=12),
    },
    params={"run_date": commands.date_param("train for this --run-date (YYYY-MM-DD) and not the interval's")},
    tags=["cold-refresh"],
    doc_md=__doc__,
)
def cold_refresh_training() -> None:
    @task.bash(do_xcom_push=False)
    def stage(name: str, params: Any = None, data_interval_start: Any = None) -> str:
        return commands.stage(name, commands.run_date(params, data_interval_start, days=7), "--train")

    chain(*(stage.override(task_id=name)(name) for name in STAGES))


cold_refresh_training()
