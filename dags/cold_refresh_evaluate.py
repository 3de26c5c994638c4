"""Daily: measure the night whose users have had their time, and make its page anew (jobs/evaluate.py, jobs/report.py).

On the night itself what users do next is still to come. The run of the interval that ends on day D measures the date
`evaluate.horizon_days` before D, if one was published then, and dates before it that have no figures yet: those of the week before,
whose staged snapshots have been kept for that, and some older ones whose snapshots are still there. By hand, as of a day:

    airflow dags test cold_refresh_evaluate --conf '{"due": "2017-12-31"}'
"""

from __future__ import annotations

import json
from typing import Any

import cold_refresh_commands as commands
from airflow.sdk import CronDataIntervalTimetable, dag, task
from airflow.sdk.exceptions import AirflowSkipException


@dag(
    schedule=CronDataIntervalTimetable("0 6 * * *", timezone="UTC"),
    default_args=commands.tasks(retries=1, minutes=15, hours=2),
    params={"due": commands.date_param("the day (YYYY-MM-DD) on which a date is due, and not the interval's end")},
    **commands.common(__doc__),
)
def cold_refresh_evaluate() -> None:
    @task.bash(skip_on_exit_code=commands.FINAL)
    def evaluate(params: Any = None, data_interval_start: Any = None) -> str:
        day = commands.run_date(params, data_interval_start, days=1, name="due")
        return commands.job("evaluate", "--due", day)

    @task.bash(do_xcom_push=False, skip_on_exit_code=commands.FINAL)
    def report(summary: str) -> str:
        found = json.loads(summary)
        if not found["measured"]:
            raise AirflowSkipException(found["note"])
        pages = [commands.job("report", "--run-date", commands.checked_date(one)) for one in found["measured"]]
        return " && ".join(f"( {page} )" for page in pages)

    report(evaluate())


cold_refresh_evaluate()
