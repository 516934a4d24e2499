"""The lines of a ledger, dealt to the ranges of training rows that they belong to.

In: a ledger, and the ids of the training rows. Out: for each part of the ledger an Arrow file with one record batch a
range; the lines of a range are that batch of every file. So the join of rows and lines takes one pass over the ledger,
in order and in parallel, and no process holds either side: it has one part or one range in memory, and maps the sorted
ids (12 bytes a row) from a file that all tasks of a node share.
"""

from __future__ import annotations

import functools
import itertools
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdft_ray.stages.distill.spread import Folder, Range, spread
from sdft_ray.store import ledger as ledgers
from sdft_ray.store.ledger import Lines, Part

PART_LINES = 2**17
_KEYS, _RANGES = "keys.npy", "ranges.npy"


class RowId(NamedTuple):
    """The id of a row."""

    id: str


Ids = Callable[[], Iterable[Sequence[RowId]]]
"""Returns the ids of the training rows, in order, some at a time."""


class Dealt(NamedTuple):
    """Files of dealt lines."""

    folder: Folder
    files: tuple[str, ...]

    def lines_of(self, number: int, ids: Iterable[str]) -> Lines:
        """Return the lines of the rows of a range."""
        import pyarrow as pa

        lines: Lines = {row_id: [] for row_id in ids}
        self.folder.find("*.arrow")
        for name in self.files:
            with pa.memory_map(str(self.folder.path / name)) as file:
                for line in ledgers.to_lines(pa.ipc.open_file(file).get_batch(number)):
                    lines[line.id].append(line)
        return lines


def deal(folder: Folder, ledger: Path, ranges: Sequence[Range], ids: Ids) -> Dealt:
    """Return a ledger's lines, dealt to ranges."""
    parts = ledgers.parts_of(ledger, PART_LINES)
    if parts:
        index = functools.partial(_write_index, folder, ids)
        list(spread(index, [ranges], here=len(ranges) == 1))
    work = functools.partial(_deal_part, folder, ledger.name, len(ranges))
    return Dealt(folder, tuple(spread(work, parts, here=len(parts) <= 1)))


def _write_index(folder: Folder, ids: Ids, ranges: Sequence[Range]) -> None:
    """Write the keys of all rows, sorted, and which range each is of."""
    import numpy as np

    keys, filled = np.empty(ranges[-1].stop, np.uint64), 0
    for batch in ids():
        keys[filled : filled + len(batch)] = _keys(row.id for row in batch)
        filled += len(batch)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    owners = (np.searchsorted([some.start for some in ranges], order, "right") - 1).astype(np.int32)
    first = np.append(True, (keys[1:] != keys[:-1]) | (owners[1:] != owners[:-1]))  # of rows of one id in a range
    for name, values in ((_KEYS, keys[first]), (_RANGES, owners[first])):
        np.save(folder.path / name, values)
        folder.keep(name)


def _keys(ids: Iterable[str]) -> Any:
    """Return ids, 16 hex digits each, as numbers."""
    import numpy as np

    return np.frombuffer(bytes.fromhex("".join(ids)), ">u8").astype(np.uint64)


def _deal_part(folder: Folder, ledger: str, ranges: int, part: Part) -> str:
    """Write the lines of a part that belong to any row, range by range; return the file's name."""
    import numpy as np
    import pyarrow as pa

    place = folder.storage.ledger(ledger)
    folder.storage.bring(place, part.name)
    table = ledgers.read_part(place, part)
    lines, owners = _match(_keys(table.column("id").to_pylist()), *(folder.find(name) for name in (_KEYS, _RANGES)))
    table = table.take(lines)
    bounds = np.searchsorted(owners, np.arange(ranges + 1))
    name = f"lines-{uuid.uuid4().hex[:12]}.arrow"
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(folder.path / name, table.schema, options=options) as file:
        batch = pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], schema=table.schema)
        none = pa.RecordBatch.from_pylist([], table.schema)  # an empty slice is written with all offsets of its columns
        for start, stop in itertools.pairwise(bounds):
            file.write_batch(batch.slice(start, stop - start) if start < stop else none)
    folder.keep(name)
    return name


def _match(wanted: Any, keys_file: Path, ranges_file: Path) -> tuple[Any, Any]:
    """Return the places of the lines that belong to a row, and the range of each, sorted by range and place.

    wanted: the keys of lines (N). A line is there once for each range that has its row.
    """
    import numpy as np

    keys, ranges = (np.load(file, mmap_mode="r") for file in (keys_file, ranges_file))
    lines = np.argsort(wanted)  # in this order each search begins near the last one
    first, last = (np.searchsorted(keys, wanted[lines], side) for side in ("left", "right"))
    times = last - first
    ends = np.cumsum(times)
    places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - times), times)
    lines, owners = np.repeat(lines, times), ranges[places]
    order = np.lexsort((lines, owners))
    return lines[order], owners[order]
