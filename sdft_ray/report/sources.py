"""The tables of sources of rows, where a recipe or a sweep mixes several.

In: a report. Out: tables for the terminal, and columns and rows for the pages. What is not known is a dash.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from sdft_ray.report.entries import Report, SourceEntry
from sdft_ray.report.lines import number
from sdft_ray.report.sweep_entries import SweepReport
from sdft_ray.report.table import filled, name_chosen, three, titled

COLUMNS = (
    *("source", "rows mixed", "unused", "held out elsewhere", "duplicates", "rewrites kept"),
    *("NLL of rewrites", "of references"),
)
SWEEP_COLUMNS = (
    *("model", "blocks", "rows", "source", "rows of it", "rewrites kept"),
    *("loss", "validation loss", "exact match"),
)
NOTE = (
    "Loss: the last one in training, whose texts and target differ by arm; the validation loss is on the same "
    "references. Exact match: on the source's held-out rows, in %."
)


def columns(report: Report) -> list[str]:
    """Return the columns of the table of a recipe."""
    of_models = (("loss", "loss"), ("validation_loss", "validation loss"), ("exact_match", "exact match"))
    return [*COLUMNS, *(f"{title}, {model}" for field, title in of_models for model in _models(report, field))]


def rows(report: Report) -> list[list[str]]:
    """Return for each source what the mixture takes of it, what was rewritten, and how models do on its rows."""
    return [_row(entry, report) for entry in report.sources]


def table(report: Report) -> Table:
    """Return the sources of a recipe that mixes several."""
    return filled(titled("Sources of rows", NOTE), columns(report), rows(report))


def _row(entry: SourceEntry, report: Report) -> list[str]:
    mixed, nll = entry.mixed, entry.nll
    sides = (nll.distilled, nll.reference) if nll else (None, None)
    losses = [
        *(entry.loss.get(model) for model in _models(report, "loss")),
        *(entry.validation_loss.get(model) for model in _models(report, "validation_loss")),
    ]
    return [
        mixed.name,
        *map(str, (mixed.rows.train, mixed.unused, mixed.held_elsewhere, mixed.duplicates)),
        _share(entry.rewrites.acceptance if entry.rewrites else None),
        *(three(side.nll_per_token if side else None) for side in sides),
        *map(three, losses),
        *(_points(entry.exact_match.get(model)) for model in _models(report, "exact_match")),
    ]


def _models(report: Report, field: str) -> list[str]:
    """Return the models of which a figure is known for some source."""
    return list(dict.fromkeys(model for entry in report.sources for model in getattr(entry, field)))


def sweep_rows(report: SweepReport) -> Iterator[list[str]]:
    """Yield for each group of trials and each source what was trained on, and how the models do on its rows."""
    for group in report.groups:
        for name, source in group.sources.items():
            yield [
                name_chosen(group.name, group.chosen),
                *map(str, (group.blocks, group.rows, name)),
                f"{source.rows:.0f}",
                _share(source.rewrites_kept),
                *map(three, (source.loss, source.validation_loss)),
                _points(source.exact_match),
            ]


def sweep_table(report: SweepReport) -> Table:
    """Return the sources of a sweep whose trials mix several."""
    return filled(titled(f"{report.sweep}: sources of rows", NOTE), SWEEP_COLUMNS, list(sweep_rows(report)))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _points(value: float | None) -> str:
    return number(None if value is None else 100 * value)
