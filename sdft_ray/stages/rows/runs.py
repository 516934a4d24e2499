"""Sorted runs: more rows than memory holds, put in order and freed of duplicates through files.

In: batches whose first column is a hash, the key that rows are sorted by. Out: runs, which are files sorted each by
itself, and what all of them hold between two hashes, in order. Hashes are spread evenly, so limits between which about
the same number of rows lies are known without a look at them. A run is mapped, and what lies between two hashes is a
slice of it, which is copied before the next run is mapped: pages that a kernel maps around it count as memory, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

HASH_BYTES = 16
HASH = pa.binary(HASH_BYTES)
_HASHES = np.dtype(f"S{HASH_BYTES}")  # compared as bytes


def write_run(path: Path, batch: pa.RecordBatch) -> None:
    """Write a batch sorted by its first column; rows of the same hash keep their order."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, batch.schema) as run:
        run.write_batch(_sort(batch))
    temporary.replace(path)


def ranges(count: int) -> Iterator[tuple[bytes, bytes | None]]:
    """Yield `count` ranges of hashes of the same width, which together hold every hash, as (start, stop)."""
    limits = [((number << 8 * HASH_BYTES) // count).to_bytes(HASH_BYTES, "big") for number in range(count)]
    yield from zip(limits, [*limits[1:], None], strict=True)


def read_range(runs: Sequence[Path], start: bytes, stop: bytes | None) -> pa.RecordBatch | None:
    """Return the rows of runs whose hash is in [start, stop), sorted; None where there are none.

    Rows of the same hash come in the order of the runs.
    """
    slices = []
    for path in runs:
        with pa.memory_map(str(path)) as file:
            batch = pa.ipc.open_file(file).get_batch(0)
        hashes = hashes_of(batch)
        first = np.searchsorted(hashes, np.array(start, _HASHES))
        last = len(hashes) if stop is None else np.searchsorted(hashes, np.array(stop, _HASHES))
        if first < last:
            slices.append(batch.take(pa.array(np.arange(first, last))))
        del batch, hashes  # and what is mapped
    return _sort(pa.concat_batches(slices)) if slices else None


def find_duplicates(runs: Sequence[Path], count: int, folder: Path) -> int:
    """Write runs of all but the first rows of each hash, without their first column; return how many rows these are.

    runs: in the order in which the first row counts. count: ranges that are looked at one after another.
    """
    found = 0
    for number, limits in enumerate(ranges(count)):
        if (batch := read_range(runs, *limits)) is None:
            continue
        hashes = hashes_of(batch)
        if len(again := np.flatnonzero(hashes[1:] == hashes[:-1]) + 1):
            write_run(folder / f"{number:06d}", batch.select(batch.schema.names[1:]).take(pa.array(again)))
            found += len(again)
    return found


def hashes_of(batch: pa.RecordBatch) -> np.ndarray[Any, Any]:
    """Return the first column of a batch, which is not copied."""
    column = batch.column(0)
    return np.frombuffer(column.buffers()[1], _HASHES)[column.offset : column.offset + len(column)]


def _sort(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.take(pa.array(np.argsort(hashes_of(batch), kind="stable")))
