"""Format `amazon-reviews`: reviews and product metadata as JSON lines, in the layouts of 2014, 2018 and 2023.

`--source` is a folder whose files `meta*.json.gz` (or `.jsonl.gz`, or not compressed) are metadata and whose other ones
are reviews; or name them: `--interactions FILE --items FILE`. The metadata of 2014 are Python literals rather than JSON.
A review is an interaction with the rating as its weight.
"""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json

from jobs.formats.contract import FormatError, Request, TableSource, Tally, existing, text_batch
from jobs.formats.files import BLOCK_BYTES, SourceFile, line_blocks, lines, within

OPTIONS = ("interactions", "items")
_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
# Ours -> what the layouts call it. In 2023 `asin` is a variant, and the metadata are those of `parent_asin`.
_REVIEW: dict[str, tuple[str, ...]] = {
    "user_id": ("reviewerID", "user_id"),
    "item_id": ("parent_asin", "asin"),
    "weight": ("overall", "rating"),
    "event_time": ("unixReviewTime", "timestamp"),
}
_TYPES = {"user_id": pa.string(), "item_id": pa.string(), "weight": pa.float64(), "event_time": pa.int64()}
_PRODUCT = ["item_id", "title", "text"]
_ROWS = 2048
_LITERAL_BYTES = 1 << 20  # ast.literal_eval needs a hundred times the text's size


def open_source(request: Request) -> dict[str, TableSource]:
    """Raises FormatError if reviews or metadata are not found."""
    named = {"interactions": request.interactions, "items": request.items}
    found: dict[str, tuple[SourceFile, ...]] = {}
    if request.source is not None:
        folder = existing(request.source, "a folder with reviews and metadata (.json.gz, .jsonl.gz)")
        if not folder.is_dir():
            raise FormatError(f"--source {folder} is a file; name files with --interactions and --items")
        files = within(folder, _ENDINGS)
        found["items"] = tuple(f for f in files if f.path.name.lower().startswith("meta"))
        found["interactions"] = tuple(f for f in files if f not in found["items"])
    for table, path in named.items():
        if path is not None:
            found[table] = (SourceFile(existing(path, f"the {table}, as JSON lines")),)
    found = {table: files for table, files in found.items() if files}
    if not found or (request.source is not None and len(found) < 2):
        where: Path | str = request.source or "the command line"
        raise FormatError(
            f"reviews and metadata expected, and {where} has {sorted(found) or 'neither'}: a folder with meta*.json.gz and "
            "other .json.gz or .jsonl.gz files, or --interactions REVIEWS --items METADATA"
        )
    readers = {"interactions": _reviews, "items": _products}
    return {table: TableSource(files, partial(readers[table], files)) for table, files in found.items()}


def _reviews(files: tuple[SourceFile, ...], tally: Tally) -> Iterator[pa.RecordBatch]:
    for file in files:
        for block in line_blocks(file):
            table = _fast_reviews(block)
            batches = table.to_batches(max_chunksize=65_536) if table is not None else _slow_reviews(block, tally)
            for batch in batches:
                if table is not None:
                    tally.rows_in += batch.num_rows
                yield batch.append_column("event_type", pa.array(["review"] * batch.num_rows))


def _fast_reviews(block: bytes) -> pa.Table | None:
    """A block as Arrow parses it; None if a line is bad or unusual."""
    schema = pa.schema([(theirs, _TYPES[ours]) for ours, all_theirs in _REVIEW.items() for theirs in all_theirs])
    parse = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    read = pa_json.ReadOptions(use_threads=False, block_size=max(BLOCK_BYTES, len(block) + 1))
    try:
        table = pa_json.read_json(pa.BufferReader(block), read_options=read, parse_options=parse)
    except pa.ArrowInvalid:
        return None
    # Two objects in a line, or one on two lines, pass there; they are not lines of JSON.
    if table.num_rows != sum(1 for line in block.split(b"\n") if line.strip()):
        return None
    columns = [pc.coalesce(*(table.column(name) for name in theirs)) for theirs in _REVIEW.values()]
    return pa.table(columns, names=list(_REVIEW))


def _slow_reviews(block: bytes, tally: Tally) -> Iterator[pa.RecordBatch]:
    rows: list[list[str | None]] = []
    for line in block.split(b"\n"):
        if not line.strip():
            continue
        tally.rows_in += 1
        review = _object(line, tally)
        if review is not None:
            # As text: the cleaning parses numbers and says which are none.
            rows.append([_first(review, theirs) for theirs in _REVIEW.values()])
    if rows:
        yield text_batch(rows, list(_REVIEW))


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    value = next((row[name] for name in names if row.get(name) is not None), None)
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def _object(line: bytes, tally: Tally, *, literal: bool = False) -> dict[str, Any] | None:
    """The line as a dictionary; None (and a rejected row) if it is none."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        tally.reject("broken_utf8", line[:200].decode("utf-8", "backslashreplace"))
        return None
    value = None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if literal and len(line) < _LITERAL_BYTES:
            try:
                value = ast.literal_eval(text.strip())
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                value = None
    if not isinstance(value, dict):
        tally.reject("unparseable_line", text[:200])
        return None
    if "\\u" in text:
        try:
            # A lone surrogate ("\ud800") is valid JSON and no text.
            json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
        except (UnicodeEncodeError, RecursionError):
            tally.reject("broken_utf8", text[:200])
            return None
    return value


def _products(files: tuple[SourceFile, ...], tally: Tally) -> Iterator[pa.RecordBatch]:
    rows: list[tuple[str | None, str | None, str | None]] = []
    held = 0
    for file in files:
        for line in lines(file):
            tally.rows_in += 1
            product = _object(line, tally, literal=True)
            if product is None:
                continue
            rows.append((_first(product, ("parent_asin", "asin")), _plain(product.get("title")), _describe(product)))
            held += len(line)
            if len(rows) == _ROWS or held > BLOCK_BYTES:
                yield text_batch(rows, _PRODUCT)
                rows, held = [], 0
    if rows:
        yield text_batch(rows, _PRODUCT)


def _describe(product: dict[str, Any]) -> str:
    """Brand, categories, features, description: what says most comes first, since a model reads the beginning."""
    details = product.get("details")
    brand = (
        product.get("brand") or (details.get("Brand") if isinstance(details, dict) else None) or product.get("store")
    )
    main = product.get("main_category") or product.get("main_cat")
    categories = _strings([main, product.get("categories") or product.get("category")])
    named = list(dict.fromkeys(c for c in map(_plain, categories) if c))
    parts = [_plain(brand), ", ".join(named)]
    parts += map(_plain, _strings([product.get("features") or product.get("feature"), product.get("description")]))
    sentences = [part if part.endswith((".", "!", "?")) else part + "." for part in parts if part]
    return " ".join(sentences)


def _strings(value: Any) -> list[str]:
    """The strings in nested lists, in order."""
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, list | tuple):
            waiting += reversed(one)
    return found


def _plain(value: Any) -> str:
    """Text without HTML tags, entities and runs of blanks; nothing for what is no text."""
    if not isinstance(value, str):
        return ""
    return " ".join(html.unescape(re.sub(r"<[^<>]{1,200}>", " ", value)).split())
