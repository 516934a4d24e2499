"""The ledger keeps the generations of an engine in small durable pieces, so that a crash loses few.

In: lines, one for each request of a sample of a row. Out: the lines of any row, from disk. A piece is a Parquet file
that is written under another name, synced and renamed: it is never partial. Pieces are merged, those of a batch once it
is finished, all that are small by `compact`; a merged piece names the pieces that it holds, so a kill between writing
it and deleting them doubles nothing. A merged piece is full at about a million lines and then stays as it is: a ledger
that grows does not write again what it has, and a kill costs the merge of one piece.

There is no index. Rows are asked for in an order that has nothing to do with when their lines were written, so the
lines of a thousand rows lie in a thousand places, and each look-up would decode nearly every row group. Readers pass
over `parts_of` the ledger once instead and keep what they need.
"""

from __future__ import annotations

import itertools
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_KINDS = ("string", "int32", "string", "string", "int32", "int32", "int64")
_HOLDS = b"holds"  # of a merged piece's metadata: the names of the pieces in it
_MERGED = "merged"  # in the name of a merged piece
_ALL = "all"  # instead of a batch in the name of one that `compact` made
_READ_ROWS = 1024
_GROUP_ROWS = 4096  # of a merged piece: readers hold metadata of every group
_FULL_LINES = 2**20  # of a merged piece, which is not merged again


class Line(NamedTuple):
    """What an engine made of one sample of a row."""

    id: str
    """Of the row."""
    sample: int
    text: str
    finish_reason: str
    prompt_tokens: int
    tokens: int
    sampling_seed: int | None
    """None where the engine drew all texts by one generator."""


Lines = dict[str, list[Line]]
"""For each row id its lines, in no order."""


class Part(NamedTuple):
    """Some row groups of a piece."""

    name: str
    """Of the piece."""
    groups: tuple[int, ...]


def write_piece(ledger: Path, batch: str, lines: Sequence[Line]) -> Path:
    """Write lines as one piece and return it; `batch` names it, so that a repeated batch finds what it wrote."""
    import pyarrow as pa

    schema = _schema()
    columns = [pa.array(values, kind) for values, kind in zip(zip(*lines, strict=True), schema.types, strict=True)]
    path = ledger / f"part-{batch}-{uuid.uuid4().hex[:8]}.parquet"
    _write(path, schema, pa.table(columns, schema).to_batches())
    return path


def read_batch(ledger: Path, batch: str) -> Iterator[list[Line]]:
    """Yield the lines of each piece that a batch wrote since the ledger was last compacted; nothing for those that
    another one holds."""
    paths, held = _pieces(ledger, batch)
    for path in paths:
        yield [line for lines in _read(path) for line in to_lines(lines)]
    yield from itertools.repeat([], len(held))


def merge_batch(ledger: Path, batch: str) -> tuple[Path | None, list[Path]]:
    """Merge the pieces of a batch; return the merged piece, if there was more than one, and those that it holds."""
    paths, held = _pieces(ledger, batch)
    remains = [ledger / name for name in sorted(held) if (ledger / name).exists()]
    if len(paths) < 2:
        return None, remains
    return _merge(ledger, batch, paths, remains), paths + remains


def compact(ledger: Path) -> None:
    """Merge all pieces that are not full, so that none is named after a batch; the next call finishes an interrupted
    one."""
    paths, held = _pieces(ledger)
    remains = [ledger / name for name in sorted(held) if (ledger / name).exists()]
    for group in _fill(paths):
        if len(group) > 1 or not _is_compacted(group[0]):
            _merge(ledger, _ALL, group, remains)
            for path in group:
                path.unlink()
    for path in (*remains, *ledger.glob(".*.tmp")):  # and what a kill left of a write
        path.unlink(missing_ok=True)


def parts_of(ledger: Path, lines: int) -> list[Part]:
    """Return the ledger's content as parts of about so many lines."""
    import pyarrow.parquet as pq

    parts = []
    for path in _pieces(ledger)[0]:
        count = pq.read_metadata(path).num_row_groups
        size = max(1, lines // _GROUP_ROWS)
        parts += [Part(path.name, tuple(range(i, min(i + size, count)))) for i in range(0, count, size)]
    return parts


def read_part(ledger: Path, part: Part) -> Any:
    """Return a part as an Arrow table of lines."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(ledger / part.name).read_row_groups(part.groups)


def to_lines(lines: Any) -> list[Line]:
    """Return the lines of an Arrow table or record batch."""
    columns = (lines.column(name).to_pylist() for name in Line._fields)
    return [Line._make(values) for values in zip(*columns, strict=True)]


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([(name, getattr(pa, kind)()) for name, kind in zip(Line._fields, _KINDS, strict=True)])


def _pieces(ledger: Path, batch: str = "*") -> tuple[list[Path], set[str]]:
    """Return the pieces of a batch, or of all, that count, and the names of pieces that a merged one holds."""
    import pyarrow.parquet as pq

    paths = sorted(ledger.glob(f"part-{batch}-*.parquet"))
    held: set[str] = set()
    for path in paths:
        if f"-{_MERGED}-" in path.name:
            held |= set(json.loads(pq.read_metadata(path).metadata[_HOLDS]))
    return [path for path in paths if path.name not in held], held


def _fill(paths: Iterable[Path]) -> Iterator[list[Path]]:
    """Yield pieces in groups that are full, without those that are by themselves."""
    import pyarrow.parquet as pq

    group, lines = [], 0
    for path in paths:
        count = pq.read_metadata(path).num_rows
        if count >= _FULL_LINES and _is_compacted(path):
            continue
        group.append(path)
        lines += count
        if lines >= _FULL_LINES:
            yield group
            group, lines = [], 0
    if group:
        yield group


def _is_compacted(path: Path) -> bool:
    return path.name.startswith(f"part-{_ALL}-")


def _merge(ledger: Path, batch: str, paths: Sequence[Path], remains: Sequence[Path]) -> Path:
    """Write the lines of pieces as one, which also holds the `remains` of earlier merges; return it."""
    schema = _schema().with_metadata({_HOLDS: json.dumps([path.name for path in (*paths, *remains)])})
    merged = ledger / f"part-{batch}-{_MERGED}-{uuid.uuid4().hex[:8]}.parquet"
    _write(merged, schema, (lines for path in paths for lines in _read(path)))
    return merged


def _read(path: Path) -> Iterator[Any]:
    """Yield a piece as record batches."""
    import pyarrow.parquet as pq

    yield from pq.ParquetFile(path).iter_batches(_READ_ROWS)


def _write(path: Path, schema: Any, batches: Iterable[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = path.with_name(f".{path.name}.tmp")
    waiting: list[Any] = []
    with pq.ParquetWriter(temporary, schema, use_dictionary=["finish_reason"]) as writer:  # all else differs by line

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
