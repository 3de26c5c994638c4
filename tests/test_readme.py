"""The commands of README.md and RESULTS.md: what they name is there."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from jobs.benchmark import allmrec_rows, llminit_rows, quality, systems
from jobs.benchmark.baselines import BASELINES
from jobs.benchmark.choice import chosen
from jobs.benchmark.datasets import DATA_SETS
from jobs.settings import load

REPOSITORY = Path(__file__).parents[1]
TEXT = "\n".join((REPOSITORY / name).read_text() for name in ("README.md", "RESULTS.md"))
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if re.match(r"(make|[A-Z_]+=\S+ |\.venv)", line)]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_names_exists(command: str) -> None:
    if command.startswith("make "):
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert command.split()[1] in targets
    for path in re.findall(r"(?:^| )((?:conf|jobs|dags)/[\w./-]+)", command):
        assert (REPOSITORY / path).exists(), path
    for program in re.findall(r"\.venv/bin/([\w-]+)", command):
        assert (Path(sys.executable).parent / program).exists(), program


# Of the benchmark each subject has its own options.
NAMES = r"-m (jobs\.benchmark \w+|jobs\.\w+)"
MODULES = sorted({m for command in COMMANDS for m in re.findall(NAMES, command)} | {"jobs.cold_refresh"})


@pytest.mark.parametrize("module", MODULES)
def test_every_option_is_known(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *subject = module.split()
    main = importlib.import_module("jobs.benchmark.__main__" if subject else name).main
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*subject, "--help"])
    shown = capsys.readouterr().out
    marker = module.replace("jobs.cold_refresh", "jobs/cold_refresh.py")
    mine = [c.split(marker, 1)[1] for c in COMMANDS if f"{marker} " in f"{c} "]
    assert mine
    for option in {option for words in mine for option in re.findall(r"--[a-z-]+", words)}:
        assert re.search(rf"{option}(?![\w-])", shown), option


BENCHMARKS = [c for c in COMMANDS if re.search(r"-m jobs\.benchmark \w+", c)]


@pytest.mark.parametrize("command", BENCHMARKS)
def test_a_benchmark_understands_its_command(command: str) -> None:
    subject, *words = shlex.split(command.split("-m jobs.benchmark ", 1)[1])
    parser = argparse.ArgumentParser()
    module = importlib.import_module(f"jobs.benchmark.{subject}")
    module.add_arguments(parser)
    args = parser.parse_args(words)
    there = {"quality": quality.rows(ENCODERS), "llminit": llminit_rows.rows(ENCODERS)}.get(subject, [])
    if getattr(args, "curve", None):
        there = []
    asked = chosen(args.rows, ROWS[subject]) if there else []
    for row in (row for row in there if row.name in asked):
        for name in args.dataset:
            load(REPOSITORY / DATA_SETS[name].conf, row.settings(args.overrides))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--conf" in c])
def test_the_settings_of_a_command_are_known(command: str) -> None:
    words = shlex.split(command)
    given = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    load(REPOSITORY / words[words.index("--conf") + 1], given)


ENCODERS = {"mpnet": "./all-mpnet-base-v2"}
ROWS = {
    "quality": [*quality._FLOORS, *BASELINES, *(row.name for row in quality.rows(ENCODERS))],
    "llminit": [row.name for row in llminit_rows.rows(ENCODERS)],
    "allmrec": [row.name for row in allmrec_rows.ROWS],
    "systems": list(systems.SYSTEMS),
}


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--rows" in c])
def test_every_row_is_known(command: str) -> None:
    words = shlex.split(command)
    after = words[words.index("--rows") + 1 :]
    asked = after[: next((n for n, word in enumerate(after) if word.startswith("--")), None)]
    known = ROWS[words[words.index("jobs.benchmark") + 1]]
    if "--curve" in words:
        known = [row.at(32).name for row in llminit_rows.by_dimension(ENCODERS)]
    assert chosen(asked, known)
    assert "--encoder" in words or not any("mpnet" in name for name in asked)
