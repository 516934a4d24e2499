"""Read the records of one file, whatever its kind, each with the place it stands at.

In: a .json, .jsonl, .csv, .parquet or .arrow file; the texts also packed as .gz or .zst; or a span of a file that can
be entered in its middle. Out: one record at a time, so that a reader who wants few of them reads no further (but a
.json file is one value, which is read whole). This module does not know the meaning of the values.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from sdft_ray.data.text import decode, first_bytes, first_line, load_json, parse_json, require_format, require_text
from sdft_ray.errors import UserError, problem

KINDS = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
ROW_FILE = "a .json, .jsonl, .csv, .parquet or .arrow file"
_TEXTS = (".json", ".jsonl", ".csv", ".txt")
_PACKINGS = {".gz": "gzip", ".zst": "zstd"}  # as Arrow calls them
_ROWS_AT_ONCE = 1000  # of a table that become Python objects together


class Span(NamedTuple):
    """A range of a file: the lines of a .jsonl file that begin between two bytes, or row groups of a Parquet file."""

    start: int = 0
    stop: int | None = None
    """The first byte or row group behind it; None for the file's end."""
    first: int = 1
    """The number of its first line or row in the file."""


WHOLE = Span()


class Record(NamedTuple):
    """The values of one record, by column."""

    where: str
    """Its file, with the line or the number of the row."""
    named_in: str
    """Where its columns are named: in the record itself, or in the header of its file."""
    values: dict[str, Any]
    names_its_own: bool = False
    """Whether it names its columns itself, as JSON does, and may leave out what has no value."""

    def names(self) -> list[str]:
        """Return the names of the columns, each short and on one line (without a header they are texts), in quotes
        where blanks around them would not be seen."""
        names = [" ".join(name.split())[:40] for name in self.values]
        return [repr(name) if name != name.strip() else short for name, short in zip(self.values, names, strict=True)]


def kind(path: Path) -> str:
    """Return the suffix that names a file's format, lower case, without the packing of a text.

    >>> kind(Path("rows.CSV.gz")), kind(Path("rows.parquet")), kind(Path("rows.parquet.gz"))
    ('.csv', '.parquet', '.parquet.gz')
    """
    suffix, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    if suffix not in _PACKINGS:
        return suffix
    return inner if inner in _TEXTS else inner + suffix


def stem(path: Path) -> str:
    """Return a file's name without the suffixes of its format and packing."""
    return Path(path.stem).stem if path.suffix.lower() in _PACKINGS else path.stem


def describe_kind(path: Path) -> str:
    """Return the problem of a file of an unknown format."""
    suffix = kind(path)
    return f"is a {suffix} file, which is not known" if suffix else "has no suffix that names its format"


def read_records(path: Path, span: Span = WHOLE) -> Iterator[Record]:
    """Yield the records of a file, or of a span of it; raises UserError with the place of a mistake."""
    match kind(path):
        case ".jsonl":
            yield from _read_lines(path, span)
        case ".parquet" | ".arrow":
            yield from _read_table(path, span)
        case ".json":
            yield from _read_list(path)
        case ".csv":
            yield from _read_csv(path)
        case _:
            raise UserError(problem(str(path), describe_kind(path), f"Save it as {ROW_FILE}"))


def can_be_cut(path: Path) -> bool:
    """Return whether a file can be entered in its middle: a packed one cannot, and a CSV value may go over lines."""
    return kind(path) == ".parquet" or (kind(path) == ".jsonl" and path.suffix.lower() not in _PACKINGS)


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[IO[bytes]]:
    """Yield the unpacked bytes of a text file; raises UserError where its packing or its encoding is wrong."""
    require_format(start := first_bytes(path), path)
    packing = _PACKINGS.get(path.suffix.lower())
    if packing is None:
        require_text(start, path)
        with path.open("rb") as plain:
            yield plain
        return
    import pyarrow

    try:
        if not start:
            raise OSError("Truncated: no bytes at all")
        with io.BufferedReader(pyarrow.input_stream(str(path), compression=packing), 1 << 20) as unpacked:
            require_text(unpacked.peek(1), path)
            yield unpacked
    except OSError as error:
        what = "is cut off" if "Truncated" in str(error) else f"cannot be unpacked ({first_line(error)})"
        raise UserError(problem(str(path), what, "Copy or download it again")) from None


def _at(place: str, values: dict[str, Any]) -> Record:
    return Record(place, place, values, True)


# --- JSON -----------------------------------------------------------------------------------------------------


def _read_lines(path: Path, span: Span) -> Iterator[Record]:
    with open_text(path) as lines:
        if span.start:  # inside a line, which belongs to the span before; or at a line's start
            lines.seek(span.start - 1)
            lines.readline()
        at = lines.tell() if span != WHOLE else 0
        for number, line in enumerate(lines, span.first):
            if span.stop is not None and at >= span.stop:
                return
            at += len(line)
            if text := decode(line, f"{path}:{number}").strip():
                yield _at(f"{path}:{number}", _parse_record(text, path, number))


def _parse_record(line: str, path: Path, number: int) -> dict[str, Any]:
    where = f"{path}:{number}"
    if number == 1 and line.startswith("["):
        raise UserError(problem(str(path), "is a JSON list, not one object a line", "Rename it to end in .json"))
    try:
        record = load_json(line)
    except json.JSONDecodeError as error:
        do = "Fix this line: write one {...}"
        raise UserError(problem(where, f"is not JSON ({error.msg} at column {error.colno})", do)) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(problem(where, f"cannot be read ({first_line(error)})", "Fix this line")) from None
    if not isinstance(record, dict):
        raise UserError(problem(where, "is not an object", "Write one {...} a line"))
    return record


def _read_list(path: Path) -> Iterator[Record]:
    with open_text(path) as file:
        text = decode(file.read(), str(path))
    for number, record in enumerate(_parse_list(text, path), 1):
        if not isinstance(record, dict):
            raise UserError(problem(f"{path}:{number}", "is not an object", "Give a list of objects"))
        yield _at(f"{path}:{number}", record)


def _parse_list(text: str, path: Path) -> list[Any]:
    try:
        records = parse_json(text, path, load_json) if text.strip() else []
    except UserError:
        if _is_object(text.strip().partition("\n")[0]):
            raise UserError(problem(str(path), "holds JSON lines, not a list", "Rename it to end in .jsonl")) from None
        raise
    if isinstance(records, list):
        return records
    what, do = "is not a list", "Give a list of objects"
    if isinstance(records, dict):
        lists = [name for name, value in records.items() if isinstance(value, list)]
        what = f"is an object, not a list ({'with a list in' if lists else 'of'} {', '.join(lists or records)})"
        do = "Save one list of objects by itself" if lists else do
    raise UserError(problem(str(path), what, do))


def _is_object(text: str) -> bool:
    try:
        return isinstance(load_json(text), dict)
    except (ValueError, RecursionError):
        return False


# --- tables ---------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Iterator[Record]:
    """Yield the records of a CSV file whose first line names the columns; every value is text."""
    header: list[str] = []
    header_at = ""
    for number, cells in _csv_lines(path):
        where = f"{path}:{number}"
        if not header:
            header, header_at = cells, f"the header {where}"
            _require_header(header, where)
        elif len(cells) != len(header):
            what = f"has another number of values than the header (got {len(cells)}; expected {len(header)})"
            raise UserError(problem(where, what, "Fix this line"))
        else:
            yield Record(where, header_at, dict(zip(header, cells, strict=True)))


def _require_header(names: list[str], where: str) -> None:
    """Raise UserError for a header that names no columns as it should. Columns without a name are nobody's."""
    _require_distinct([name for name in names if name], where)
    if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
        what = f"has one column, and {'a tab' if mark == chr(9) else mark} in its name"
        raise UserError(problem(where, what, "Save the file with commas between values"))


def _require_distinct(names: list[str], where: str) -> None:
    """Raise UserError for a table that has two columns of one name."""
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(problem(where, f"names the column {twice} twice", "Rename one of them"))


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, values) of each line of a CSV file; quoted values may go over several lines."""
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the 128 KiB that Python allows
    with open_text(path) as file:
        lines = csv.reader((decode(line, f"{path}:{n}") for n, line in enumerate(file, 1)), strict=True)
        first = 1
        while True:
            try:
                cells = next(lines, None)
            except csv.Error as error:
                raise UserError(problem(f"{path}:{first}", f"is not CSV ({error})", "Fix this line")) from None
            if cells is None:
                return
            if cells:
                yield first, cells
            first = lines.line_num + 1


def _read_table(path: Path, span: Span) -> Iterator[Record]:
    """Yield the records of a Parquet or Arrow file, a few of its rows at a time."""
    import pyarrow

    require_format(first_bytes(path), path)
    parquet = kind(path) == ".parquet"
    number = span.first - 1
    try:
        for batch in _parquet_batches(path, span) if parquet else _arrow_batches(path):
            _require_distinct(batch.schema.names, str(path))
            batch.validate(full=True)  # or values of a damaged file are read from anywhere in memory
            for values in values_of(batch):
                number += 1
                yield Record(place := f"{path}:{number}", place, values)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        what = f"cannot be read as {'Parquet' if parquet else 'Arrow'} ({first_line(error)})"
        raise UserError(problem(str(path), what, "Give a valid file")) from None


def values_of(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the values of each row of an Arrow batch by column, as a line of JSON would give them."""
    own = {field.name: _own(field.type) for field in batch.schema}
    for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
        for values in _in_decimals(batch.slice(start, _ROWS_AT_ONCE)).to_pylist():
            yield {name: own[name](value) for name, value in values.items()}


def _in_decimals(batch: Any) -> Any:
    """Return a batch whose numbers of 32 bits and less are those that people see: 0.1, not 0.10000000149011612."""
    import pyarrow

    for i, field in enumerate(batch.schema):
        if field.type in (pyarrow.float32(), pyarrow.float16()):
            numbers = batch.column(i).cast(pyarrow.float32()).cast(pyarrow.string()).cast(pyarrow.float64())
            batch = batch.set_column(i, field.name, numbers)
    return batch


def _own(kind: Any) -> Callable[[Any], Any]:
    """Return what makes a value of an Arrow type that of its row alone: tables write the keys of all objects into each,
    as null, and values of several kinds as JSON."""
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return lambda value: None if value is None else load_json(value)
    if pyarrow.types.is_struct(kind):
        fields = {field.name: _own(field.type) for field in kind}
        return lambda value: value and {key: fields[key](inner) for key, inner in value.items() if inner is not None}
    if pyarrow.types.is_nested(kind) and hasattr(kind, "value_type"):
        own = _own(kind.value_type)
        return lambda value: value and [own(inner) for inner in value]
    return lambda value: value


def _parquet_batches(path: Path, span: Span) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, buffer_size=1 << 20) as file:  # else a column of a whole row group is held at once
        groups = [*range(file.num_row_groups)][span.start : span.stop]
        yield from file.iter_batches(_ROWS_AT_ONCE, row_groups=groups)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Yield the batches of an Arrow file, or of an Arrow stream, which `datasets` saves under the same suffix."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        if is_stream:
            yield from pyarrow.ipc.open_stream(file)
        else:
            reader = pyarrow.ipc.open_file(file)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
