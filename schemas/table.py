"""What a table holds: the contract that a stage checks before it works and that readers rely on.

Each table is one YAML file beside this one: columns with types, key, partition columns and the expectations its gate runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import pyarrow as pa
import yaml

from schemas.errors import ContractError

_ARROW_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "int": pa.int32(),
    "long": pa.int64(),
    "double": pa.float64(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "array<float>": pa.list_(pa.float32()),
}


@dataclass(frozen=True)
class Column:
    """One column: `type` is the name that Spark gives the type; an optional column may be absent from an input."""

    name: str
    type: str
    nullable: bool = False
    optional: bool = False
    doc: str = ""

    @property
    def arrow_type(self) -> pa.DataType:
        return _ARROW_TYPES[self.type]


@dataclass(frozen=True)
class Table:
    """A table's contract. `expectations` are Great Expectations' own: {type, kwargs, meta}."""

    name: str
    doc: str
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    partition_by: tuple[str, ...] = ()
    expectations: tuple[dict[str, Any], ...] = field(default=(), hash=False)

    @property
    def arrow_schema(self) -> pa.Schema:
        return pa.schema([pa.field(c.name, c.arrow_type, c.nullable) for c in self.columns])

    def column(self, name: str) -> Column:
        return next(c for c in self.columns if c.name == name)

    def conform(self, table: pa.Table) -> pa.Table:
        """`table` with this contract's columns in its order and types.

        Raises:
            ContractError: a column is missing, or a value does not fit its type.
        """
        absent = [c.name for c in self.columns if c.name not in table.column_names]
        if absent:
            raise ContractError(f"table '{self.name}': columns {absent} are missing; there are {table.column_names}")
        try:
            return table.select([c.name for c in self.columns]).cast(self.arrow_schema)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
            raise ContractError(
                f"table '{self.name}' ({table.num_rows} rows) does not fit its schema: {error}"
            ) from error


@cache
def table(name: str) -> Table:
    """The contract named `name` (a file `schemas/<name>.yaml`).

    Raises:
        KeyError: there is none.
    """
    resource = files("schemas") / f"{name}.yaml"
    if not resource.is_file():
        raise KeyError(f"no schema named {name!r} in schemas/")
    spec = yaml.safe_load(resource.read_text(encoding="utf-8"))
    return Table(
        name=name,
        doc=spec["doc"],
        columns=tuple(Column(**{"name": column, **(facts or {})}) for column, facts in spec["columns"].items()),
        key=tuple(spec.get("key", ())),
        partition_by=tuple(spec.get("partition_by", ())),
        expectations=tuple(spec.get("expectations", ())),
    )
