"""The DAGs on a real Airflow: parsing, structure, dates, quoting, a failed gate, a backfill, and a whole night."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import cli
from jobs.lake import Lake
from jobs.run import OUTPUTS, STAGES, TRAINING_STAGES
from tests import airflow_home, nights
from tests.airflow_home import ROOT, AirflowHome
from tests.small_lake import SmallLake

_PARSE = """
import json, sys, time
from datetime import timedelta
sys.path.append(sys.argv[1])
from airflow.dag_processing.dagbag import DagBag
before, begun = set(sys.modules), time.perf_counter()
bag = DagBag(sys.argv[1])
seconds = time.perf_counter() - begun
import cold_refresh_commands as commands
def describe(dag):
    return {
        "tasks": [t.task_id for t in dag.topological_sort()],
        "retries": {t.task_id: t.retries for t in dag.tasks},
        "hours": {t.task_id: t.execution_timeout.total_seconds() / 3600 for t in dag.tasks},
        "pools": sorted({t.pool for t in dag.tasks}),
        "final": [t.task_id for t in dag.tasks if getattr(t, "skip_on_exit_code", None) is commands.FINAL],
        "on_failure": getattr(dag.on_failure_callback, "__name__", None),
        "eager": [t.task_id for t in dag.tasks if t.retries and t.retry_delay < timedelta(minutes=1)],
        "xcom": [t.task_id for t in dag.tasks if getattr(t, "do_xcom_push", False)],
        "outlets": {t.task_id: [a.uri for a in t.outlets] for t in dag.tasks if t.outlets},
        "max_active_runs": dag.max_active_runs,
        "catchup": dag.catchup,
        "schedule": (dag.timetable.expression, str(dag.timetable.timezone)) if dag.dag_id != "ranker" else None,
    }
found = {
    "errors": bag.import_errors,
    "refused": commands.REFUSED,
    "seconds": seconds,
    "engines": sorted({m.split(".")[0] for m in set(sys.modules) - before} & {"pyspark", "ray", "torch", "deltalake", "jobs"}),
    "dags": {name: describe(dag) for name, dag in bag.dags.items()},
    "consumed": [a.uri for a in bag.dags["ranker"].timetable.asset_condition.objects] if "ranker" in bag.dags else [],
}
print("\\n" + json.dumps(found))
"""

_DATES = """
import json, sys
from datetime import UTC, datetime, timedelta, timezone
sys.path.append(sys.argv[1])
import cold_refresh_commands as commands
def ask(params, start, days=1, **name):
    try:
        return commands.run_date(params, start, days, **name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
east = timezone(timedelta(hours=9))
print("\\n" + json.dumps([
    ask({"run_date": None}, datetime(2026, 2, 28, tzinfo=UTC)),
    ask({"run_date": None}, datetime(2026, 3, 1, 9, tzinfo=east)),
    ask({"run_date": None}, datetime(2026, 2, 21, 12, tzinfo=UTC), 7),
    ask({"run_date": "2017-11-01"}, datetime(2026, 2, 28, tzinfo=UTC)),
    ask({"run_date": None}, None),
    ask({"due": None}, None, name="due"),
    ask({"run_date": "2026-02-30"}, None),
    ask({"run_date": "2026-01-01; touch x"}, None),
]))
"""


_NIGHTS = """
import json, sys
from types import SimpleNamespace as Event
sys.path.append(sys.argv[1])
from airflow.dag_processing.dagbag import DagBag
nights = DagBag(sys.argv[1]).dags["ranker"].get_task("nights").python_callable
def ask(*extras, date=None):
    events = {"an asset": [Event(extra=extra) for extra in extras]}
    try:
        return nights(params={"date": date, "lake": None}, triggering_asset_events=events)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
one, two = ({"date": day, "lake": "s3://shop", "version": 3} for day in ("2026-03-02", "2026-03-01"))
print("\\n" + json.dumps([ask(one, two, one), ask(one, {}), ask({}), ask(), ask(one, date="2017-11-01")]))
"""

_COMMANDS = """
import json, sys
from datetime import UTC, datetime
sys.path.append(sys.argv[1])
from airflow.dag_processing.dagbag import DagBag
dags = DagBag(sys.argv[1]).dags
def ask(dag, task, start, *named, **params):
    return dags[dag].get_task(task).python_callable(*named, params=params, data_interval_start=start)
saturday, midnight, morning = (datetime(2026, 2, 21, hour, tzinfo=UTC) for hour in (12, 0, 6))
print("\\n" + json.dumps([
    ask("cold_refresh_training", "cf", saturday, "cf", run_date=None),
    ask("cold_refresh_training", "cf", saturday, "cf", run_date="2017-11-01"),
    ask("cold_refresh_nightly", "cf", midnight, "cf", run_date=None),
    ask("cold_refresh_evaluate", "evaluate", morning, due=None),
]))
"""


_LAKE = """
import json, sys
sys.path.append(sys.argv[1])
try:
    import cold_refresh_commands
except ValueError as error:
    print("\\n" + json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> AirflowHome:
    return airflow_home.make(tmp_path_factory.mktemp("airflow"))


@pytest.fixture(scope="module")
def parsed(home: AirflowHome) -> dict[str, Any]:
    return _last_json(home.run(sys.executable, "-c", _PARSE, str(ROOT / "dags"), COLD_REFRESH_LAKE="s3://shop/lake"))


def _last_json(ended: subprocess.CompletedProcess[str]) -> Any:
    assert ended.returncode == 0, ended.stdout[-4000:]
    return json.loads(ended.stdout.splitlines()[-1])


def _query(home: AirflowHome, sql: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(home.folder / "airflow.db", timeout=60) as database:
        return database.execute(sql).fetchall()


def _script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_dags_parse_fast_and_without_the_engines(parsed: dict[str, Any]) -> None:
    assert parsed["errors"] == {}
    ours = {f"cold_refresh_{name}" for name in ("nightly", "training", "evaluate", "prune")}
    assert set(parsed["dags"]) == {*ours, "ranker"}
    assert parsed["engines"] == []
    assert parsed["seconds"] < 10


def test_the_tasks_are_the_stages_in_order(parsed: dict[str, Any]) -> None:
    assert parsed["dags"]["cold_refresh_nightly"]["tasks"] == list(STAGES)
    assert parsed["dags"]["cold_refresh_training"]["tasks"] == list(TRAINING_STAGES)


def test_every_task_is_timed_and_retried_unless_the_job_refuses(parsed: dict[str, Any]) -> None:
    for name, dag in parsed["dags"].items():
        assert min(dag["hours"].values()) >= 1
        assert dag["eager"] == []
        assert dag["max_active_runs"] == 1
        assert dag["catchup"] is False
        assert min(dag["retries"].values()) >= 1
        assert dag["final"] == ([] if name == "ranker" else dag["tasks"])
        assert (dag["pools"], dag["on_failure"]) == (["default_pool"], None)
    night, training = (parsed["dags"][f"cold_refresh_{name}"] for name in ("nightly", "training"))
    assert night["xcom"] == []
    # What trains by night, where the training did not come, has the time that the training has.
    assert all(night["hours"][task] == training["hours"][task] for task in TRAINING_STAGES[1:])


def test_what_the_environment_says_of_schedule_pool_time_and_alarm_reaches_the_dags(home: AirflowHome) -> None:
    (home.folder / "alarms.py").write_text("def page(context):\n    pass\n")
    given = {
        "COLD_REFRESH_CRON": "30 4 * * *",
        "COLD_REFRESH_POOL": "one_at_a_time",
        "COLD_REFRESH_HOURS": "36",
        "COLD_REFRESH_ON_FAILURE": "alarms:page",
        "PYTHONPATH": str(home.folder),
    }
    found = _last_json(home.run(sys.executable, "-c", _PARSE, str(ROOT / "dags"), **given))
    assert found["errors"] == {}
    night = found["dags"]["cold_refresh_nightly"]
    assert night["schedule"] == ["30 4 * * *", "UTC"]
    for name, dag in found["dags"].items():
        assert set(dag["hours"].values()) == {36.0}
        assert dag["pools"] == ["default_pool" if name == "ranker" else "one_at_a_time"]
        assert dag["on_failure"] == "page"


def test_settings_of_ones_own_want_their_lake(home: AirflowHome) -> None:
    found = _last_json(home.run(sys.executable, "-c", _LAKE, str(ROOT / "dags"), COLD_REFRESH_CONF="mine.yaml"))
    assert "COLD_REFRESH_CONF is set: set COLD_REFRESH_LAKE to its lake" in found


def test_the_status_of_a_refusal_is_that_of_the_jobs(parsed: dict[str, Any]) -> None:
    assert parsed["refused"] == cli.REFUSED


def test_only_publishing_emits_the_assets_that_the_ranker_waits_for(parsed: dict[str, Any]) -> None:
    uris = [f"s3://shop/lake/{table}" for table in OUTPUTS]
    assert parsed["dags"]["cold_refresh_nightly"]["outlets"] == {"publish": uris}
    assert parsed["dags"]["cold_refresh_training"]["outlets"] == {}
    assert sorted(parsed["consumed"]) == sorted(uris)


def test_the_run_date_is_the_day_on_which_the_interval_ends(home: AirflowHome) -> None:
    found = _last_json(home.run(sys.executable, "-c", _DATES, str(ROOT / "dags")))
    assert found[:4] == ["2026-03-01", "2026-03-02", "2026-02-28", "2017-11-01"]
    nothing = "AirflowFailException: this run has no data interval: trigger it with the parameter"
    assert found[4:6] == [f"{nothing} run_date", f"{nothing} due"]
    assert all("is no date; expected YYYY-MM-DD" in error for error in found[6:])


def test_the_ranker_reads_each_night_that_the_events_name_once(home: AirflowHome) -> None:
    found = _last_json(home.run(sys.executable, "-c", _NIGHTS, str(ROOT / "dags"), COLD_REFRESH_LAKE="s3://mine"))
    assert found[0] == [["s3://shop", "2026-03-01"], ["s3://shop", "2026-03-02"]]
    assert found[1] == [["s3://shop", "2026-03-02"]]
    nothing = "AirflowFailException: no asset event names a date and a lake: trigger with the parameter date"
    assert found[2:4] == [nothing, nothing]
    assert found[4] == [["s3://mine", "2017-11-01"]]


def test_each_dag_runs_when_it_says(parsed: dict[str, Any]) -> None:
    when = {"nightly": "0 0 * * *", "training": "0 12 * * 6", "evaluate": "0 6 * * *", "prune": "0 12 * * 0"}
    found = {name: parsed["dags"][f"cold_refresh_{name}"]["schedule"] for name in when}
    assert found == {name: [expression, "UTC"] for name, expression in when.items()}


def test_a_run_is_of_the_day_on_which_its_interval_ends(home: AirflowHome) -> None:
    """The training's is a week: from one Saturday to the next."""
    settings = {"COLD_REFRESH_PYTHON": "echo", "COLD_REFRESH_HOME": str(home.folder)}
    found = _last_json(home.run(sys.executable, "-c", _COMMANDS, str(ROOT / "dags"), **settings))
    said = [subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True) for command in found]
    night = "-m jobs.cold_refresh --conf conf/demo.yaml --run-date"
    assert [one.stdout.strip() for one in said] == [
        f"{night} 2026-02-28 --train --stage cf",
        f"{night} 2017-11-01 --train --stage cf",
        f"{night} 2026-02-22 --stage cf",
        "-m jobs.evaluate --conf conf/demo.yaml --due 2026-02-22",
    ]


def test_overrides_reach_the_job_as_they_are(home: AirflowHome, tmp_path: Path) -> None:
    """The command is run by bash, as a task runs it, with `echo` for the jobs' Python."""
    prompt = "text.prompt=$(touch pwned) `touch pwned`; touch pwned 'a' \"b\""
    code = "import sys; sys.path.append(sys.argv[1]); import cold_refresh_commands as c; print('\\n' + c.stage('cf', '2026-03-01'))"
    settings = {
        "COLD_REFRESH_HOME": str(tmp_path),
        "COLD_REFRESH_PYTHON": "echo",
        "COLD_REFRESH_SET": shlex.join(["sampling.k=5", prompt]),
    }
    printed = home.run(sys.executable, "-c", code, str(ROOT / "dags"), **settings)
    assert printed.returncode == 0, printed.stdout
    said = subprocess.run(["bash", "-c", printed.stdout.splitlines()[-1]], capture_output=True, text=True, check=True)
    expected = f"--conf conf/demo.yaml --run-date 2026-03-01 --stage cf --set sampling.k=5 --set {prompt}"
    assert said.stdout.strip() == f"-m jobs.cold_refresh {expected}"
    assert list(tmp_path.iterdir()) == []


def test_the_result_is_the_last_line_and_what_was_said_is_shown(home: AirflowHome, tmp_path: Path) -> None:
    """As under spark-submit, which hands on stderr as stdout and logs to its own stderr to the very end."""
    script = _script(
        tmp_path / "spark-submit",
        'echo "error: $2"; echo \'{"a": 1}\'; echo late >&2; [[ "$*" != *"--stage gates"* ]]',
    )
    code = """
import sys
sys.path.append(sys.argv[1])
import cold_refresh_commands as commands
for name in ("cf", "gates", "{{ conf }}"):
    try:
        print(commands.stage(name, "2026-03-01"))
    except Exception as error:
        print(error)
"""
    settings = {"COLD_REFRESH_HOME": str(tmp_path), "COLD_REFRESH_SPARK_SUBMIT": f"{script} --master yarn"}
    printed = home.run(sys.executable, "-c", code, str(ROOT / "dags"), **settings).stdout.splitlines()
    for command, status in zip(printed[-3:-1], (0, 1), strict=True):
        said = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert said.returncode == status
        assert "error: yarn" in said.stderr
        assert said.stdout == ("" if status else '{"a": 1}\n')
    assert "holds template marks" in printed[-1]


@pytest.mark.parametrize("job", ["evaluate", "report"])
def test_a_job_that_spark_submit_is_given_runs_by_its_path(job: str, tmp_path: Path) -> None:
    asked = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--conf", "no.yaml", "--run-date", "2026-03-01"]
    ended = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == cli.REFUSED
    assert ended.stderr.startswith("error: ")
    assert "no.yaml" in ended.stderr


def test_a_failed_gate_fails_the_run_and_nothing_after_it_runs(home: AirflowHome, tmp_path: Path) -> None:
    """A script in place of the jobs' Python: it notes what it is asked for, and refuses at the gates, which are not tried again."""
    body = f'echo "$*" >> {tmp_path}/asked; echo "it said: $*"; [[ "$*" != *"--stage gates"* ]] || exit {cli.REFUSED}'
    script = _script(tmp_path / "python", body)
    options = {"COLD_REFRESH_PYTHON": str(script), "COLD_REFRESH_CONF": "a b.yaml", "COLD_REFRESH_LAKE": "/a lake"}
    conf = json.dumps({"run_date": "2017-11-01"})
    ended = home.airflow("dags", "test", "cold_refresh_nightly", "2026-02-01", "--conf", conf, **options)
    assert ended.returncode == 1, ended.stdout[-4000:]
    asked = (tmp_path / "asked").read_text().splitlines()
    until = STAGES[: STAGES.index("gates") + 1]
    night = "-m jobs.cold_refresh --conf a b.yaml --run-date 2017-11-01"
    assert asked == [f"{night} --stage {name} --set lake=/a lake" for name in until]
    assert "the job refuses what it was given" in ended.stdout
    assert f"it said: {asked[-1]}" in ended.stdout  # spark-submit hands on an error's message as stdout
    assert _query(home, "SELECT count(*) FROM asset_event") == [(0,)]


@pytest.mark.parametrize("measured", [["2017-10-30", "2017-11-01"], []])
def test_the_pages_of_the_dates_that_were_measured_are_made_anew(
    home: AirflowHome, tmp_path: Path, measured: list[str]
) -> None:
    """A script in place of the jobs' Python: it notes what it is asked for, and answers as jobs/evaluate.py does."""
    answer = json.dumps({"run_date": "2017-11-01", "metrics": 0, "measured": measured, "note": "why not"})
    script = _script(tmp_path / "python", f"echo \"$*\" >> {tmp_path}/asked; echo said; echo '{answer}'")
    options = {"COLD_REFRESH_PYTHON": str(script), "COLD_REFRESH_SET": "evaluate.k=[10]"}
    ended = home.airflow("dags", "test", "cold_refresh_evaluate", "2017-12-31T06:00:00", **options)
    assert ended.returncode == 0, ended.stdout[-4000:]
    evaluated = "-m jobs.evaluate --conf conf/demo.yaml --due 2017-12-31 --set evaluate.k=[10]"
    reported = [f"-m jobs.report --conf conf/demo.yaml --run-date {one} --set evaluate.k=[10]" for one in measured]
    assert (tmp_path / "asked").read_text().splitlines() == [evaluated, *reported]


def test_backfill_creates_a_run_for_each_night(home: AirflowHome) -> None:
    serialized = home.airflow("dags", "reserialize")
    assert serialized.returncode == 0, serialized.stdout[-4000:]
    between = ["--from-date", "2026-01-01", "--to-date", "2026-01-02", "--max-active-runs", "1"]
    created = home.airflow(
        *["backfill", "create", "--dag-id", "cold_refresh_nightly", *between, "--reprocess-behavior", "failed"]
    )
    assert created.returncode == 0, created.stdout[-4000:]
    intervals = _query(
        home,
        "SELECT substr(data_interval_start, 1, 16), substr(data_interval_end, 1, 16) FROM dag_run "
        "WHERE dag_id = 'cold_refresh_nightly' AND run_type = 'backfill' ORDER BY logical_date",
    )
    assert intervals == [("2026-01-01 00:00", "2026-01-02 00:00"), ("2026-01-02 00:00", "2026-01-03 00:00")]


@pytest.mark.timeout(1200)
def test_a_training_then_the_night_that_uses_it_then_a_ranker_and_the_pruning(
    home: AirflowHome, small_lake: SmallLake, undisturbed: tuple[SmallLake, Any]
) -> None:
    """`dags test D` covers [D - 1, D), so it refreshes with --run-date D; the tables are those of spark-submit."""
    day = small_lake.run_date.isoformat()
    shutil.copytree(undisturbed[0].lake / "text_embeddings", small_lake.lake / "text_embeddings")  # read already
    options = {
        "COLD_REFRESH_PYTHON": sys.executable,
        "COLD_REFRESH_CONF": str(small_lake.conf),
        "COLD_REFRESH_LAKE": str(small_lake.lake),
    }
    trained = home.airflow(
        *["dags", "test", "cold_refresh_training", "--conf", json.dumps({"run_date": day})], timeout=600, **options
    )
    assert trained.returncode == 0, trained.stdout[-8000:]
    ended = home.airflow("dags", "test", "cold_refresh_nightly", day, timeout=600, **options)
    assert ended.returncode == 0, ended.stdout[-8000:]
    rows = Lake(str(small_lake.lake)).read("runs", refresh_date=day).to_pylist()
    published = next(row for row in rows if row["stage"] == "publish")
    night = {row["stage"]: row for row in rows if row["run_id"] == published["run_id"]}
    training = {row["stage"]: row for row in rows if row["run_id"] != published["run_id"]}
    assert set(night) == {"open", *STAGES}
    assert set(training) == {"open_training", *TRAINING_STAGES}
    for stage in ("cf", "filterllm_train"):
        first, then = json.loads(training[stage]["counts"]), json.loads(night[stage]["counts"])
        assert (first["trained"], then["trained"]) == (True, False)
        assert first["space_version"] == then["space_version"]

    versions = json.loads(published["output_versions"])
    events = _query(home, "SELECT a.uri, e.extra FROM asset_event e JOIN asset a ON a.id = e.asset_id")
    assert {uri: json.loads(extra) for uri, extra in events} == {
        (small_lake.lake / table).as_uri(): {
            "table": table,
            "version": versions[table],
            "date": day,
            "run_id": published["run_id"],
            "lake": str(small_lake.lake),
        }
        for table in OUTPUTS
    }
    nights.assert_same_tables(small_lake.lake, undisturbed[0].lake, small_lake.run_date)
    read = home.airflow("dags", "test", "ranker", "--conf", json.dumps({"date": day}), **options)
    assert read.returncode == 0, read.stdout[-8000:]
    assert published["run_id"] in read.stdout

    left = small_lake.lake / "_staging" / "20200101-0123456789ab" / "snapshot" / "half-done"
    left.parent.mkdir(parents=True)
    left.touch()
    os.utime(left, (0, 0))
    pruned = home.airflow("dags", "test", "cold_refresh_prune", "--conf", json.dumps({"keep_days": 30}), **options)
    assert pruned.returncode == 0, pruned.stdout[-8000:]
    assert not left.exists()
    assert (small_lake.lake / "_artifacts" / "spaces").is_dir()
