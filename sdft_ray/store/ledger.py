"""The ledger keeps the generations of an engine in small durable pieces, so that a crash loses few.

In: lines, one for each request of a sample of a row. Out: the lines of any row, from disk. A piece is a Parquet file
that is written under another name, synced and renamed: it is never partial. `compact` merges pieces into one; a merged
piece names the pieces that it holds, so a kill between writing it and deleting them doubles nothing. Readers go
through a database on local disk: memory does not grow with the number of rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_KINDS = ("string", "int32", "string", "string", "int32", "int32", "int64")
_HOLDS = b"holds"  # of a merged piece's metadata: the names of the pieces in it
_READ_ROWS = 1024
_GROUP_ROWS = 4096  # of a merged piece: readers hold metadata of every group


class Line(NamedTuple):
    """What an engine made of one sample of a row."""

    id: str
    """Of the row."""
    sample: int
    text: str
    finish_reason: str
    prompt_tokens: int
    tokens: int
    sampling_seed: int


Lines = dict[str, list[Line]]
"""For each row id its lines, in no order."""


def write_piece(ledger: Path, batch: str, lines: Sequence[Line]) -> Path:
    """Write lines as one piece and return it; `batch` names it, so that a repeated batch finds what it wrote."""
    import pyarrow as pa

    table = pa.Table.from_pylist([line._asdict() for line in lines], _schema())
    path = ledger / f"part-{batch}-{uuid.uuid4().hex[:8]}.parquet"
    _write(path, table.schema, table.to_batches())
    return path


def read_batch(ledger: Path, batch: str) -> Iterator[list[Line]]:
    """Yield the lines of each piece that a batch wrote since the ledger was last compacted."""
    for path in sorted(ledger.glob(f"part-{batch}-*.parquet")):
        yield [Line._make(values) for lines in _read(path) for values in _values(lines)]


def compact(ledger: Path) -> None:
    """Merge all pieces into one; the next call finishes an interrupted one."""
    paths, merged_names = _pieces(ledger)
    if len(paths) > 1:
        names = [path.name for path in paths] + [name for name in sorted(merged_names) if (ledger / name).exists()]
        schema = _schema().with_metadata({_HOLDS: json.dumps(names)})
        merged = ledger / f"part-merged-{uuid.uuid4().hex[:8]}.parquet"
        _write(merged, schema, (lines for path in paths for lines in _read(path)))
        merged_names |= {path.name for path in paths}
    for name in merged_names:
        (ledger / name).unlink(missing_ok=True)
    for torn in ledger.glob(".*.tmp"):  # of a write that a kill cut short
        torn.unlink(missing_ok=True)


@contextlib.contextmanager
def open_ledger(ledger: Path) -> Iterator[Callable[[Iterable[str]], Lines]]:
    """Yield a function from row ids to their lines, as the ledger holds them now."""
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(sqlite3.connect(f"{folder}/lines")) as database:
        database.execute("PRAGMA journal_mode=OFF")
        database.execute("PRAGMA synchronous=OFF")
        database.execute(f"CREATE TABLE lines ({', '.join(Line._fields)})")
        places = ", ".join("?" * len(Line._fields))
        for path in _pieces(ledger)[0]:
            for lines in _read(path):
                database.executemany(f"INSERT INTO lines VALUES ({places})", _values(lines))
        database.execute("CREATE INDEX by_id ON lines (id)")

        def lines_of(ids: Iterable[str]) -> Lines:
            found: Lines = {row_id: [] for row_id in ids}
            asked = ", ".join("?" * len(found))
            for values in database.execute(f"SELECT * FROM lines WHERE id IN ({asked})", list(found)):
                line = Line._make(values)
                found[line.id].append(line)
            return found

        yield lines_of


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([(name, getattr(pa, kind)()) for name, kind in zip(Line._fields, _KINDS, strict=True)])


def _values(lines: Any) -> Iterator[tuple[Any, ...]]:
    """Return the lines of a record batch, each as its values."""
    return zip(*(lines.column(name).to_pylist() for name in Line._fields), strict=True)


def _pieces(ledger: Path) -> tuple[list[Path], set[str]]:
    """Return the pieces that count, and the names of pieces that a merged one holds."""
    import pyarrow.parquet as pq

    paths = sorted(ledger.glob("part-*.parquet"))
    merged_names: set[str] = set()
    for path in paths:
        if path.name.startswith("part-merged-"):
            merged_names |= set(json.loads(pq.read_metadata(path).metadata[_HOLDS]))
    return [path for path in paths if path.name not in merged_names], merged_names


def _read(path: Path) -> Iterator[Any]:
    """Yield a piece as record batches."""
    import pyarrow.parquet as pq

    yield from pq.ParquetFile(path).iter_batches(_READ_ROWS)


def _write(path: Path, schema: Any, batches: Iterable[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = path.with_name(f".{path.name}.tmp")
    waiting: list[Any] = []
    with pq.ParquetWriter(temporary, schema) as writer:

        def write() -> None:
            writer.write_table(pa.Table.from_batches(waiting).cast(schema))
            waiting.clear()

        for lines in batches:
            waiting.append(lines)
            if sum(map(len, waiting)) >= _GROUP_ROWS:
                write()
        if waiting:
            write()
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.rename(path)
