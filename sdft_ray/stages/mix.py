"""Stage `mix`: joins the rows of several sources into one, in the shares that the recipe gives them.

In: the rows artifacts of two or more sources. Out: held_out.parquet, validation.parquet and train.parquet as theirs,
each row with the number of its source (`origin`). Rows keep the order of their source, and every prefix of the training
rows keeps the shares to within a row of each source, so that smaller data sizes are mixtures, too. Rows and their ids
are those of the sources: another mixture of them generates nothing anew.

Of rows that ask the same, in several sources: one that is held out or validated on anywhere is trained on nowhere; else
the earliest source of the list keeps it.

Training rows pass through in batches. What stays in memory is 16 bytes for each row of all sources but the last (its
hash), and one byte for each row of all.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdft_ray import stages
from sdft_ray.core.mixture import interleave, join_rows, next_source, whole_shares
from sdft_ray.core.rows import Row
from sdft_ray.errors import UserError, problem
from sdft_ray.progress import Progress, log
from sdft_ray.results import SPLITS, Counts, count_rows, read_columns, read_held_out, read_split, row_schema
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.store.identity import Stage, numbered, slugify
from sdft_ray.store.record import Record

if TYPE_CHECKING:
    import numpy as np

VERSION, NEEDS, UNIT = 1, None, "rows"
_BATCH_ROWS = 4096


class Settings(Section):
    """The shares of the sources."""

    unhashed = ("names",)
    shares: tuple[int, ...] | None
    """As the smallest whole numbers of their proportions; all rows of all where absent."""
    names: tuple[str, ...]
    """The sources, for people."""


class Source(Record):
    """What a mixture takes of a source, and what not."""

    name: str
    rows: Counts
    """That are in the mixture."""
    held_elsewhere: int
    """Training rows that are held out or validated on in another source."""
    duplicates: int
    """Rows that an earlier source has, too."""
    unused: int
    """Training rows behind the end of the mixture."""


class Summary(stages.Summary):
    """What is in a mixture."""

    rows: Counts
    sources: tuple[Source, ...]
    ended_by: str | None = None
    """The source that had run out where the mixture ends, if rows of others were left."""


def stage(each: Sequence[Stage[Any]], names: Sequence[str], weights: Sequence[float | None]) -> Stage[Settings]:
    """Return the stage that mixes sources; they have a weight each, or none."""
    given = [weight for weight in weights if weight is not None]
    settings = Settings(shares=whole_shares(given) if given else None, names=tuple(names))
    slug = slugify("-".join(names))
    return Stage("mix", slug, VERSION, settings, {numbered("rows", i): rows for i, rows in enumerate(each)})


def build(work: Work[Settings]) -> Summary:
    """Write the three splits."""
    names, places = work.settings.names, work.inputs("rows")
    held_out = read_held_out(places)
    held = {row.key for row in held_out}
    read = [read_split(place, "validation", Row) for place in places]
    validation = join_rows([[row for row in rows if row.key not in held] for rows in read])
    kept = _choose(places, held.union(*([row.key for row in rows] for rows in read)), work.progress)
    counts = [int(each.mask.sum()) for each in kept]
    shares = _settle(work.settings, counts)
    _write(work.directory / "held_out.parquet", [_table(held_out)])
    _write(work.directory / "validation.parquet", [_table(validation)])
    streams = [_Stream(place, each.mask, i) for i, (place, each) in enumerate(zip(places, kept, strict=True))]
    work.progress.enter("writing")
    _write(work.directory / "train.parquet", _mix(streams, counts, shares))
    taken = [stream.taken for stream in streams]
    watched = {
        "held_out": Counter(row.origin for row in held_out),
        "validation": Counter(row.origin for row in validation),
    }
    sources = tuple(
        Source(
            name=name,
            rows=Counts(train=taken[i], **{split: of_source[i] for split, of_source in watched.items()}),
            held_elsewhere=kept[i].held_elsewhere,
            duplicates=kept[i].duplicates,
            unused=counts[i] - taken[i],
        )
        for i, name in enumerate(names)
    )
    total = Counts(**{split: sum(getattr(source.rows, split) for source in sources) for split in SPLITS})
    return Summary(rows=total, sources=sources, ended_by=_report_end(names, counts, taken, shares))


def _settle(settings: Settings, counts: Sequence[int]) -> Sequence[int]:
    """Return the shares; raises UserError where a source has one and no rows."""
    if not sum(counts):
        do = "Hold out fewer rows"
        raise UserError(problem("rows", "every training row is held out or validated on in another source", do))
    if settings.shares is None:
        return counts
    for name, count in zip(settings.names, counts, strict=True):
        if not count:
            what = f"{name} has no training rows that no other source has, so no mixture begins"
            raise UserError(problem("rows", what, "Remove it, or set its weight to 0"))
    return settings.shares


def _report_end(names: Sequence[str], counts: Sequence[int], taken: Sequence[int], shares: Sequence[int]) -> str | None:
    """Log where a mixture ends before all rows are used, and return the source that ended it."""
    unused = {name: counts[i] - taken[i] for i, name in enumerate(names) if counts[i] > taken[i]}
    if not unused:
        return None
    ended = names[next_source(taken, shares)]
    left = ", ".join(f"{count} of {name}" for name, count in unused.items())
    text = f"mix: {ended} has run out, so the mixture ends at {sum(taken)} training rows; unused: {left}"
    log(f"{text}. Lower the weight of {ended} to use more of the others, or take fewer rows: train.rows")
    return ended


# --- which rows -----------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """Which training rows of a source are kept."""

    mask: np.ndarray[Any, Any]
    """(R) booleans."""
    held_elsewhere: int
    duplicates: int


def _choose(places: Sequence[Path], held: Iterable[str], progress: Progress) -> list[_Kept]:
    """Return for each source which of its training rows are trained on."""
    import numpy as np

    watched = _sorted([_hash(held)])
    earlier: list[np.ndarray[Any, Any]] = []
    chosen: list[_Kept] = []
    progress.begin(sum(count_rows(place, "train") for place in places))
    for number, place in enumerate(places, 1):
        masks, hashes, held_elsewhere, duplicates = [np.zeros(0, bool)], [], 0, 0
        for batch in _read(place, ["prompt", "reference", "conversation"]):
            keys = _hash(row.key for row in read_columns(batch, Row))
            is_held, is_double = _is_in(keys, [watched]), _is_in(keys, earlier)
            masks.append(~is_held & ~is_double)
            held_elsewhere += int(is_held.sum())
            duplicates += int((is_double & ~is_held).sum())
            if number < len(places):
                hashes.append(keys[masks[-1]])
            progress.update(progress.done + len(keys))
        chosen.append(_Kept(np.concatenate(masks), held_elsewhere, duplicates))
        earlier.append(_sorted(hashes))
    return chosen


def _hash(keys: Iterable[str]) -> np.ndarray[Any, Any]:
    """Return the hashes of keys, 16 bytes each."""
    import numpy as np

    return np.array([hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys], "S16")


def _sorted(hashes: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.sort(np.concatenate([np.zeros(0, "S16"), *hashes]))


def _is_in(hashes: np.ndarray[Any, Any], lists: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return for each hash whether it is in one of some sorted lists."""
    import numpy as np

    found = np.zeros(len(hashes), bool)
    for known in lists:
        if len(known):
            found |= known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes
    return found


# --- files ----------------------------------------------------------------------------------------------------


class _Stream:
    """The kept training rows of a source, from first to last."""

    def __init__(self, place: Path, mask: np.ndarray[Any, Any], number: int) -> None:
        self.taken = 0
        self._number = number
        self._batches = self._keep(place, mask)
        self._waiting: list[Any] = []

    def take(self, count: int) -> Any:
        """Return the next rows as an Arrow table; there are as many."""
        import pyarrow as pa

        while sum(map(len, self._waiting)) < count:
            self._waiting.append(next(self._batches))
        table = pa.Table.from_batches(self._waiting, row_schema())
        self._waiting = table.slice(count).to_batches()
        self.taken += count
        return table.slice(0, count)

    def _keep(self, place: Path, mask: np.ndarray[Any, Any]) -> Iterator[Any]:
        import pyarrow as pa

        start, schema = 0, row_schema()
        for batch in _read(place, schema.names):
            some = batch.filter(pa.array(mask[start : start + len(batch)]))
            start += len(batch)
            known = {*some.schema.names} - {"origin"}
            columns = [some.column(f.name) if f.name in known else pa.nulls(len(some), f.type) for f in schema]
            columns[schema.names.index("origin")] = pa.array([self._number] * len(some), pa.int32())
            yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _mix(streams: Sequence[_Stream], counts: Sequence[int], shares: Sequence[int]) -> Iterator[Any]:
    """Yield the mixture as Arrow tables."""
    import numpy as np
    import pyarrow as pa

    order = interleave(counts, shares)
    while some := list(itertools.islice(order, _BATCH_ROWS)):
        table = pa.concat_tables([stream.take(some.count(i)) for i, stream in enumerate(streams)])
        # Source by source the rows belong to the places in this order; sorting it again gives the row of each place.
        yield table.take(np.argsort(np.argsort(some, kind="stable")))


def _table(rows: Sequence[Row]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist([row._asdict() for row in rows], row_schema())


def _write(path: Path, tables: Iterable[Any]) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, row_schema()) as file:
        for table in tables:
            file.write_table(table)


def _read(place: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Yield those of some columns that there are, in batches; a source of an older version lacks some."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(place / "train.parquet")
    yield from file.iter_batches(_BATCH_ROWS, columns=[name for name in columns if name in file.schema_arrow.names])
