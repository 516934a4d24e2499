"""The HTML page of a report: one file, no network.

In: the collected report. Out: HTML with everything inline; text from models and rows is escaped.
"""

from __future__ import annotations

from typing import Any

from sdft_ray.core.surgery import name_blocks
from sdft_ray.progress import duration
from sdft_ray.report import plots, table


def render(report: dict[str, Any]) -> str:
    """Return the page."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("sdft_ray", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=table.percent, duration=duration)
    environment.globals.update(saved=table.saved, name_blocks=name_blocks)
    return environment.get_template("page.html.jinja").render(
        report=report,
        base=report["models"][0],
        tasks=list(report["models"][0]["tasks"]),
        caption=table.caption(report, any(model["limited"] for model in report["models"])),
        corpora=report["distances"]["corpora"],
        cut_line=table.cut_line(report),
        distance_maps=plots.as_svg(plots.distance_maps(report["distances"], report["cut"]["removed"])),
        loss_curves=plots.loss_curves(report["losses"]),
        nearby=_nearby(report),
    )


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
