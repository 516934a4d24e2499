"""The distilled dataset: rows joined with their generations, and selected.

In: the training rows, and the ledger's lines of them. Out: train.parquet with its card, and the figures of the summary.
Each range of rows becomes a file of its own; the driver only strings these together, column by column.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sdft_ray.core.rows import Row
from sdft_ray.core.selection import REASONS
from sdft_ray.results import DistilledRow, training_batches
from sdft_ray.stages import Work
from sdft_ray.stages.distill import card
from sdft_ray.stages.distill.dealing import Dealt
from sdft_ray.stages.distill.draws import Settings, best_lines, instruction_template, select_rows
from sdft_ray.stages.distill.spread import Folder, Range, spread
from sdft_ray.store.ledger import Lines

_GROUP_ROWS = 4096  # of a dataset of many ranges: whoever reads it holds metadata of every group


class Figures(NamedTuple):
    """What selection comes to, of a range or of all."""

    reasons: Counter[tuple[int, str]]
    """By source and reason."""
    errors: Counter[str]
    """What engines said of rows that they failed on."""
    generations: int
    """Samples that were drawn."""
    tokens: int
    examples: dict[str, DistilledRow]
    """The first row for each reason."""

    @staticmethod
    def none() -> Figures:
        """Return the figures of no rows."""
        return Figures(Counter(), Counter(), 0, 0, {})

    def plus(self, more: Figures) -> Figures:
        """Return these figures and those of rows behind them."""
        return Figures(
            self.reasons + more.reasons,
            self.errors + more.errors,
            self.generations + more.generations,
            self.tokens + more.tokens,
            self.examples | more.examples | self.examples,  # in the order of their rows, the first ones
        )


def write_dataset(work: Work[Settings], folder: Folder, ranges: Sequence[Range], dealt: Mapping[str, Dealt]) -> Figures:
    """Write train.parquet and its card; return the figures. dealt: the lines of each template's ledger."""
    path, rows = work.directory / "train.parquet", work.handle("rows")
    if len(ranges) == 1:
        figures = _select(rows, dealt, work.settings, ranges[0], path)
    else:
        select = functools.partial(_select_range, folder, rows, dealt, work.settings)
        selected = spread(select, ranges, here=False)
        figures = functools.reduce(Figures.plus, _join(folder, ranges, selected, path), Figures.none())
    card.write(work.directory, work.stage, count_reasons(figures), figures.examples)
    return figures


def count_reasons(figures: Figures) -> dict[str, int]:
    """Return the rows for each reason, whatever their source."""
    counts: Counter[str] = Counter()
    for (_, reason), count in figures.reasons.items():
        counts[reason] += count
    return {reason: counts[reason] for reason in REASONS}


def _join(folder: Folder, ranges: Sequence[Range], selected: Iterator[Figures], path: Path) -> Iterator[Figures]:
    """Yield the figures of each range while the files of all are written as one."""
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, card.schema()) as file:
        for some, figures in zip(ranges, selected, strict=True):
            part = folder.find(_name(some))
            for batch in pq.ParquetFile(part).iter_batches(_GROUP_ROWS):
                file.write_batch(batch)
            folder.storage.drop(part)
            yield figures


def _select_range(
    folder: Folder, rows: Callable[[], Path], dealt: Mapping[str, Dealt], settings: Settings, some: Range
) -> Figures:
    """Write the file of a range; return the figures."""
    figures = _select(rows, dealt, settings, some, folder.path / _name(some))
    folder.keep(_name(some))
    return figures


def _select(
    rows: Callable[[], Path], dealt: Mapping[str, Dealt], settings: Settings, some: Range, path: Path
) -> Figures:
    """Write the rows of a range to a file, each with its selected response; return the figures."""
    import pyarrow.parquet as pq

    batches = list(training_batches(rows(), some.stop, Row, some.start))
    lines: Lines = {}
    for template, own in dealt.items():
        mine = (row for batch in batches for row in batch if instruction_template(settings, row.origin) == template)
        lines |= own.lines_of(some.number, (row.id for row in mine))
    figures = Figures.none()
    with pq.ParquetWriter(path, card.schema()) as file:
        for batch in batches:
            samples = {row.id: best_lines(lines[row.id], settings.samples) for row in batch}
            selected = select_rows(batch, samples, settings)
            file.write_table(card.table(selected))
            figures = figures.plus(_count(selected, samples))
    return figures


def _count(selected: Sequence[DistilledRow], samples: Lines) -> Figures:
    examples: dict[str, DistilledRow] = {}
    for row in selected:
        examples.setdefault(row.reason, row)
    drawn = [line for lines in samples.values() for line in lines]
    return Figures(
        Counter((row.origin, row.reason) for row in selected),
        Counter(row.generated for row in selected if row.reason == "error"),
        len(drawn),
        sum(line.tokens for line in drawn),
        examples,
    )


def _name(some: Range) -> str:
    return f"{some.number:06}.parquet"
