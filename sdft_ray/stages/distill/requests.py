"""The requests: the rows that need the engine, read by any actor by their place.

In: the training rows, and the ledger's lines of them. Out: a Parquet file for each range of rows, and parts of them.
The places count through all files, so that a batch is full also where few rows of each range need the engine.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdft_ray.core.rows import Row
from sdft_ray.results import read_columns, training_batches
from sdft_ray.stages.distill.dealing import Dealt
from sdft_ray.stages.distill.draws import Settings, instruction_template, next_draw, rules_of
from sdft_ray.stages.distill.spread import Folder, Range, spread

_GROUP_ROWS = 512  # of a file: what an actor reads at least


class Asked(NamedTuple):
    """A row that needs the engine."""

    row: Row
    position: int
    """Among the training rows."""
    sample: int
    """The first one that is to be drawn."""
    failed: int
    """How often that failed."""


class Requests(NamedTuple):
    """Files of requests."""

    folder: Folder
    counts: tuple[int, ...]
    """Requests in the file of each range."""

    @property
    def missing(self) -> int:
        """How many rows need the engine."""
        return sum(self.counts)

    def read(self, start: int, stop: int) -> list[Asked]:
        """Return the requests at some places."""
        found: list[Asked] = []
        for number, end in enumerate(itertools.accumulate(self.counts)):
            begin = end - self.counts[number]
            if begin < stop and start < end:
                path = self.folder.find(_name(number))
                found += _read_file(path, max(start, begin) - begin, min(stop, end) - begin)
        return found


def write_requests(
    folder: Folder, rows: Callable[[], Path], ranges: Sequence[Range], dealt: Dealt, settings: Settings, template: str
) -> Requests:
    """Return the requests of rows with a template, written for each range; rows: returns the directory of the training
    rows."""
    work = functools.partial(_write_range, folder, rows, dealt, settings, template)
    return Requests(folder, tuple(spread(work, ranges, here=len(ranges) == 1)))


def _write_range(
    folder: Folder, rows: Callable[[], Path], dealt: Dealt, settings: Settings, template: str, some: Range
) -> int:
    """Write those rows of a range that need the engine; return how many they are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept = [row for batch in training_batches(rows(), some.stop, Row, some.start) for row in batch]
    rules = rules_of(settings, kept)
    mine = {origin for origin in rules if instruction_template(settings, origin) == template}
    lines = dealt.lines_of(some.number, (row.id for row in kept if row.origin in mine))
    asked = []
    for position, row in enumerate(kept, some.start):
        if row.origin in mine and (draw := next_draw(row, lines[row.id], settings.samples, rules[row.origin])):
            asked.append((*row, position, *draw))
    schema = _schema()
    columns = zip(*asked, strict=True) if asked else [[]] * len(schema)
    arrays = [pa.array(values, kind) for values, kind in zip(columns, schema.types, strict=True)]
    pq.write_table(pa.table(arrays, schema), folder.path / _name(some.number), row_group_size=_GROUP_ROWS)
    folder.keep(_name(some.number))
    return len(asked)


def _read_file(path: Path, start: int, stop: int) -> list[Asked]:
    import pyarrow.parquet as pq

    first = start // _GROUP_ROWS
    groups = pq.ParquetFile(path).read_row_groups(range(first, (stop - 1) // _GROUP_ROWS + 1))
    some = groups.slice(start - first * _GROUP_ROWS, stop - start)
    numbers = (some.column(name).to_pylist() for name in Asked._fields[1:])
    return [Asked(*values) for values in zip(read_columns(some, Row), *numbers, strict=True)]


def _name(number: int) -> str:
    return f"{number:06}.parquet"


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [(name, pa.int32() if name == "origin" else pa.string()) for name in Row._fields]
        + [(name, pa.int32()) for name in Asked._fields[1:]]
    )
