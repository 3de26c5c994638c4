"""The driver's Spark session: who says what it is like, and what it cannot read."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from jobs import inputs
from jobs.lake import LakeError
from jobs.settings import Spark
from jobs.spark_session import session
from tests import nights, staged_night

_SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from jobs.settings import Spark
from jobs.spark_session import session
conf = {"spark.sql.shuffle.partitions": "5", "spark.default.parallelism": "4", "spark.driver.memory": "2g"}
spark = session(Spark(master=sys.argv[2] or None, conf=conf))
names = ["spark.master", *conf, "spark.driver.host", "spark.ui.enabled"]
zone = {"zone": spark.conf.get("spark.sql.session.timeZone")}
print(json.dumps({name: spark.sparkContext.getConf().get(name) for name in names} | zone))
"""


def submitted(folder: Path, master: str, *options: str) -> tuple[dict[str, str], str]:
    """What a session's conf is under spark-submit with `options`, where our settings ask for `master`; all that was said."""
    script = folder / "job.py"
    script.write_text(_SCRIPT)
    command = [str(nights.SPARK_SUBMIT), *options, str(script), str(nights.REPOSITORY), master]
    done = subprocess.run(command, capture_output=True, text=True, env=nights.environment(), timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def test_what_spark_submit_is_told_wins_over_the_settings(tmp_path: Path) -> None:
    told = ["--conf", "spark.sql.shuffle.partitions=3", "--conf", "spark.sql.session.timeZone=Europe/Berlin"]
    found, said = submitted(tmp_path, "local[2]", "--master", "local[1]", *told)
    assert found == {
        "spark.master": "local[1]",
        "spark.sql.shuffle.partitions": "3",
        "spark.default.parallelism": "4",
        "spark.driver.memory": "3g",  # Java runs already; this is what our spark-submit gives it
        "spark.driver.host": "127.0.0.1",
        "spark.ui.enabled": "false",  # it would answer the whole network
        "zone": "UTC",  # which decides what a run date knows
    }
    assert "without spark.driver.memory of spark.conf" in said


def test_settings_win_where_spark_submit_is_told_nothing(tmp_path: Path) -> None:
    found, _ = submitted(tmp_path, "local[2]", "--driver-memory", "2g")
    assert (found["spark.master"], found["spark.sql.shuffle.partitions"]) == ("local[2]", "5")
    assert found["spark.driver.memory"] == "2g"


def test_a_session_that_is_there_already_knows_no_zone_but_utc(spark: Any) -> None:
    spark.conf.set("spark.sql.session.timeZone", "America/New_York")
    assert session(Spark()).conf.get("spark.sql.session.timeZone") == "UTC"


def test_a_store_that_spark_has_no_client_for_is_one_clear_message(spark: Any, tmp_path: Path) -> None:
    run = staged_night.run_of(tmp_path, date(2026, 3, 1))
    run = replace(run, settings=run.settings.model_copy(update={"lake": "s3://shop/lake"}))
    with pytest.raises(LakeError, match=r"no client for s3a://shop/lake/items.*hadoop-aws:3\.5\.0"):
        inputs.items(spark, run)
