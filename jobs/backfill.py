"""The cold refresh of every date of a range, oldest first, on a running Ray cluster or without one.

    ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python -m jobs.backfill --from 2017-10-30 --to 2017-11-05 --conf conf/demo.yaml --set lake=$PWD/lake

Dates that are published already, from the same inputs, are skipped. A date that fails does not stop the later ones, which then
build on the newest night that is published, unless --stop-on-failure says so; at the end the failed dates are named and the exit
status is 1. In a Ray job each date is a task of the name `cold_refresh DATE`: the dashboard shows its state and log, and the job's
own log has a line when it starts and one when it ends. The last line of stdout is a summary in JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date, timedelta
from typing import Any

from jobs import cli
from jobs.run import log, parse_new_run_date
from jobs.settings import Settings, SettingsError
from schemas.errors import ColdRefreshError

Refresh = Callable[[str, list[str], dict[str, str]], dict[str, Any]]
_THREADS = "OMP_NUM_THREADS"


class NightError(ColdRefreshError):
    """The refresh of one date failed; the message is its own."""


def dates(first: date, last: date) -> list[date]:
    """The days from `first` to `last`, both included.

    Raises:
        SettingsError: `last` lies before `first`.
    """
    if last < first:
        raise SettingsError(f"--from {first} is after --to {last}")
    return [first + timedelta(days=n) for n in range((last - first).days + 1)]


def refresh(folder: str, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run `python -m jobs.cold_refresh` with `arguments` in `folder`, in a process of its own; returns its summary.

    The process frees the memory of its engines before the next date, and a crash of it is one date's failure. Its stderr
    goes on to ours line by line.

    Raises:
        NightError: it ended with another status than 0.
    """
    command = [sys.executable, "-m", "jobs.cold_refresh", *arguments]
    tail: deque[str] = deque(maxlen=50)
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            # stdout is one line at the end, less than a pipe holds: reading it last blocks nobody.
            for line in process.stderr:
                tail.append(line.rstrip())
                print(line, end="", file=sys.stderr, flush=True)
            out = process.stdout.read()
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.terminate()
    if process.returncode:
        said = [line for line in tail if line.startswith("error: ")] or [line for line in tail if line] or ["no output"]
        raise NightError(f"exit status {process.returncode}: {said[-1].removeprefix('error: ')}")
    return json.loads(out.splitlines()[-1])


@contextmanager
def _on_ray(settings: Settings) -> Iterator[Refresh]:
    """`refresh` as a Ray task of the cluster that RAY_ADDRESS names; the refresh itself joins that cluster too."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(logging_level="warning")
    try:
        context = ray.get_runtime_context()
        if context.runtime_env.get("working_dir") and "://" not in settings.lake and not os.path.isabs(settings.lake):
            raise SettingsError(
                f"the lake {settings.lake!r} is relative, and a Ray job runs in a copy of its folder: "
                "name it in full, such as --set lake=$PWD/lake"
            )
        # The task only waits for its process, whose actors need the CPUs. It stays on this node, where Spark is and where
        # the paths of the settings hold.
        here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(refresh)

        def submit(folder: str, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
            day = arguments[arguments.index("--run-date") + 1]
            # Ray gives one thread to what asks for no CPU, this job's own process included.
            if environment.get(_THREADS) == "1" and _THREADS not in (context.runtime_env.get("env_vars") or {}):
                environment = {k: v for k, v in environment.items() if k != _THREADS}
            try:
                return ray.get(task.options(name=f"cold_refresh {day}").remote(folder, arguments, environment))
            except ray.exceptions.RayTaskError as error:
                raise NightError(str(error.cause)) from None
            except ray.exceptions.RayError as error:
                raise NightError(f"its Ray worker was lost: {error}") from error

        yield submit
    finally:
        ray.shutdown()


def backfill(
    settings: Settings, conf: str, overrides: list[str], days: list[date], *, stop_on_failure: bool = False
) -> dict[str, Any]:
    """Refresh `days` in their order; returns the summary, with the status of each and the failed ones."""
    begun = time.perf_counter()
    nights: list[dict[str, Any]] = []
    # Ray sets RAY_ADDRESS for its jobs.
    with _on_ray(settings) if os.environ.get("RAY_ADDRESS") else nullcontext(refresh) as run:
        for number, day in enumerate(days, 1):
            arguments = ["--conf", conf, "--run-date", day.isoformat()]
            for override in overrides:
                arguments += ["--set", override]
            log(f"[backfill] {day} ({number} of {len(days)}): started")
            started = time.perf_counter()
            try:
                # The environment is this process's: that of a Ray worker hides the GPUs.
                summary = run(os.getcwd(), arguments, dict(os.environ))
                night = {
                    "status": "published" if summary["stages_computed"] else "skipped",
                    "run_id": summary["run_id"],
                }
            except NightError as error:
                night = {"status": "failed", "error": str(error)}
            seconds = round(time.perf_counter() - started, 1)
            nights.append({"date": day.isoformat(), **night, "seconds": seconds})
            why = (
                ": published already"
                if night["status"] == "skipped"
                else f": {night.get('error', night.get('run_id'))}"
            )
            log(f"[backfill] {day} ({number} of {len(days)}): {night['status']}{why} ({seconds} s)")
            if stop_on_failure and night["status"] == "failed":
                break
    by_status = {
        status: [night["date"] for night in nights if night["status"] == status]
        for status in ("published", "skipped", "failed")
    }
    if by_status["failed"]:
        log(f"error: {len(by_status['failed'])} of {len(days)} dates failed: {', '.join(by_status['failed'])}")
    return {
        **by_status,
        "not_run": [day.isoformat() for day in days[len(nights) :]],
        "nights": nights,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    cli.add_settings(parser)
    parser.add_argument("--from", dest="first", required=True, help="YYYY-MM-DD: the first run date")
    parser.add_argument("--to", dest="last", required=True, help="YYYY-MM-DD: the last run date")
    parser.add_argument("--stop-on-failure", action="store_true", help="do not go on after a date that failed")
    args = parser.parse_args(argv)
    failed: list[str] = []

    def job() -> dict[str, Any]:
        days = dates(parse_new_run_date(args.first, "--from"), parse_new_run_date(args.last, "--to"))
        settings = cli.settings(args)
        summary = backfill(settings, args.conf, args.set, days, stop_on_failure=args.stop_on_failure)
        failed.extend(summary["failed"])
        return summary

    # A stopped job ends its running date too: the exception passes through `refresh`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    status = cli.main(job)
    return 1 if failed else status


if __name__ == "__main__":
    sys.exit(main())
