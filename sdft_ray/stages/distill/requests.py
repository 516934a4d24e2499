"""The file of requests: the rows that need the engine, read by any actor by their place.

In: rows, and the ledger's lines of them. Out: a Parquet file, and parts of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdft_ray.core.rows import Row
from sdft_ray.results import read_columns
from sdft_ray.stages.distill.draws import Settings, instruction_template, next_draw
from sdft_ray.store.ledger import Lines

_GROUP_ROWS = 64  # of the file: what an actor reads at least


class Asked(NamedTuple):
    """A row that needs the engine."""

    row: Row
    position: int
    """Among the training rows."""
    sample: int
    """The first one that is to be drawn."""
    failed: int
    """How often that failed."""


def write_requests(
    batches: Iterable[Sequence[Row]], lines_of: Callable[..., Lines], settings: Settings, path: Path, template: str
) -> tuple[int, int]:
    """Write the rows of a template that need the engine to a file; return how many rows there are in all, and how many
    need it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [(name, pa.int32() if name == "origin" else pa.string()) for name in Row._fields]
        + [(name, pa.int32()) for name in Asked._fields[1:]]
    )
    rows = missing = 0
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema) as file:
        for batch in batches:
            mine = {row.id for row in batch if instruction_template(settings, row.origin) == template}
            lines = lines_of(mine)
            for position, row in enumerate(batch, rows):
                if row.id in mine and (draw := next_draw(row, lines[row.id], settings)):
                    sample, failed = draw
                    waiting.append({**row._asdict(), "position": position, "sample": sample, "failed": failed})
            rows += len(batch)
            while len(waiting) >= _GROUP_ROWS:
                file.write_table(pa.Table.from_pylist(waiting[:_GROUP_ROWS], schema))
                waiting = waiting[_GROUP_ROWS:]
                missing += _GROUP_ROWS
        file.write_table(pa.Table.from_pylist(waiting, schema))
    return rows, missing + len(waiting)


def read_requests(path: Path, start: int, stop: int) -> list[Asked]:
    """Return the requests at some places of the file."""
    import pyarrow.parquet as pq

    first = start // _GROUP_ROWS
    groups = pq.ParquetFile(path).read_row_groups(range(first, (stop - 1) // _GROUP_ROWS + 1))
    some = groups.slice(start - first * _GROUP_ROWS, stop - start)
    numbers = (some.column(name).to_pylist() for name in Asked._fields[1:])
    return [Asked(*values) for values in zip(read_columns(some, Row), *numbers, strict=True)]
