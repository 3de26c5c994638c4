"""The contracts in schemas/: readable, consistent, and refusing what does not fit."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

import schemas
from schemas.errors import ContractError
from schemas.table import table

NAMES = sorted(path.stem for path in Path(schemas.__file__).parent.glob("*.yaml"))
GATED = {
    "training_interactions",
    "users",
    "items_labelled",
    "rejected_rows",
    "sampled_interactions",
    "item_embeddings",
    "user_embeddings",
    "space",
    "recommendations",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_contract_can_be_read(name: str) -> None:
    contract = table(name)
    columns = {column.name for column in contract.columns}
    assert contract.doc
    assert len(contract.arrow_schema) == len(columns) == len(contract.columns)
    assert set(contract.key) <= columns
    assert set(contract.partition_by) <= columns
    optional = {c.name for c in contract.columns if c.nullable}
    if not contract.doc.startswith("Input"):
        assert not optional & set(contract.key), "a key is never null"


def test_what_is_gated_states_expectations() -> None:
    assert {name for name in NAMES if table(name).expectations} == GATED


@pytest.mark.parametrize("name", sorted(GATED))
def test_every_expectation_is_one_of_great_expectations_own_and_says_its_rule(name: str) -> None:
    from great_expectations.expectations.registry import get_expectation_impl

    for stated in table(name).expectations:
        assert set(stated) == {"type", "kwargs", "meta"}
        implementation = get_expectation_impl(stated["type"])
        implementation(**stated["kwargs"])  # its own check of the arguments' names and types
        assert set(stated["meta"]) == {"view", "says"}
        assert stated["meta"]["says"]


def test_the_outputs_carry_their_lineage() -> None:
    for name in ("sampled_interactions", "item_embeddings", "user_embeddings"):
        contract = table(name)
        assert {"refresh_date", "run_id", "model_version", "space_version"} <= set(contract.arrow_schema.names)
        assert contract.partition_by == ("refresh_date",)


def _users(**columns: object) -> pa.Table:
    return pa.table({"user_id": ["a", "b"], "user_idx": [0, 1], "interactions": [3, 4], **columns})


def test_conform_orders_and_casts_columns_and_drops_others() -> None:
    found = table("users").conform(_users(more=[1, 2]).select(["interactions", "more", "user_idx", "user_id"]))
    assert found.schema.names == ["user_id", "user_idx", "interactions"]
    assert found.schema.types == [pa.string(), pa.int32(), pa.int64()]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (_users().drop_columns(["user_idx"]), r"columns \['user_idx'\] are missing"),
        (_users(user_idx=["x", "y"]), r"table 'users' \(2 rows\) does not fit its schema"),
        (_users(user_idx=[1, 2**40]), "does not fit its schema"),
        (_users(user_id=["a", None]), "does not fit its schema"),
    ],
    ids=["missing", "type", "range", "null"],
)
def test_conform_refuses_what_does_not_fit(rows: pa.Table, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        table("users").conform(rows)


def test_an_unknown_contract_is_named() -> None:
    with pytest.raises(KeyError, match="no_such_table"):
        table("no_such_table")
