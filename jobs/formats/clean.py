"""From raw batches to the types of a table's contract; a row that does not fit is rejected with a reason, never an error.

Reasons: broken_utf8, null_<key column>, bad_<column> (no number, no time, out of range), weight_not_positive. A row is
counted once, under the first that applies. An empty string counts as null.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.formats.contract import FormatError, Tally
from schemas.table import Table

UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}
_US = pa.timestamp("us", tz="UTC")
# Years 1 to 9999, in microseconds: what Spark, Python and pandas all can show.
_EARLIEST, _LATEST = -62_135_596_800_000_000, 253_402_300_799_999_999

Parsed = tuple[pa.Array, np.ndarray]  # values, and which of them could not be parsed (null in the values)


def conform(batch: pa.RecordBatch, contract: Table, tally: Tally, time_unit: str | None = None) -> pa.RecordBatch:
    """The rows of `batch` that fit `contract`, in its columns and types; the others go to `tally`.

    Args:
        batch: columns under our names; an absent optional one becomes typed nulls.
        time_unit: s, ms or us, of times given as numbers; by default their magnitude tells (below 1e11 seconds, below
            1e14 milliseconds, below 1e17 microseconds, else nanoseconds).

    Raises:
        FormatError: a column has a type that cannot be read at all, such as a list of ids.
    """
    rows = batch.num_rows
    arrays: list[pa.Array] = []
    broken = np.zeros(rows, dtype=bool)
    faults: list[tuple[str, np.ndarray]] = [("broken_utf8", broken)]
    for column in contract.columns:
        if column.name not in batch.schema.names:
            arrays.append(pa.nulls(rows, column.arrow_type))
            continue
        raw = batch.column(column.name)
        raw = raw.dictionary_decode() if pa.types.is_dictionary(raw.type) else raw
        if not _readable(raw.type, column.type):
            raise FormatError(
                f"{tally.table}.{column.name} must be a {column.type}, and the source's column for it holds {raw.type}; "
                "map another one with --map, or leave it out"
            )
        undecoded = np.zeros(rows, dtype=bool)
        if _is_text(raw.type):
            raw, undecoded = _decode(raw)
            broken |= undecoded
        values, bad = _parse(raw, column.type, time_unit)
        faults.append((f"bad_{column.name}", bad))
        if column.name in contract.key or column.name in ("user_id", "item_id") or not column.nullable:
            faults.append((f"null_{column.name}", _mask(pc.is_null(values)) & ~undecoded & ~bad))
        if column.name == "weight":
            faults.append(("weight_not_positive", _mask(pc.less_equal(values, 0.0))))
        arrays.append(values)
    rejected = np.zeros(rows, dtype=bool)
    for reason, mask in faults:
        new = np.flatnonzero(mask & ~rejected)
        if len(new):
            tally.reject(reason, _show(batch, int(new[0])), len(new))
            for index in new[1:]:
                if not tally.wants_example(reason):
                    break
                tally.reject(reason, _show(batch, int(index)), 0)
        rejected |= mask
    names = [c.name for c in contract.columns]
    clean = pa.RecordBatch.from_arrays(arrays, names=names)
    if rejected.any():
        clean = clean.filter(pa.array(~rejected))
    tally.rows_out += clean.num_rows
    return pa.RecordBatch.from_arrays(clean.columns, schema=contract.arrow_schema)


def _is_text(kind: pa.DataType) -> bool:
    t = pa.types
    return any(
        test(kind)
        for test in (t.is_string, t.is_large_string, t.is_string_view, t.is_binary, t.is_large_binary, t.is_binary_view)
    )


def _readable(kind: pa.DataType, wanted: str) -> bool:
    t = pa.types
    if t.is_null(kind) or _is_text(kind):
        return True
    number = t.is_integer(kind) or t.is_floating(kind)
    if wanted == "timestamp":
        return number or t.is_timestamp(kind) or t.is_date(kind)
    return number or t.is_decimal(kind)


def _mask(flags: pa.Array) -> np.ndarray:
    return np.asarray(pc.fill_null(flags, False).to_numpy(zero_copy_only=False), dtype=bool)


def _decode(raw: pa.Array) -> Parsed:
    """Valid UTF-8 strings; Arrow files may hold broken ones in columns that say string."""
    none = np.zeros(len(raw), dtype=bool)
    try:
        # A cast from bytes checks the encoding; one between string types does not.
        as_bytes = raw if pa.types.is_binary(raw.type) else raw.cast(pa.binary())
        return as_bytes.cast(pa.string()), none
    except pa.ArrowInvalid:
        values: list[str | None] = []
        for index, value in enumerate(as_bytes.to_pylist()):
            try:
                values.append(None if value is None else value.decode("utf-8"))
            except UnicodeDecodeError:
                values.append(None)
                none[index] = True
        return pa.array(values, pa.string()), none


def _parse(raw: pa.Array, wanted: str, time_unit: str | None) -> Parsed:
    if wanted == "timestamp":
        return _times(raw, time_unit)
    if wanted in ("double", "long"):
        return _numbers(raw, pa.float64() if wanted == "double" else pa.int64())
    return _strings(raw)


def _strings(raw: pa.Array) -> Parsed:
    bad = np.zeros(len(raw), dtype=bool)
    if pa.types.is_floating(raw.type) or pa.types.is_decimal(raw.type):
        # An id column with nulls is often stored as floats: 12.0 is the id 12.
        raw, bad = _numbers(raw, pa.int64())
    values = raw.cast(pa.string())
    return pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values), bad


def _each(raw: pa.Array, kind: pa.DataType, one: Callable[[str], Any]) -> Parsed:
    """Value by value: for a batch in which some value made the fast cast fail."""
    bad = np.zeros(len(raw), dtype=bool)
    values: list[Any] = []
    for index, text in enumerate(raw.to_pylist()):
        try:
            values.append(None if text is None else one(text))
        except (ValueError, OverflowError):
            values.append(None)
            bad[index] = True
    return pa.array(values, kind), bad


def _whole(text: str) -> int:
    value = float(text) if "_" not in text else float("nan")
    if not value.is_integer() or abs(value) >= 2**63:
        raise ValueError(text)
    return int(text) if text.lstrip("+-").isdecimal() else int(value)


def _decimal(text: str) -> float:
    if "_" in text:
        raise ValueError(text)
    return float(text)


def _numbers(raw: pa.Array, kind: pa.DataType) -> Parsed:
    bad = np.zeros(len(raw), dtype=bool)
    if pa.types.is_string(raw.type):
        raw = _stripped(raw)
        try:
            values = raw.cast(kind)
        except pa.ArrowInvalid:
            values, bad = _each(raw, kind, _decimal if pa.types.is_floating(kind) else _whole)
    elif pa.types.is_integer(kind) and (pa.types.is_floating(raw.type) or pa.types.is_decimal(raw.type)):
        floats = raw.cast(pa.float64())
        # NaN in a column of whole numbers is how data frames write null.
        floats = pc.if_else(pc.is_nan(floats), pa.scalar(None, pa.float64()), floats)
        whole = pc.and_(pc.equal(pc.floor(floats), floats), pc.less(pc.abs(floats), 2.0**63))
        bad = _mask(pc.invert(whole))
        values = pc.if_else(pa.array(bad), pa.scalar(None, pa.float64()), floats).cast(kind, safe=False)
    else:
        try:
            values = raw.cast(kind, safe=pa.types.is_integer(kind))
        except pa.ArrowInvalid:  # unsigned numbers beyond int64
            values, bad = _each(raw.cast(pa.string()), kind, _whole)
    if pa.types.is_floating(kind):
        odd = _mask(pc.invert(pc.is_finite(values)))
        bad = bad | odd
        values = pc.if_else(pa.array(odd), pa.scalar(None, kind), values)
    return values, bad


def _stripped(raw: pa.Array) -> pa.Array:
    raw = pc.utf8_trim_whitespace(raw)
    return pc.if_else(pc.equal(raw, ""), pa.scalar(None, pa.string()), raw)


def _times(raw: pa.Array, unit: str | None) -> Parsed:
    bad = np.zeros(len(raw), dtype=bool)
    kind = raw.type
    if pa.types.is_string(kind):
        raw = _stripped(raw)
        try:
            return _epoch(raw.cast(pa.int64()), unit)
        except pa.ArrowInvalid:
            pass
        try:
            return raw.cast(pa.timestamp("us")).cast(_US), bad
        except pa.ArrowInvalid:
            micros, bad = _each(raw, pa.int64(), lambda text: _instant(text, unit))
            return micros.cast(_US), bad
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        # A time without a zone is UTC. Nanoseconds are cut; a coarser unit that overflows is an error.
        times = raw.cast(pa.timestamp("ms")) if pa.types.is_date(kind) else raw
        try:
            safe = times.type.unit != "ns"
            return _bounded(times.cast(pa.timestamp("us", tz=times.type.tz), safe=safe).cast(_US), bad)
        except pa.ArrowInvalid:
            unit = times.type.unit
            micros, bad = _each(times.cast(pa.int64()).cast(pa.string()), pa.int64(), lambda v: _scaled(v, unit))
            return micros.cast(_US), bad
    if pa.types.is_floating(kind):
        floats = pc.if_else(pc.is_nan(raw.cast(pa.float64())), pa.scalar(None, pa.float64()), raw.cast(pa.float64()))
        micros, bad = _each(floats, pa.int64(), lambda value: _number_instant(value, unit))  # type: ignore[arg-type]
        return micros.cast(_US), bad
    if pa.types.is_null(kind):
        return raw.cast(_US), bad
    return _epoch(raw.cast(pa.int64(), safe=False), unit)


def _bounded(times: pa.Array, bad: np.ndarray) -> Parsed:
    micros = times.cast(pa.int64())
    out = _mask(pc.or_(pc.less(micros, _EARLIEST), pc.greater(micros, _LATEST)))
    return pc.if_else(pa.array(out), pa.scalar(None, _US), times), bad | out


def _epoch(values: pa.Array, unit: str | None) -> Parsed:
    """Whole numbers since 1970 as times."""
    null = _mask(pc.is_null(values))
    v = pc.fill_null(values, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if unit is None:
        size = np.abs(v.astype(np.float64))
        steps = [size < 1e11, size < 1e14, size < 1e17]
        factor = np.select(steps, [1_000_000, 1_000, 1], 0)
        micros = np.where(factor > 0, v * factor, v // 1000)
        bad = np.zeros(len(v), dtype=bool)
    else:
        limit = _LATEST // UNITS[unit]
        bad = (v > limit) | (v < -limit)
        micros = np.where(bad, 0, v) * UNITS[unit]
    bad |= (micros < _EARLIEST) | (micros > _LATEST)
    return pa.array(np.where(bad, 0, micros), mask=null | bad, type=pa.int64()).cast(_US), bad


def _scaled(text: str, unit: str) -> int:
    micros = int(text) * UNITS[unit]
    if not _EARLIEST <= micros <= _LATEST:
        raise ValueError(text)
    return micros


def _number_instant(value: float, unit: str | None) -> int:
    size = abs(value)
    factor = (
        float(UNITS[unit]) if unit else next((f for b, f in ((1e11, 1e6), (1e14, 1e3), (1e17, 1.0)) if size < b), 1e-3)
    )
    micros = round(value * factor)  # infinity: OverflowError
    if not _EARLIEST <= micros <= _LATEST:
        raise ValueError(value)
    return micros


def _instant(text: str, unit: str | None) -> int:
    """Microseconds of a number or of an ISO 8601 time (UTC unless it names a zone)."""
    try:
        number = _decimal(text)
    except ValueError:
        when = datetime.fromisoformat(text)
        since = (when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
        return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    if text.lstrip("+-").isdecimal() and unit:
        return _scaled(text, unit)
    return _number_instant(number, unit)


def _show(batch: pa.RecordBatch, index: int) -> str:
    """Row `index` for a person, whatever bytes it holds."""
    shown = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = column[index].as_py()
            shown[name] = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
        except UnicodeDecodeError:
            shown[name] = "(broken UTF-8)"
        except (ValueError, OverflowError):  # a time that Python cannot show
            shown[name] = str(column[index])
    return ", ".join(f"{name}={value[:40]!r}" for name, value in shown.items())
