"""Reports as pandas has tables, with the columns of `--csv`.

In: records of a report. Out: a DataFrame, a line for each model or trial.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from sdft_ray.report import several, table
from sdft_ray.report.entries import Report
from sdft_ray.report.sweep_entries import SweepReport

if TYPE_CHECKING:
    import pandas


def of_several(reports: several.Reports) -> pandas.DataFrame:
    """Return the lines of several reports, each behind the name of its report."""
    import pandas

    frames = {name: of_recipe(of) if isinstance(of, Report) else of_sweep(of) for name, of in reports.items()}
    return pandas.concat(frames, names=["of"]).reset_index(level="of").reset_index(drop=True)


def of_recipe(report: Report) -> pandas.DataFrame:
    """Return a line for each model of a recipe, the base first."""
    import pandas

    lines = []
    for entry in report.models:
        quality = entry.quality
        scores: dict[str, float | None] = {}
        for task, score in quality.tasks.items():
            scores |= {task: score.value, f"{task}_stderr": score.stderr}
        summed = quality.model_dump(include={"mean", "recovery", "recovery_over_chance", "limited"})
        lines.append({"model": entry.model, "id": entry.id, **scores, **summed, **entry.cost.model_dump()})
    return pandas.DataFrame(lines)


def of_sweep(report: SweepReport) -> pandas.DataFrame:
    """Return a line for each trial of a sweep, finished or not."""
    import pandas

    return pandas.read_csv(io.StringIO(table.as_csv(report)))
