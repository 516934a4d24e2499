"""The HTML page of a report: one file, no network.

In: the collected report. Out: HTML with everything inline; text from models and rows is escaped.
"""

from __future__ import annotations

from typing import Any

from sdft_ray.progress import duration
from sdft_ray.report import plots, table


def render(report: dict[str, Any]) -> str:
    """Return the page."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("sdft_ray", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=table.percent, duration=duration)
    environment.globals.update(saved=table.saved)
    return environment.get_template("page.html.jinja").render(
        report=report,
        base=report["models"][0],
        tasks=list(report["models"][0]["tasks"]),
        caption=table.caption(report, any(model["limited"] for model in report["models"])),
        distance_map=plots.distance_map(report["distances"]["distances"], report["cut"]["span"]),
        loss_curves=plots.loss_curves(report["losses"]),
        nearby=_nearby(report),
    )


def _nearby(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the span choices of sizes up to twice the one that was cut: the next decisions to be made."""
    removed = report["cut"]["span"][1] - report["cut"]["span"][0]
    choices = report["distances"]["choices"]
    return [{"blocks": int(n), **choice} for n, choice in choices.items() if int(n) <= max(8, 2 * removed)]
