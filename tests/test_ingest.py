"""Ingest into a lake: each content once, whole tables only, lazily."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from jobs import ingest
from jobs.formats import csv_files
from jobs.formats.contract import Request, TableSource, Tally
from jobs.lake import Lake
from tests.ingest_command import run


def write(folder: Path, users: int = 3, title: str = "Anchor") -> Path:
    folder.mkdir(exist_ok=True)
    events = "".join(f"u{i},a,{1_700_000_000 + i}\n" for i in range(users))
    (folder / "interactions.csv").write_text("user_id,item_id,event_time\n" + events)
    (folder / "items.csv").write_text(f"item_id,title\na,{title}\n")
    return folder


def count(lake: Path, table: str) -> int:
    return DeltaTable(lake / table).to_pyarrow_table().num_rows


def test_the_same_content_is_never_written_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, lake = write(tmp_path / "in"), tmp_path / "new" / "lake"
    command = ["csv", "--source", source, "--lake", lake]
    status, facts, _ = run(capsys, *command)
    assert (status, facts["interactions"]["status"], facts["interactions"]["rows_out"]) == (0, "written", 3)
    os.utime(source / "items.csv", (1, 1))  # identity is content: another time or place is the same source
    source.rename(tmp_path / "moved")
    command[2] = tmp_path / "moved"
    for extra in ([], ["--append"]):
        status, facts, err = run(capsys, *command, *extra)
        assert status == 0
        assert facts == {t: {"status": "present", "version": 0} for t in ("items", "interactions")}
        assert "unchanged" in err
    assert (count(lake, "items"), count(lake, "interactions")) == (1, 3)


def test_tables_with_other_content_are_left_alone_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = tmp_path / "lake"
    first = ["csv", "--source", write(tmp_path / "first", 3), "--lake", lake]
    second = ["csv", "--source", write(tmp_path / "second", 5), "--lake", lake]
    third = ["csv", "--source", write(tmp_path / "third", 7, "Bell"), "--lake", lake]
    assert run(capsys, *first)[0] == 0
    status, _, err = run(capsys, *second)
    assert status == 1
    assert "table 'interactions' with other content already; nothing was changed" in err
    assert "--overwrite" in err
    assert DeltaTable(lake / "interactions").version() == 0
    # The second has the first's items: only its interactions are added, and only once.
    for expected in ("appended", "present"):
        status, facts, _ = run(capsys, *second, "--append")
        assert (status, facts["items"]["status"], facts["interactions"]["status"]) == (0, "present", expected)
        assert (count(lake, "items"), count(lake, "interactions")) == (1, 8)
    status, facts, _ = run(capsys, *third, "--overwrite")
    assert (status, facts["interactions"]["status"], facts["interactions"]["version"]) == (0, "replaced", 2)
    assert (count(lake, "items"), count(lake, "interactions")) == (1, 7)
    # What was replaced counts as absent again.
    assert run(capsys, *first)[0] == 1
    assert run(capsys, *first, "--append")[1]["interactions"]["status"] == "appended"
    assert count(lake, "interactions") == 10


def test_a_table_that_someone_else_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lake = tmp_path / "lake"
    write_deltalake(str(lake / "items"), pa.table({"sku": [1], "name": ["x"]}))
    command = ["csv", "--source", write(tmp_path / "in"), "--lake", lake]
    assert "table 'items' with other content already" in run(capsys, *command)[2]
    status, _, err = run(capsys, *command, "--append")
    assert status == 1
    assert "has other columns than ['item_id', 'title', 'text', 'created_at']" in err
    assert count(lake, "items") == 1
    assert run(capsys, *command, "--overwrite")[0] == 0
    assert DeltaTable(lake / "items").to_pyarrow_table().column_names == ["item_id", "title", "text", "created_at"]


def test_only_the_new_interactions_of_a_day(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lake = tmp_path / "lake"
    assert run(capsys, "csv", "--source", write(tmp_path / "in"), "--lake", lake)[0] == 0
    (tmp_path / "day.csv").write_text("user_id,item_id\nu9,a\n")
    day = ["csv", "--interactions", tmp_path / "day.csv", "--lake"]
    assert run(capsys, *day, lake, "--append")[0] == 0
    assert count(lake, "interactions") == 4
    status, _, err = run(capsys, *day, tmp_path / "other")
    assert status == 1
    assert "has table 'items': name a file for each" in err


def test_a_killed_ingest_leaves_whole_tables_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, lake = write(tmp_path / "in", 10), tmp_path / "lake"
    # The interactions come through a pipe that stops in the middle: the process is killed while it waits for more.
    body = b"user_id,item_id\n" + b"".join(b"u%d,a\n" % i for i in range(1_500_000))
    (source / "interactions.csv").write_bytes(body)
    command = [sys.executable, "-m", "jobs.ingest", "csv", "--source", source, "--lake", lake, "--progress", "300000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    writing = False
    for line in process.stderr:
        writing = writing or "[ingest] interactions: reading" in line
        if writing and "rows read" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.stderr.close()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert DeltaTable.is_deltatable(str(lake / "items"))
    assert not DeltaTable.is_deltatable(str(lake / "interactions"))
    status, facts, err = run(capsys, "csv", "--source", source, "--lake", lake)
    assert status == 0, err
    assert (facts["items"]["status"], facts["interactions"]["status"]) == ("present", "written")
    assert count(lake, "interactions") == facts["interactions"]["rows_out"] == 1_500_000


def test_a_file_damaged_far_from_its_beginning_adds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, lake = write(tmp_path / "in"), tmp_path / "lake"
    whole = b"user_id,item_id\n" + b"".join(b"u%d,a\n" % i for i in range(2_000_000))
    (source / "interactions.csv").unlink()
    (source / "interactions.csv.gz").write_bytes(gzip.compress(whole, 1)[:-1000])
    status, _, err = run(capsys, "csv", "--source", source, "--lake", lake)
    assert status == 1
    assert "interactions.csv.gz cannot be read to its end" in err
    assert not DeltaTable.is_deltatable(str(lake / "interactions"))
    (source / "interactions.csv.gz").write_bytes(gzip.compress(whole, 1))
    assert run(capsys, "csv", "--source", source, "--lake", lake)[1]["interactions"]["rows_out"] == 2_000_000


def test_two_ingests_at_once_write_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = tmp_path / "lake"
    assert run(capsys, "csv", "--source", write(tmp_path / "in"), "--lake", lake)[0] == 0
    command = ["csv", "--source", write(tmp_path / "more", 50), "--lake", lake, "--append"]
    looked = ingest._target

    def another_is_faster(at: Lake, table: str, digest: str) -> Any:
        found = looked(at, table, digest)
        if table == "interactions":
            # Between this one's look and its commit, the same ingest runs from its beginning to its end.
            monkeypatch.setattr(ingest, "_target", looked)
            assert run(capsys, *command)[1]["interactions"]["status"] == "appended"
        return found

    monkeypatch.setattr(ingest, "_target", another_is_faster)
    status, _, err = run(capsys, *command)
    assert status == 1
    assert "another process wrote it at the same time, and nothing was added; run again" in err
    assert count(lake, "interactions") == 53
    assert run(capsys, *command)[1]["interactions"]["status"] == "present"


def test_batches_are_made_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def endless(tally: Tally) -> Iterator[pa.RecordBatch]:
        for number in range(2_000):
            made.append(number)
            tally.rows_in += 1
            yield pa.record_batch({"user_id": ["u"], "item_id": [str(number)]})

    stream = ingest._Stream("interactions", TableSource((), endless), None, 10**6)
    stream.begin()
    assert made == [0]
    reader = stream.reader()
    for _ in range(5):
        reader.read_next_batch()
    assert len(made) <= 6
    assert reader.read_all().num_rows == 1_995
    assert stream.tally.balanced()


def test_rows_that_do_not_add_up_stop_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in")
    honest = csv_files.open_source(Request(source=source))

    def forgetful(tally: Tally) -> Iterator[pa.RecordBatch]:
        yield from honest["interactions"].read(tally)
        tally.rows_in += 1

    broken = {**honest, "interactions": TableSource(honest["interactions"].files, forgetful)}
    monkeypatch.setattr(csv_files, "open_source", lambda request: broken)
    with pytest.raises(ingest.IngestError, match="rows do not add up"):
        ingest.ingest("csv", Request(source=source), Lake(str(tmp_path / "lake")))
    assert not DeltaTable.is_deltatable(str(tmp_path / "lake" / "interactions"))


def _peak_mb(source: Path, lake: Path) -> float:
    code = (
        "import resource, sys; from jobs import ingest; status = ingest.main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "csv", "--source", str(source), "--lake", str(lake)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) / 1024


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    text = "word " * 1_000  # 5 kB
    peaks = {}
    for items in (20_000, 80_000):  # 100 MB, 400 MB
        source = write(tmp_path / f"in-{items}")
        (source / "items.csv").unlink()
        with gzip.open(source / "items.csv.gz", "wb", 1) as stream:
            stream.write(b"item_id,title,text\n")
            for start in range(0, items, 500):
                stream.write("".join(f"{i},title {i},{text}\n" for i in range(start, start + 500)).encode())
        peaks[items] = _peak_mb(source, tmp_path / f"lake-{items}")
    assert peaks[80_000] < peaks[20_000] + 120, peaks
