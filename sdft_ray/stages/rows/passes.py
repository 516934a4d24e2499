"""The passes over all rows: read them into sorted runs, find the duplicates, give what is left in order.

In: the parts of a source. Out: runs in a folder, and from these the rows in their one order. It is the order of a
hash, so every run holds rows of every place in it, and the rows between two hashes are a slice of every run. No process
holds more than one run or the rows of one range, whatever their number.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdft_ray.core.decontamination import Overlap, TaskIndex
from sdft_ray.core.rows import Row
from sdft_ray.data.checkers import read_answer
from sdft_ray.data.parts import Part, read_part
from sdft_ray.errors import UserError
from sdft_ray.results import SPLITS, row_schema
from sdft_ray.spec.sources import RowSource
from sdft_ray.stages.rows.runs import HASH, HASH_BYTES, find_duplicates, ranges, read_range, write_run

ROWS = row_schema()
OVERLAPS = pa.schema([(field.name, pa.string()) for field in dataclasses.fields(Overlap)])
# Where a row comes in the order of all, and its number in the source; no process has counted the rows of other parts.
_PLACE = [pa.field("place", HASH), pa.field("sequence", pa.int64())]
_PART_ROWS = 1 << 32
_KEYS_AT_ONCE = 250_000  # of 40 bytes
_ROW_BYTES = 256  # of a row's objects beside its texts
_GROUP_ROWS = 4096  # of a Parquet file: whoever wants some rows reads no more than a few thousand others


class Counts(NamedTuple):
    """What became of the rows of a part."""

    read: int = 0
    blank: int = 0
    without_answer: int = 0
    decontaminated: int = 0
    duplicates: int = 0
    """Those within a run; the others show when all are read."""
    kept: int = 0
    size: int = 0
    """Of what is kept, in bytes of memory, about."""
    mistake: str = ""
    """Of the first row that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads parts of a source into runs."""

    source: RowSource
    parts: Sequence[Part]
    index: TaskIndex | None
    """What no row may hold."""
    folder: Path
    size: int
    """Of the rows of a run, in bytes of memory."""

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Read the part that a batch of Ray Data names."""
        return {name: [value] for name, value in self.read(int(batch["part"][0]))._asdict().items()}

    def read(self, number: int) -> Counts:
        """Write the runs of a part: the same ones however often."""
        became, run = Counter[str](), _Run(self.folder, number)
        read, size, mistake = 0, 0, ""
        try:
            for read, row in enumerate(read_part(self.parts[number], self.source), 1):
                became[self._put(row, read, run)] += 1
                if run.size >= self.size:
                    size += run.write()
        except UserError as error:
            mistake = str(error)
        size += run.write()
        return Counts(**became, read=read, size=size, mistake=mistake)

    def _put(self, row: Row, number: int, run: _Run) -> str:
        """Put a row into a run, if it is to be kept; return what it counts as."""
        row_id = row.content_id
        if self.index and (overlaps := self.index.find(row_id, row.texts)):
            run.add_overlaps(overlaps, number)
            return "decontaminated"
        if row.is_blank:
            return "blank"
        answer = None
        if (checker := self.source.answer) != "none":
            answer = read_answer(checker, row.reference, row.answer)
            if answer is None:
                return "without_answer"
        return "kept" if run.add(row, row_id, answer, _hash(f"{self.source.seed}:{row_id}"), number) else "duplicates"


class _Run:
    """Rows of a part that are written together, and their keys; and what others of them share with tasks."""

    def __init__(self, folder: Path, part: int) -> None:
        self._folder, self._name, self._first = folder, f"{part:06d}", part * _PART_ROWS
        self._written = 0
        self._clear()

    def _clear(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._keys: dict[bytes, tuple[bytes, int]] = {}
        self._overlaps: list[tuple[Any, ...]] = []
        self._overlap_keys: dict[bytes, tuple[bytes, int]] = {}
        self.size = 0

    def add(self, row: Row, row_id: str, answer: str | None, place: bytes, number: int) -> bool:
        """Add a row and return True; False where one with its key is in the run."""
        key = _hash(row.key)
        if key in self._keys:
            return False
        sequence = self._first + number
        self._keys[key] = place, sequence
        texts = row_id, row.prompt, row.reference, answer, row.conversation
        self._rows.append((place, sequence, *texts, row.origin))
        self.size += _ROW_BYTES + len(row.prompt) + len(row.reference) + len(row.conversation or "")
        return True

    def add_overlaps(self, overlaps: Sequence[Overlap], number: int) -> None:
        """Add what a row shares with tasks, unless the same row is in the run; they come in the order of the source."""
        key, sequence = _hash(overlaps[0].row), self._first + number
        if key not in self._overlap_keys:
            place = _number(sequence)
            self._overlap_keys[key] = place, sequence
            self._overlaps += [(place, sequence, *dataclasses.astuple(overlap)) for overlap in overlaps]
            self.size += _ROW_BYTES * len(overlaps)

    def write(self) -> int:
        """Write what was added and begin anew; return its size."""
        name = f"{self._name}-{self._written:06d}"
        for kind, rows, schema in (("rows", self._rows, ROWS), ("overlaps", self._overlaps, OVERLAPS)):
            if rows:
                write_run(self._folder / kind / name, _batch(rows, [*_PLACE, *schema]))
        for kind, keys in (("keys", self._keys), ("overlap-keys", self._overlap_keys)):
            if keys:
                rows = [(key, *place) for key, place in keys.items()]
                write_run(self._folder / kind / name, _batch(rows, [pa.field("key", HASH), *_PLACE]))
        size = self.size
        self._written += 1
        self._clear()
        return size


def find_lost(folder: Path, counts: Counts) -> int:
    """Find the rows whose key another one had before, and return how many they are.

    Of what rows share with tasks, the same row's is found that was there before.
    """
    count = _parts_of(counts.decontaminated, _KEYS_AT_ONCE)
    find_duplicates(_runs(folder, "overlap-keys"), count, folder / "overlap-lost")
    return find_duplicates(_runs(folder, "keys"), _parts_of(counts.kept, _KEYS_AT_ONCE), folder / "lost")


def rows_in_order(folder: Path, counts: Counts, size: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows that are kept in their order, about `size` bytes at once."""
    runs, lost = _runs(folder, "rows"), _runs(folder, "lost")
    for start, stop in ranges(_parts_of(counts.size, size)):
        if (batch := read_range(runs, start, stop)) is not None:
            yield _without(batch, read_range(lost, start, stop)).select(ROWS.names)


def overlaps_in_order(folder: Path) -> Iterator[pa.RecordBatch]:
    """Yield what rows share with tasks in the order of the source, each row once."""
    lost = _runs(folder, "overlap-lost")
    for run in _runs(folder, "overlaps"):  # a part's numbers follow each other
        batch = read_range([run], b"", None)
        assert batch is not None, "no run is empty"
        last = int.from_bytes(batch.column(0)[-1].as_py(), "big")
        first = batch.column(0)[0].as_py()
        yield _without(batch, read_range(lost, first, _number(last + 1))).select(OVERLAPS.names)


def _without(batch: pa.RecordBatch, lost: pa.RecordBatch | None) -> pa.RecordBatch:
    if lost is None:
        return batch
    is_lost = np.isin(batch.column("sequence").to_numpy(), lost.column("sequence").to_numpy())
    return batch.filter(pa.array(~is_lost))


def write_splits(directory: Path, batches: Iterable[pa.RecordBatch], counts: Mapping[str, int]) -> None:
    """Write one Parquet file a split: of rows in their order the first ones, the next ones, and the others."""
    source, batch = iter(batches), to_batch([])
    for name in SPLITS:
        left = counts[name]
        with pq.ParquetWriter(directory / f"{name}.parquet", ROWS) as file:
            while left:
                batch = batch if len(batch) else next(source)
                file.write_batch(some := batch.slice(0, left), _GROUP_ROWS)
                batch, left = batch.slice(len(some)), left - len(some)


def write_overlaps(directory: Path, batches: Iterable[pa.RecordBatch]) -> Counter[str]:
    """Write decontaminated.parquet: one line for each row and task that share words; return the lines of each task."""
    lines: Counter[str] = Counter()
    with pq.ParquetWriter(directory / "decontaminated.parquet", OVERLAPS) as file:
        for batch in batches:
            file.write_batch(batch)
            lines.update(batch.column("task").to_pylist())
    return lines


def to_batch(rows: Sequence[Row]) -> pa.RecordBatch:
    """Return rows as a split holds them."""
    return _batch([(row.id, *(getattr(row, name) for name in ROWS.names[1:])) for row in rows], [*ROWS])


def _batch(rows: Sequence[tuple[Any, ...]], fields: Sequence[Any]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else ([] for _ in fields)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, fields, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))


def _runs(folder: Path, kind: str) -> list[Path]:
    return sorted((folder / kind).glob("[!.]*"))


def _parts_of(total: int, size: int) -> int:
    return max(1, -(-total // size))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:HASH_BYTES]


def _number(sequence: int) -> bytes:
    return sequence.to_bytes(HASH_BYTES, "big")
