"""The HTML page of a recipe's or a sweep's report: one file, no network.

In: the collected report. Out: HTML with everything inline; text from models and rows is escaped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sdft_ray.core.surgery import name_blocks
from sdft_ray.progress import duration
from sdft_ray.report import plots, sweep, table
from sdft_ray.store.manifest import MANIFEST


def render(report: dict[str, Any]) -> str:
    """Return the page of a recipe."""
    return _template("page.html.jinja").render(
        report=report,
        base=report["models"][0],
        tasks=list(report["models"][0]["tasks"]),
        caption=table.caption(report, any(model["limited"] for model in report["models"])),
        corpora=report["distances"]["corpora"],
        cut_line=table.cut_line(report["cut"], report["losses_of_spans"]),
        speed_line=table.speed_line(report["speed"]) if report["speed"] else None,
        nll_line=table.nll_line(report["nll"]) if report["nll"] and report["nll"]["rows"] else None,
        difference_line=table.difference_line(report["comparison"]) if report["comparison"] else None,
        merge_lines=[table.merge_line(name, merged) for name, merged in report["merges"].items()],
        draft_columns=table.DRAFT_COLUMNS,
        distance_maps=plots.as_svg(plots.distance_maps(report["distances"], [report["cut"]["removed"]])),
        loss_curves=plots.loss_curves(report["losses"]),
        nearby=_nearby(report),
    )


def render_sweep(report: dict[str, Any], folder: Path) -> str:
    """Return the page of a sweep; manifests are linked from `folder`, where the page will lie."""
    known = [group for group in report["groups"] if group["recovery"] is not None]
    figures = {}
    if known and all(model["recovery"] is not None for model in report["models"]):
        figures["Recovery by depth"] = plots.recovery_lines(report, "blocks", "rows", "blocks removed")
        if len({group["rows"] for group in known}) > 1:
            figures["Recovery by data"] = plots.recovery_lines(report, "rows", "blocks", "training rows")
        figures["What size costs"] = plots.pareto_front(report, "parameters")
        if all(model["speed"] for model in report["models"] if model["model"] == "pruned"):
            figures["What speed costs"] = plots.pareto_front(report, "decode")
    drafts = {}
    if report["drafts"]:
        drafts["Accepted by depth"] = plots.draft_lines(report, "acceptance", "a, drafted tokens accepted")
        drafts["Speed by depth"] = plots.draft_lines(report, "speedup", "tokens/s, base alone = 1")
    return _template("sweep.html.jinja").render(
        report=report,
        figures=figures,
        draft_figures=drafts,
        draft_columns=sweep.DRAFT_COLUMNS,
        draft_rows=sweep.draft_rows(report),
        draft_note=sweep.DRAFT_NOTE,
        caption=sweep.caption(report),
        maps=[plots.as_svg(plots.distance_maps(found["distances"], found["removed"])) for found in report["maps"]],
        manifests=[
            os.path.relpath(Path(entry["directory"]) / MANIFEST, folder.absolute()) for entry in report["trials"]
        ],
    )


def _template(name: str) -> Any:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("sdft_ray", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=table.percent, duration=duration, interval=table.interval)
    environment.filters["speed_line"] = table.speed_line
    environment.filters.update(draft_rows=table.draft_rows)
    environment.filters.update(name_group=sweep.name_group, name_trial=sweep.name_trial, cut_line=table.cut_line)
    environment.globals.update(draft_line=table.draft_line, saved=table.saved, name_blocks=name_blocks)
    return environment.get_template(name)


def _nearby(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the span choices of sizes up to twice the one that was cut: the next decisions to be made."""
    sizes = max(8, 2 * len(report["cut"]["removed"]))
    choices = report["distances"]["choices"]
    return [
        {"size": n, "metric": metric, **choice}
        for n in choices["angular"]
        for metric, choice in ((metric, choices[metric][n]) for metric in choices)
        if int(n) <= sizes
    ]
