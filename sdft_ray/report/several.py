"""Reports of several recipes and sweeps side by side: a line for each model of each.

In: reports by their names. Out: columns, rows and notes for the terminal and the page. Nothing is subtracted between
two of them: they need not have tasks, items or a base in common, and a note says where they have not.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from sdft_ray.report.entries import Report
from sdft_ray.report.lines import caption, millions, name_chosen, number, percent, sweep_caption
from sdft_ray.report.sweep_entries import Group, SweepReport

Reports = Mapping[str, Report | SweepReport]
COLUMNS = ("of", "model", "blocks", "rows")
SUMMED = ("mean", "recovery", "over chance", "parameters")


def columns(reports: Reports) -> list[str]:
    """Return what the rows hold."""
    return [*COLUMNS, *_tasks(reports), *SUMMED]


def rows(reports: Reports) -> list[list[str]]:
    """Return a row for each model, and for each group of trials that differ in their seeds alone."""
    tasks = _tasks(reports)
    cells = ((name, each) for name, report in reports.items() for each in _cells(report))
    return [[name, *(each.get(column, "") for column in (*COLUMNS[1:], *tasks, *SUMMED))] for name, each in cells]


def notes(reports: Reports) -> list[str]:
    """Return what a reader must know to compare the rows."""
    said = {name: caption(of) if isinstance(of, Report) else sweep_caption(of) for name, of in reports.items()}
    notes = [f"{name}: {text}" for name, text in said.items()]
    scores = [report.base.quality.tasks for report in reports.values()]
    if len({tuple((task, score.metric, score.n) for task, score in each.items()) for each in scores}) > 1:
        notes.append("Means do not compare: tasks or their numbers of items differ.")
    if len({report.base.id for report in reports.values()}) > 1:
        notes.append("Recovery is in percent of each one's own base, and the bases differ.")
    return notes


def _tasks(reports: Reports) -> list[str]:
    return list(dict.fromkeys(task for report in reports.values() for task in report.tasks))


def _cells(report: Report | SweepReport) -> Iterator[dict[str, str]]:
    """Yield the cells of each model, by column."""
    for entry in report.models:
        tasks = {task: percent(score) for task, score in entry.quality.tasks.items()}
        summed = (entry.quality.mean, entry.quality.recovery, entry.quality.recovery_over_chance)
        yield {**tasks, **_summed(*summed, entry.cost.parameters), **_place(report, entry)}
    if isinstance(report, Report):
        return
    for group in report.groups:
        place = {"blocks": str(group.blocks), "rows": str(group.rows)}
        summed = (group.mean, group.recovery, group.recovery_over_chance)
        spread = f" ±{group.recovery_sd:.1f}" if group.recovery_sd is not None else ""
        cells = {**_group_scores(report, group), **_summed(*summed, group.parameters, spread), **place}
        yield {"model": name_chosen(group.name, group.chosen), **cells}


def _place(report: Report | SweepReport, entry: Any) -> dict[str, str]:
    """Return the name of a model, how many blocks it lacks, and how many rows it was trained on."""
    if isinstance(report, SweepReport):
        return {"model": report.name_model(entry), "blocks": str(entry.blocks)}
    training = report.details.trainings.get(entry.model)
    is_cut = entry.cost.parameters < report.base.cost.parameters
    blocks = len(report.details.cut.removed) if is_cut else 0
    rows = str(training.summary.rows) if training else ""
    return {"model": entry.model, "blocks": str(blocks), "rows": rows}


def _group_scores(report: SweepReport, group: Group) -> dict[str, str]:
    """Return the scores of a group: of one trial with its error, of several the mean over seeds."""
    each = [result.quality.tasks for i in group.trials if (result := report.trials[i].result)]
    if len(each) == 1:
        return {task: percent(score) for task, score in each[0].items()}
    return {task: number(100 * statistics.fmean(scores[task].value for scores in each)) for task in each[0]}


def _summed(
    mean: float, recovery: float | None, over_chance: float | None, parameters: int, spread: str = ""
) -> dict[str, str]:
    cells = (number(100 * mean), number(recovery) + spread, number(over_chance), millions(parameters))
    return dict(zip(SUMMED, cells, strict=True))
