"""Rows as token ids on disk: written once, in shards, and read by number.

In: encoded rows, one after another. Out: two .npy files a shard, the ids of all rows and an index of them; and rows by
number. Files are mapped into memory, and a worker gives back the pages of ids that it has read: kept, they would count
as its own memory, which would grow with the number of rows.
"""

from __future__ import annotations

import contextlib
import mmap
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol, overload

import numpy as np

from sdft_ray.core.rows import TrainingRow

if TYPE_CHECKING:
    from sdft_ray.core.soft_targets import Likeliest

FOLDER = "encoded"
Array = np.ndarray[Any, Any]
_ID = np.dtype("<i4")
_INDEX = np.dtype([("number", "<i8"), ("stop", "<i8"), ("trained_from", "<i4"), ("whole", "<i4"), ("origin", "<i4")])


class _Indexed(NamedTuple):
    """What the index has of a row."""

    number: int
    """Among all rows that were read, also those that were left out."""
    stop: int
    """Where its ids end."""
    trained_from: int
    whole: int
    """Its tokens before it was cut."""
    origin: int


class EncodedRow(NamedTuple):
    """A row as token ids, and where it is from."""

    row: TrainingRow
    number: int
    """Among all rows that were read, from 0."""
    origin: int
    """Which of the recipe's sources it is of."""
    whole: int
    """Its tokens before it was cut."""


def write_shard(folder: Path, name: str, shard: int, rows: Iterable[EncodedRow]) -> list[Path]:
    """Write rows, held in memory one at a time, and return the files; they appear whole, the index last."""
    folder.mkdir(parents=True, exist_ok=True)
    index, stop = [], 0
    ids_file, index_file = (folder / f"{name}-{shard:05d}.{part}.npy" for part in ("ids", "index"))
    with appearing(ids_file) as file:
        _write_header(file, 0)
        for row, number, origin, whole in rows:
            file.write(np.array(row.ids, _ID).tobytes())
            stop += len(row.ids)
            index.append(_Indexed(number, stop, row.trained_from, whole, origin))
        file.seek(0)
        _write_header(file, stop)
    with appearing(index_file) as file:
        np.save(file, np.array(index, _INDEX))
    return [ids_file, index_file]


class Targets(Protocol):
    """What gives the targets of a row's trained tokens where the tokens alone are not."""

    def read(self, shard: int, index: Array, place: int) -> Likeliest:
        """Return those of the row at a place in a shard; index: the shard's own."""
        ...


class EncodedRows(Sequence[TrainingRow]):
    """What `write_shard` wrote, by number; a row becomes Python numbers only when it is asked for."""

    def __init__(self, folder: Path, name: str, targets: Targets | None = None) -> None:
        """Open all shards of a name, or the one `NAME-00003`; targets: of the same shards."""
        self._targets = targets
        self._files = sorted(folder.glob(f"{name}*.index.npy"))
        self._indices = [np.load(file, mmap_mode="r") for file in self._files]
        self._ids: dict[int, Array] = {}
        self._ends = np.cumsum([len(index) for index in self._indices], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, i: int) -> TrainingRow: ...
    @overload
    def __getitem__(self, i: slice) -> list[TrainingRow]: ...
    def __getitem__(self, i: int | slice) -> TrainingRow | list[TrainingRow]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        shard, place = self._find(i)
        index, ids = self._indices[shard], self._ids_of(shard)
        found, start = _read(index, place), _read(index, place - 1).stop if place else 0
        row = TrainingRow(ids[start : found.stop].tolist(), found.trained_from)
        give_back(ids)
        if self._targets is None:
            return row
        from sdft_ray.core.soft_targets import SoftRow

        return SoftRow(row.ids, row.trained_from, self._targets.read(shard, index, place))

    def number_of(self, i: int) -> int:
        """Return the number of a row among all that were read."""
        shard, place = self._find(i)
        return _read(self._indices[shard], place).number

    def source_of(self, i: int) -> int:
        """Return which of the recipe's sources a row is of."""
        shard, place = self._find(i)
        return _read(self._indices[shard], place).origin

    def sources(self) -> set[int]:
        """Return the sources that rows are of."""
        found: set[int] = set()
        for index in self._indices:
            found.update(np.unique(index["origin"]).tolist())
            give_back(index)
        return found

    def column(self, name: str) -> Array:
        """Return what the index has of every row (rows)."""
        return np.concatenate([np.empty(0, _INDEX[name]), *(index[name] for index in self._indices)])

    @property
    def trained_tokens(self) -> int:
        """The number of tokens that carry loss, of one shard."""
        return int(self.column("stop").max(initial=0) - self.column("trained_from").sum(dtype=np.int64))

    def largest_id(self) -> int:
        """Return the largest token id of all shards; -1 where they are empty."""
        largest = -1
        for shard in range(len(self._files)):
            ids = self._ids_of(shard)
            largest = max(largest, int(ids.max(initial=-1)))
            give_back(ids)
        return largest

    def _find(self, i: int) -> tuple[int, int]:
        """Return the shard of a row, and its place in it."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return shard, i - (int(self._ends[shard - 1]) if shard else 0)

    def _ids_of(self, shard: int) -> Array:
        if shard not in self._ids:  # opened when asked for: who looks up numbers needs none, and may not have the files
            file = self._files[shard]
            self._ids[shard] = np.load(file.with_name(file.name.replace(".index.", ".ids.")), mmap_mode="r")
        return self._ids[shard]


def _read(index: Array, place: int) -> _Indexed:
    return _Indexed(*index[place].item())


def give_back(ids: Array) -> None:
    """Let the pages of a mapped file go; the system's cache still has them."""
    if isinstance(ids.base, mmap.mmap):
        ids.base.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """Give a file that takes its name when all is written: another try of the same task may write it, too."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_header(file: BinaryIO, count: int) -> None:
    """Write the header of a .npy file of `count` token ids; numpy makes it as long for every count."""
    header = {"descr": _ID.str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
