"""A consumer of the published tables: it runs when all three have been published, and reads them as a ranker would.

What it reads is named by the asset events (their `extra`: date and lake), never by Airflow's run ids: a run that an asset
triggers has no logical date, and after a backfill one run may stand for several nights. Reading changes nothing, so
running again does no harm. By hand: `airflow dags test ranker --conf '{"date": "2017-11-01"}'`.
"""

from __future__ import annotations

from typing import Any

import cold_refresh_commands as commands
from airflow.sdk import Param, dag, task
from airflow.sdk.exceptions import AirflowFailException


@dag(
    schedule=list(commands.OUTPUTS.values()),
    default_args={**commands.tasks(retries=1, minutes=1, hours=1), "pool": "default_pool"},
    params={
        "date": commands.date_param("read the night of this refresh date (YYYY-MM-DD)"),
        "lake": Param(None, type=["null", "string"], description="of this lake; COLD_REFRESH_LAKE by default"),
    },
    **commands.common(__doc__),
)
def ranker() -> None:
    @task
    def nights(params: Any = None, triggering_asset_events: Any = None) -> list[list[str]]:
        """The (lake, date) pairs to read, each once, oldest first."""
        if params["date"]:
            return [[params["lake"] or commands.lake(), params["date"]]]
        extras = [event.extra for events in (triggering_asset_events or {}).values() for event in events]
        # An event that a person made by hand in the UI may lack them: it names no night.
        found = sorted({(e["date"], e["lake"]) for e in extras if "date" in e and "lake" in e})
        if not found:
            raise AirflowFailException("no asset event names a date and a lake: trigger with the parameter date")
        return [[lake, day] for day, lake in found]

    @task.bash(do_xcom_push=False)
    def read(night: list[str]) -> str:
        lake, day = night
        return commands.python("-m", "jobs.published", "--lake", lake, "--date", commands.checked_date(day))

    read.expand(night=nights())


ranker()
