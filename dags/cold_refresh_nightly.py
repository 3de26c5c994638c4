"""The nightly cold refresh: the stages of jobs/cold_refresh.py as tasks, one after the other.

The run of the interval [D - 1, D) refreshes with --run-date D. A stage that is complete is skipped when it is tried again,
and one that was killed goes on where it was, so retries cost only what was lost. By hand, for any date:

    airflow dags test cold_refresh_nightly --conf '{"run_date": "2017-11-01"}'

and for past nights, whose dates name the intervals' first days (here the run dates 2017-11-01 to 2017-11-07):

    airflow backfill create --dag-id cold_refresh_nightly --from-date 2017-10-31 --to-date 2017-11-06 \\
        --max-active-runs 1 --reprocess-behavior failed

which leaves nights alone that succeeded (`completed` refreshes these too, from the tables as they are now). A scheduler that was
down runs the newest missed night only, and those before it are filled in like this.

Where the jobs are and what they read is set as dags/cold_refresh_commands.py says.
"""

from __future__ import annotations

import os
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
# Where the weekly training did not come, what trains or encodes here takes as long as it does there.
LONG = ("text_embeddings", "cf", "filterllm_train")


@dag(
    schedule=CronDataIntervalTimetable(os.environ.get("COLD_REFRESH_CRON") or "0 0 * * *", timezone="UTC"),
    default_args=commands.tasks(retries=2, minutes=5, hours=4),
    params={"run_date": commands.date_param("refresh with this --run-date (YYYY-MM-DD) and not the interval's")},
    **commands.common(__doc__),
)
def cold_refresh_nightly() -> None:
    @task.bash(do_xcom_push=False, skip_on_exit_code=commands.FINAL)
    def stage(name: str, params: Any = None, data_interval_start: Any = None) -> str:
        return commands.stage(name, commands.run_date(params, data_interval_start, days=1))

    special: dict[str, dict[str, Any]] = {
        "publish": {"outlets": list(commands.OUTPUTS.values()), "post_execute": commands.describe_publication},
        **{name: {"execution_timeout": commands.limit(hours=12)} for name in LONG},
    }
    chain(*(stage.override(task_id=name, **special.get(name, {}))(name) for name in STAGES))


cold_refresh_nightly()
