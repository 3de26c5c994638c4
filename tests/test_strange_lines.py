"""A line that nobody expected costs that line: not the rest of the file, and not all the memory there is."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from jobs.formats import amazon_reviews, citeulike, movielens
from jobs.formats.contract import Request, TableSource, Tally


def _items(source: TableSource) -> tuple[list[pa.RecordBatch], Tally]:
    tally = Tally("items")
    return list(source.read(tally)), tally


def _amazon(folder: Path, products: list[str]) -> tuple[list[pa.RecordBatch], Tally]:
    (folder / "reviews.json").write_text('{"reviewerID": "u", "asin": "a", "overall": 5.0, "unixReviewTime": 1}\n')
    (folder / "meta.json").write_text("".join(line + "\n" for line in products))
    request = Request(interactions=folder / "reviews.json", items=folder / "meta.json")
    return _items(amazon_reviews.open_source(request)["items"])


def test_categories_nested_without_end(tmp_path: Path) -> None:
    nested = "[" * 600 + '"Skin", "Face"' + "]" * 600
    batches, _ = _amazon(tmp_path, [f'{{"asin": "a", "title": "t", "categories": {nested}}}'])
    assert pa.Table.from_batches(batches).to_pylist() == [{"item_id": "a", "title": "t", "text": "Skin, Face."}]


def test_long_products_do_not_wait_for_others(tmp_path: Path) -> None:
    line = json.dumps({"asin": "a", "title": "t", "description": "x" * (3 << 20)})
    batches, _ = _amazon(tmp_path, [line] * 3)
    assert [batch.num_rows for batch in batches] == [1, 1, 1]


def test_numbers_of_too_many_digits(tmp_path: Path) -> None:
    endless = "9" * 5000
    (tmp_path / "users.dat").write_text(f"1 7\n{endless} 1\n")
    (tmp_path / "raw-data.csv").write_text(f'"doc.id","raw.title","raw.abstract"\n"{endless}","t","a"\n"1","t","a"\n')
    tables = citeulike.open_source(Request(source=tmp_path))
    papers, of_papers = _items(tables["items"])
    libraries, of_libraries = _items(tables["interactions"])
    assert pa.Table.from_batches(papers)["item_id"].to_pylist() == ["0"]
    assert pa.Table.from_batches(libraries).to_pylist() == [{"user_id": "0", "item_id": "7"}]
    assert of_papers.rejected == of_libraries.rejected == {"unparseable_line": 1}


def test_genres_whose_numbers_are_none(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("1\t1\t5\t881250949\n")
    (tmp_path / "u.genre").write_bytes(b"unknown|0\nAction|1\nEndless|99999999999\nSquare|\xb2\n")
    (tmp_path / "u.item").write_text("1|Heat (1995)|01-Jan-1995||http://x|0|1\n")
    batches, _ = _items(movielens.open_source(Request(source=tmp_path))["items"])
    assert pa.Table.from_batches(batches)["text"].to_pylist() == ["Action"]
