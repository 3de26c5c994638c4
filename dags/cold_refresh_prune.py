"""Weekly: remove trained parts, cached rows and staged files that no night will read again (jobs/prune.py says which).

It runs on Sundays at noon, a day after the training. The files of deleted cache rows go when the tables are vacuumed, and old
dates of the output tables are their owner's. By hand, for what was trained in the last 30 days before the newest published night:

    airflow dags test cold_refresh_prune --conf '{"keep_days": 30}'
"""

from __future__ import annotations

from typing import Any

import cold_refresh_commands as commands
from airflow.sdk import CronDataIntervalTimetable, Param, dag, task


@dag(
    schedule=CronDataIntervalTimetable("0 12 * * 0", timezone="UTC"),
    default_args=commands.tasks(retries=1, minutes=15, hours=2),
    params={
        "keep_days": Param(70, type="integer", minimum=1, description="days before the newest published night"),
        "lake": Param(None, type=["null", "string"], description="of this lake; COLD_REFRESH_LAKE by default"),
    },
    **commands.common(__doc__),
)
def cold_refresh_prune() -> None:
    @task.bash(do_xcom_push=False, skip_on_exit_code=commands.FINAL)
    def prune(params: Any = None) -> str:
        lake = params["lake"] or commands.lake()
        return commands.python("-m", "jobs.prune", "--lake", lake, "--keep-days", str(params["keep_days"]))

    prune()


cold_refresh_prune()
