"""The HTML page of a recipe's report, of a sweep's or of several: one file, no network.

In: the collected report. Out: HTML with everything inline; text from models and rows is escaped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sdft_ray.core.choice import JointChoice
from sdft_ray.core.surgery import name_blocks
from sdft_ray.progress import duration
from sdft_ray.report import lines, plots, several, sources, table
from sdft_ray.report.entries import Details, Report
from sdft_ray.report.sweep_entries import SweepReport
from sdft_ray.store.manifest import MANIFEST
from sdft_ray.store.objects import is_store


def render(report: Report) -> str:
    """Return the page of a recipe."""
    details = report.details
    return _template("page.html.jinja").render(
        report=report,
        details=details,
        base=report.base.cost,
        caption=lines.caption(report),
        corpora=details.distances.corpora if details.distances else (),
        cut_line=lines.cut_line(details.cut, details.losses or details.greedy),
        greedy_line=lines.greedy_line(details.greedy) if details.greedy else None,
        finals_line=lines.finals_line(details),
        step_columns=[*table.STEP_COLUMNS, *table.several_corpora(details.greedy)] if details.greedy else [],
        steps=table.greedy_rows(details.greedy) if details.greedy else (),
        speed_line=lines.speed_line(report.speed) if report.speed else None,
        nll_line=lines.nll_line(details.nll) if details.nll else None,
        difference_lines=[lines.difference_line(compared) for compared in report.compared],
        retention_columns=table.retention_columns(report),
        retention_rows=table.retention_rows(report),
        retention_caption=lines.retention_caption(report),
        retention_lines=[lines.retention_line(compared) for compared in report.retention],
        generated_note=table.GENERATED_NOTE,
        generated_columns=table.GENERATED_COLUMNS,
        generated_rows=table.generated_rows(report),
        pass_at_note=table.PASS_AT_NOTE,
        pass_at_columns=table.PASS_AT_COLUMNS,
        pass_at_rows=table.pass_at_rows(report),
        merge_lines=[lines.merge_line(name, merged) for name, merged in report.merges.items()],
        export_lines=[lines.export_line(name, export) for name, export in report.exports.items()],
        draft_columns=table.DRAFT_COLUMNS,
        source_columns=sources.columns(report),
        source_rows=sources.rows(report),
        source_note=sources.NOTE,
        ladder=plots.ladder(report.models),
        distance_maps=_draw_distances(details),
        loss_curves=plots.loss_curves(details.trainings),
        nearby=_nearby(details),
    )


def render_sweep(report: SweepReport, folder: Path) -> str:
    """Return the page of a sweep; manifests are linked from `folder`, where the page will lie."""
    return _template("sweep.html.jinja").render(
        report=report,
        base=report.base.cost,
        goal_line=lines.goal_line(report.goal) if report.goal else None,
        figures=_draw_recovery(report),
        draft_figures=_draw_drafts(report),
        source_columns=sources.SWEEP_COLUMNS,
        source_rows=list(sources.sweep_rows(report)),
        source_note=sources.NOTE,
        retention=table.sweep_retention(report),
        figure_names=lines.FIGURES,
        draft_columns=table.SWEEP_DRAFT_COLUMNS,
        draft_rows=table.sweep_draft_rows(report),
        draft_note=table.DRAFT_NOTE,
        caption=lines.sweep_caption(report),
        maps=[plots.as_svg(plots.distance_maps(*each)) for each in report.maps],
        manifests=[_link(trial.directory, folder) for trial in report.trials],
    )


def _link(directory: str, folder: Path) -> str | None:
    """Return the address of an artifact's manifest for a page in a folder; None where a browser finds none."""
    if is_store(directory):
        return None
    return quote(os.path.relpath(Path(directory) / MANIFEST, folder.absolute()))


def render_several(reports: several.Reports) -> str:
    """Return the page of several recipes and sweeps."""
    return _template("several.html.jinja").render(
        notes=several.notes(reports),
        columns=several.columns(reports),
        rows=several.rows(reports),
        figures={name: _draw(report) for name, report in reports.items()},
    )


def _draw(report: Report | SweepReport) -> dict[str, str]:
    """Return the figures of a report's quality by their titles."""
    if isinstance(report, SweepReport):
        return _draw_recovery(report)
    return {"Mean score, with 95 % intervals over items": plots.ladder(report.models)}


def _draw_distances(details: Details) -> str:
    """Return the maps of what was measured to choose blocks; nothing where nothing was."""
    if details.distances is None:
        return ""
    return plots.as_svg(plots.distance_maps(details.distances, [details.cut.removed]))


def _draw_recovery(report: SweepReport) -> dict[str, str]:
    """Return figures by their titles; none where there is no recovery."""
    known = [group for group in report.groups if group.recovery is not None]
    if not known or any(model.quality.recovery is None for model in report.models):
        return {}
    by_data = len({group.rows for group in known}) > 1
    timed = all(model.speed for model in report.pruned)
    return {
        "Recovery by depth": plots.recovery_lines(report, "blocks", "rows", "blocks removed"),
        **({"Recovery by data": plots.recovery_lines(report, "rows", "blocks", "training rows")} if by_data else {}),
        "What size costs": plots.pareto_front(report, "parameters"),
        **({"What speed costs": plots.pareto_front(report, "decode")} if timed else {}),
    }


def _draw_drafts(report: SweepReport) -> dict[str, str]:
    if not report.drafts:
        return {}
    return {
        "Accepted by depth": plots.draft_lines(report, "acceptance", "a, drafted tokens accepted"),
        "Speed by depth": plots.draft_lines(report, "speedup", "tokens/s, base alone = 1"),
    }


def _template(name: str) -> Any:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("sdft_ray", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=lines.percent, duration=duration, interval=lines.interval)
    environment.filters.update(speed_line=lines.speed_line, cut_line=lines.cut_line, name_trial=lines.name_trial)
    environment.filters.update(draft_rows=table.draft_rows)
    environment.globals.update(draft_line=lines.draft_line, saved=_saved, name_blocks=name_blocks)
    return environment.get_template(name)


def _saved(amount: float, of_base: float) -> str:
    """Return what a model saves, whose percent sign stays at its number on a narrow page."""
    return lines.saved(amount, of_base).replace(" %", "\N{NO-BREAK SPACE}%")


def _nearby(details: Details) -> list[tuple[int, str, JointChoice]]:
    """Return the span choices of sizes up to twice the one that was cut, by size and metric: the next decisions to be
    made."""
    sizes = max(8, 2 * len(details.cut.removed))
    by_metric = details.distances.choices if details.distances else {}
    choices = [(size, metric, c) for metric, of_size in by_metric.items() for size, c in of_size.items()]
    return sorted((choice for choice in choices if choice[0] <= sizes), key=lambda choice: choice[0])
