"""Great Expectations over derived frames: the suites of schemas/*.yaml are run, and Data Docs are written.

An expectation of a schema is Great Expectations' own {type, kwargs, meta}. `meta.view` names the frame that it is about
(udfs/gate_views.py derives them), `meta.says` is the rule in words; {"$PARAMETER": name} stands for a value of the run.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.staging import Staging
from schemas.errors import ContractError
from schemas.table import table as schema

if TYPE_CHECKING:
    import pandas as pd

DOCS = "data_docs"
_EXAMPLES = 3


class GateError(ContractError):
    """An expectation is not met: the message says which, how many rows, three examples, and where the Data Docs are."""


@dataclass(frozen=True)
class View:
    """A frame to be checked, small enough for memory: one row an item, a user, or a fact. `key` names its rows."""

    table: str
    name: str
    frame: pd.DataFrame
    key: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.table}.{self.name}"

    @property
    def expectations(self) -> list[dict[str, Any]]:
        return [e for e in schema(self.table).expectations if e["meta"]["view"] == self.name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Great Expectations logs a line for every metric at INFO."""
    logger = logging.getLogger("great_expectations")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check(
    views: list[View], parameters: dict[str, Any], out: Staging, *, name: str, at: datetime, consequence: str
) -> dict[str, Any]:
    """Run every expectation that the schemas of the views' tables state, and write Data Docs to `out`/data_docs.

    Args:
        parameters: values of the run, by the names that the expectations use.
        name: what the validation is called in the Data Docs, with the time `at`.
        consequence: how the message of a failure ends: what does not happen now, and the remedy.

    Returns:
        expectations, succeeded (counts); data_docs: where index.html is.

    Raises:
        GateError: an expectation is not met, or could not be evaluated.
    """
    with tempfile.TemporaryDirectory(prefix="data_docs_") as folder:
        evaluated, failures = evaluate(views, parameters, name=name, at=at, docs=folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                out.write_bytes(f"{DOCS}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    docs = out.path(f"{DOCS}/index.html")
    if failures:
        lines = "\n".join(f"  {line}" for line in failures)
        raise GateError(
            f"{len(failures)} of {evaluated} expectations are not met:\n{lines}\nData Docs: {docs}\n{consequence}"
        )
    return {"expectations": evaluated, "succeeded": evaluated, "data_docs": docs}


def evaluate(
    views: list[View], parameters: dict[str, Any], *, name: str, at: datetime, docs: str | None = None
) -> tuple[int, list[str]]:
    """How many expectations the views' tables state, and one line for each that is not met.

    Args:
        docs: a local folder for the Data Docs; none are written without it.

    Raises:
        GateError: a view that the schemas state expectations on is not among `views`, or the other way round.
    """
    for table in {view.table for view in views}:
        stated = {e["meta"]["view"] for e in schema(table).expectations}
        given = {view.name for view in views if view.table == table}
        if stated != given:
            raise GateError(
                f"schemas/{table}.yaml states expectations on {sorted(stated)}, checked are {sorted(given)}"
            )
    with _quiet():
        results = _validate(views, parameters, docs, name, at)
    failures = [_describe(view, result) for view, found in results for result in found if not result.success]
    return sum(len(found) for _, found in results), failures


def _validate(
    views: list[View], parameters: dict[str, Any], docs: str | None, name: str, at: datetime
) -> list[tuple[View, list[Any]]]:
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": docs}
    site = {
        "class_name": "SiteBuilder",
        "store_backend": store,
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }
    config = DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(),
        data_docs_sites={"gates": site} if docs else {},
        analytics_enabled=False,
        progress_bars=ProgressBarsConfig(globally=False),
    )
    context = gx.get_context(project_config=config, mode="ephemeral")
    source = context.data_sources.add_pandas("staged")
    results = []
    for view in views:
        suite = context.suites.add(gx.ExpectationSuite(name=view.title, expectations=view.expectations))
        batch = source.add_dataframe_asset(view.title).add_batch_definition_whole_dataframe("whole")
        definition = gx.ValidationDefinition(name=view.title, data=batch, suite=suite)
        result = context.validation_definitions.add(definition).run(
            batch_parameters={"dataframe": view.frame},
            expectation_parameters=parameters,
            result_format={
                "result_format": "SUMMARY",
                "partial_unexpected_count": _EXAMPLES,
                "unexpected_index_column_names": list(view.key),
            },
            run_id=RunIdentifier(run_name=name, run_time=at),
        )
        results.append((view, list(result.results)))
    if docs:
        context.build_data_docs()
    return results


def _describe(view: View, result: Any) -> str:
    """One failed expectation: the rule, its name and arguments, how many rows fail, examples with their keys."""
    body = result.to_json_dict()
    config = body["expectation_config"]
    arguments = ", ".join(f"{k}={v}" for k, v in config["kwargs"].items() if k != "batch_id")
    line = f"{view.title}: {config['meta']['says']} [{config['type']}({arguments})]: "
    errors = _exceptions(body.get("exception_info"))
    if errors:
        return f"{line}could not be evaluated: {errors[0]}"
    found = body["result"]
    if "unexpected_count" not in found:
        return f"{line}found {found.get('observed_value')}"
    line += f"{found['unexpected_count']} of {found['element_count']} rows fail"
    examples = found.get("partial_unexpected_index_list") or []
    order = [*view.key, config["kwargs"].get("column")]
    shown = [", ".join(f"{k}={_plain(row[k])!r}" for k in dict.fromkeys(order) if k in row) for row in examples]
    return f"{line}; such as: {'; '.join(shown)}" if shown else line


def _plain(value: Any) -> Any:
    """A numpy scalar as Python's own, for the message."""
    return value.item() if hasattr(value, "item") else value


def _exceptions(info: Any) -> list[str]:
    # One {raised_exception, exception_message}, or one for each metric.
    if not isinstance(info, dict):
        return []
    parts = [info] if "raised_exception" in info else list(info.values())
    return [str(p["exception_message"]) for p in parts if isinstance(p, dict) and p.get("raised_exception")]
