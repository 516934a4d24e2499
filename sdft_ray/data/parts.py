"""Cut a row source into parts that processes can read side by side, and read one of them.

In: a row source. Out: its parts, in the source's order, and the rows of a part. Only .jsonl and Parquet files can be
entered in their middle, so any other file is in one part. Lines are numbered while they are read, and a part does not
know how many come before it: these are counted once a mistake has to be named, not for every part of every file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from sdft_ray.core.rows import Row
from sdft_ray.data.files import find_files
from sdft_ray.data.readers import iterate_rows, rows_of
from sdft_ray.data.records import WHOLE, Span, can_be_cut, kind, read_records
from sdft_ray.errors import UserError
from sdft_ray.spec.sources import FileRows, RowSource


class Piece(NamedTuple):
    """A file, or a span of one."""

    path: Path
    span: Span
    size: int
    """In bytes; of Parquet unpacked."""


Part = tuple[Piece, ...]
"""Pieces that follow each other; none stand for everything in the source, up to its limit."""


def find_parts(source: RowSource, size: int) -> list[Part]:
    """Return the parts of a source, each of about `size` bytes where its files can be cut.

    A limit counts records from the source's start, so what has one is a single part, and so is what is no file.
    """
    if not isinstance(source, FileRows) or source.limit is not None:
        return [()]
    parts: list[list[Piece]] = [[]]
    filled = 0
    for piece in (piece for path in find_files(source.path) for piece in _cut(path, size)):
        if parts[-1] and filled + piece.size > size:
            parts.append([])
            filled = 0
        parts[-1].append(piece)
        filled += piece.size
    return [tuple(part) for part in parts]


def _cut(path: Path, size: int) -> Iterator[Piece]:
    total = path.stat().st_size
    if not can_be_cut(path):
        yield Piece(path, WHOLE, total)
    elif kind(path) == ".parquet":
        yield from _cut_table(path)
    else:
        for start in range(0, max(1, total), size):
            stop = start + size if start + size < total else None
            yield Piece(path, Span(start, stop), min(size, total - start))


def _cut_table(path: Path) -> Iterator[Piece]:
    """Yield the row groups of a Parquet file; a damaged file as a whole, whose reader names the mistake in its turn."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        file = pq.read_metadata(path)
    except (pyarrow.ArrowException, OSError, ValueError):
        yield Piece(path, WHOLE, path.stat().st_size)
        return
    first = 1
    for number in range(file.num_row_groups):
        group = file.row_group(number)
        yield Piece(path, Span(number, number + 1, first), group.total_byte_size)
        first += group.num_rows


def read_part(part: Part, source: RowSource) -> Iterator[Row]:
    """Yield the rows of a part; a UserError numbers lines from the start of its piece: see `raise_mistake`."""
    if not part or not isinstance(source, FileRows):
        yield from iterate_rows(source)
        return
    for piece in part:
        for record in read_records(piece.path, piece.span):
            yield from rows_of(record, source)


def raise_mistake(part: Part, source: RowSource, error: str) -> NoReturn:
    """Read a part with a mistake once more and raise the UserError with the number of its line in the file.

    error: the message of the first reading, for a file that changed meanwhile.
    """
    for _ in read_part(tuple(map(_number_lines, part)), source):
        pass
    raise UserError(error)


def _number_lines(piece: Piece) -> Piece:
    """Return a piece that knows the number of its first line."""
    if kind(piece.path) != ".jsonl" or not piece.span.start:
        return piece
    lines, left = 1, piece.span.start - 1
    with piece.path.open("rb") as file:
        while block := file.read(min(left, 1 << 20)):
            lines += block.count(b"\n")
            left -= len(block)
        lines += bool(file.readline())  # the line that the piece begins in, or whose end it begins behind
    return piece._replace(span=piece.span._replace(first=lines))
