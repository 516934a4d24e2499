"""Reports as lines of figures, for `--csv` and as pandas has tables.

In: records of a report. Out: a line for each model of a recipe or trial of a sweep, as CSV or as a DataFrame.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdft_ray.report import several
from sdft_ray.report.entries import Cost, Report
from sdft_ray.report.sweep_entries import SweepReport
from sdft_ray.results import Score
from sdft_ray.spec.loading import leaves
from sdft_ray.sweep.planning import DEPTH, SIZE

if TYPE_CHECKING:
    import pandas

Line = Mapping[str, Any]
"""Figures, names and texts by column; None for what is not known."""
_SUMMED = ("mean", "recovery", "recovery_over_chance")


def lines(report: Report | SweepReport) -> list[Line]:
    """Return a line for each model of a recipe, the base first, or for each trial of a sweep, finished or not."""
    return list(_of_recipe(report) if isinstance(report, Report) else _of_sweep(report))


def of_several(reports: several.Reports) -> list[Line]:
    """Return the lines of several reports, each behind the name of its report."""
    return [{"of": name, **line} for name, report in reports.items() for line in lines(report)]


def as_csv(lines: Sequence[Line]) -> str:
    """Return lines as CSV, under all columns that some of them have."""
    file = io.StringIO()
    writer = csv.DictWriter(file, dict.fromkeys(name for line in lines for name in line), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def as_frame(lines: Sequence[Line]) -> pandas.DataFrame:
    """Return lines as a DataFrame."""
    import pandas

    return pandas.DataFrame(
        [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]
    )


def _of_recipe(report: Report) -> Iterator[Line]:
    for entry in report.models:
        scores = _scores(entry.quality.tasks, report.tasks)
        summed = entry.quality.model_dump(include={*_SUMMED, "limited"})
        yield {"model": entry.model, "id": entry.id, **scores, **summed, **entry.cost.model_dump()}


def _of_sweep(report: SweepReport) -> Iterator[Line]:
    values = [path for path in report.axes if path not in (DEPTH, SIZE)]
    for trial in report.trials:
        plain = trial.plain()
        figures = (*_SUMMED, "validation_loss", *Cost.model_fields, "seconds", "limited")
        yield {
            **{"arm": trial.arm, "blocks": trial.blocks, "rows": trial.rows},
            **{f"axes.{path}" if path == "rows" else path: _as_cell(trial.values.get(path)) for path in values},
            **{"status": trial.status, "id": trial.id},
            **{name: plain.get(name) for name in figures},
            **_scores(trial.result.quality.tasks if trial.result else {}, report.tasks),
            "reason": trial.reason,
            **dict(leaves({name: plain[name] for name in ("draft", "retention", "sources") if plain.get(name)})),
        }


def _scores(scores: Mapping[str, Score], tasks: Sequence[str]) -> dict[str, float | None]:
    cells: dict[str, float | None] = {}
    for task in tasks:
        score = scores.get(task)
        cells |= {task: score.value if score else None, f"{task}_stderr": score.stderr if score else None}
    return cells


def _as_cell(value: Any) -> Any:
    """Return the value of an axis; a list or a mapping as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
