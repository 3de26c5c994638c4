"""What the commands of jobs/ have in common: --conf and --set, or --lake; a summary in JSON as the last line, clear errors."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from jobs.lake import Lake
from jobs.run import log
from jobs.settings import Settings, SettingsError, load
from schemas.errors import ColdRefreshError, ContractError

#: Exit status where the settings, an input table or a gate must be looked at: to start the job again as it is would not help.
REFUSED = 3


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows `doc` as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that name settings."""
    parser.add_argument("--conf", required=True, help="a YAML file of settings, such as conf/demo.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, such as sampling.k=100 (the value is YAML); repeatable",
    )


def settings(args: argparse.Namespace) -> Settings:
    """The settings that --conf and --set name."""
    return load(args.conf, args.set)


def add_lake(parser: argparse.ArgumentParser) -> None:
    """The options that name a lake, where no settings are read."""
    parser.add_argument("--lake", required=True, help="a folder or an s3://, gs://, abfss:// URI")
    parser.add_argument(
        "--storage-option",
        action="append",
        default=[],
        type=_option,
        metavar="KEY=VALUE",
        help="of delta-rs, such as timeout=60s; where the store is and who asks stays in the environment; repeatable",
    )


def lake(args: argparse.Namespace) -> Lake:
    """The lake that --lake and --storage-option name."""
    return Lake(args.lake, dict(args.storage_option))


def _option(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def main(job: Callable[[], dict[str, Any]]) -> int:
    """Run `job`, print its summary as one line of JSON on stdout; an error that a person can act on becomes one message.

    Returns:
        The exit status: 0, REFUSED, or 1 after another error.
    """
    try:
        summary = job()
    except ColdRefreshError as error:
        log(f"error: {error}")
        return REFUSED if isinstance(error, ContractError | SettingsError) else 1
    print(json.dumps(summary, sort_keys=False, default=str), flush=True)
    return 0


def script(module: str, file: str) -> int:
    """`main` of `module`, whose file was started as a script: by its path, as spark-submit wants it.

    Python puts the file's folder first on the path, where its modules would hide others of the same name.
    """
    here = os.path.dirname(os.path.abspath(file))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    return int(importlib.import_module(module).main())
