"""Weekly: a new embedding space and FilterLLM model, trained off the nightly run's path. It publishes nothing.

It runs on Saturdays at noon with that Saturday as --run-date, on what was known at midnight; the next night finds its
space and model and uses them. The nightly run trains by itself only when this one did not come: `retrain_days`
(jobs/settings.py) is two days more than a week.

Triggered by hand it trains for last Saturday again, which nights that have a younger space or model do not take up. So that
the next night does, name tomorrow's date or today's:

    airflow dags trigger cold_refresh_training --conf '{"run_date": "2026-01-07"}'
"""

from __future__ import annotations

from typing import Any

import cold_refresh_commands as commands
from airflow.sdk import CronDataIntervalTimetable, chain, dag, task

STAGES = ("snapshot", "text_embeddings", "cf", "filterllm_train")


@dag(
    schedule=CronDataIntervalTimetable("0 12 * * 6", timezone="UTC"),
    default_args=commands.tasks(retries=2, minutes=15, hours=12),
    params={"run_date": commands.date_param("train for this --run-date (YYYY-MM-DD) and not the interval's")},
    **commands.common(__doc__),
)
def cold_refresh_training() -> None:
    @task.bash(do_xcom_push=False, skip_on_exit_code=commands.FINAL)
    def stage(name: str, params: Any = None, data_interval_start: Any = None) -> str:
        return commands.stage(name, commands.run_date(params, data_interval_start, days=7), "--train")

    chain(*(stage.override(task_id=name)(name) for name in STAGES))


cold_refresh_training()
