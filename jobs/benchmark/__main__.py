"""Measure the project: `python -m jobs.benchmark <subject> [options]`; `<subject> --help` lists the options.

A subject is a module of this package with `add_arguments(parser)` and `run(args) -> dict`; the dict is JSON-able, and its
"tables" (see table.py) become Markdown. Progress and the tables go to stderr, <out>/<subject>.json and <out>/<subject>.md
are written, and the last line on stdout is the whole result in JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.benchmark.table import markdown
from jobs.run import log

SUBJECTS = {
    "speed": "scoring, training step, encoding and text-to-judgment: time, peak memory, ratios",
    "judgment": "text to distribution against text to judgment alone, with all its options",
    "allmrec": "A-LLMRec among 20 candidates: CF backbones, ablations, cold items and users, few users, another domain",
    "llminit": "CF models from a random start and from text embeddings, for all users and cold ones",
    "lightgcn": "seconds an epoch of LightGCN, against RecBole's",
    "systems": "FilterLLM, LLMInit and A-LLMRec placing cold items: quality, seconds and memory of a night each",
    "quality": "Recall and NDCG of every method on the papers' data sets, mean and spread over seeds",
}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 1 after an error that a person can act on."""
    given = sys.argv[1:] if argv is None else argv
    subjects = "\n".join(f"  {name:10} {text}" for name, text in SUBJECTS.items())
    parser = cli.parser(f"{__doc__}\nsubjects:\n{subjects}")
    parser.prog = "python -m jobs.benchmark"
    parser.add_argument("subject", choices=SUBJECTS)
    if not given or given[0] not in SUBJECTS:
        parser.parse_args(given)  # prints help, or what is wrong, and exits
    return cli.main(lambda: _measure(given[0], given[1:]))


def _measure(subject: str, argv: list[str]) -> dict[str, Any]:
    module = import_module(f"jobs.benchmark.{subject}")
    parser = cli.parser(module.__doc__)
    parser.prog = f"python -m jobs.benchmark {subject}"
    parser.add_argument("--out", default=".cache/benchmark", help="folder of the results (default: %(default)s)")
    module.add_arguments(parser)
    for action in parser._actions:
        if action.default not in (None, [], argparse.SUPPRESS) and "%(default)" not in (action.help or ""):
            action.help = f"{action.help} (default: %(default)s)" if action.help else "(default: %(default)s)"
    args: argparse.Namespace = parser.parse_args(argv)
    result: dict[str, Any] = module.run(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(result.get("tables", []))
    (out / f"{subject}.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    (out / f"{subject}.md").write_text(text)
    log(text)
    log(f"written to {out / subject}.json and .md")
    return result


if __name__ == "__main__":
    sys.exit(main())
