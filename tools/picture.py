"""Draws docs/figures/demo.svg, the picture of the README: the chain with the figures of one real run of the demo.

In: docs/figures/demo.json, figures that `sdft report configs/recipes/demo.yaml --json` and the manifests of a run gave.
Out: the SVG. It is text and arithmetic alone, so that the same figures always give the same file; a test compares them.
    python tools/picture.py
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
WIDTH, HEIGHT = 940, 430
INK, QUIET, LINE = "#1f2328", "#59636e", "#9aa4af"
FILLS = {"base": "#57606a", "pruned": "#bc4c00", "sft": "#0969da", "distilled": "#1a7f37"}
BOX_WIDTH, BOX_HEIGHT = 164, 74


def draw(figures: dict[str, Any]) -> str:
    """Return the picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="-apple-system, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif" role="img">',
        f"<title>{html.escape(_title(figures))}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        *_chain(figures),
        *_bars(figures["models"]),
    ]
    return "\n".join([*parts, "</svg>", ""])


def _title(figures: dict[str, Any]) -> str:
    means = ", ".join(f"{model['model']} {100 * model['mean']:.1f} %" for model in figures["models"])
    return f"{figures['base']} without {len(figures['removed'])} of {figures['blocks']} blocks; mean score: {means}"


def _chain(figures: dict[str, Any]) -> list[str]:
    """Return boxes and arrows of the chain: the cut above, the rewrites below, both into the training."""
    removed, distill = figures["removed"], figures["distill"]
    base, pruned = (figures["models"][i]["parameters"] / 1e6 for i in (0, 1))
    left, second, third, last = 20, 268, 516, 756
    above, below, middle = 44, 158, 101
    texts = f"{figures['score']['texts']} + {figures['loss']['texts']} texts"
    kept = [f"{distill['kept']} rewrites are kept,", f"{distill['rows'] - distill['kept']} references stay"]
    boxes = [
        (left, middle, "base model", [f"{figures['blocks']} blocks", f"{base:.1f} M parameters"]),
        (second, above, "score, loss", [texts, _span(removed)]),
        (third, above, "cut", [f"{figures['blocks'] - len(removed)} blocks", f"{pruned:.1f} M parameters"]),
        (second, below, "distill", ["the base rewrites", f"{distill['rows']} reference answers"]),
        (third, below, "check", kept),
        (last, middle, "train, twice", ["on references (sft) and", "on rewrites (distilled)"]),
    ]
    ends = {
        (left, middle): [(second, above), (second, below)],
        (second, above): [(third, above)],
        (second, below): [(third, below)],
        (third, above): [(last, middle)],
        (third, below): [(last, middle)],
    }
    arrows = [_arrow(start, end) for start, targets in ends.items() for end in targets]
    heading = f"One run of make demo: {figures['base']}, two CPU cores, {figures['date']}"
    return [_text(20, 26, heading, 14, weight=600), *arrows, *(_box(*box) for box in boxes)]


def _span(removed: Sequence[int]) -> str:
    return f"choose blocks [{removed[0]}, {removed[-1] + 1})"


def _bars(models: Sequence[dict[str, Any]]) -> list[str]:
    """Return one bar for each model: its mean score, and the share of the base's that this is."""
    top, left, full = 286, 130, 560
    tasks, items = len(models[0]["tasks"]), sum(task["n"] for task in models[0]["tasks"].values())
    heading = f"Mean score of {tasks} tasks, {items} items in all, in %"
    parts = [_text(20, top - 14, heading, 14, weight=600)]
    for number, model in enumerate(models):
        y, mean = top + 34 * number, 100 * model["mean"]
        width = full * mean / 60  # no model is above 60 %
        parts.append(_text(left - 12, y + 17, model["model"], 13, anchor="end"))
        parts.append(
            f'<rect x="{left}" y="{y}" width="{width:.1f}" height="24" rx="3" fill="{FILLS[model["model"]]}"/>'
        )
        label = f"{mean:.1f}" if number == 0 else f"{mean:.1f}, recovery {model['recovery']:.1f} %"
        parts.append(_text(left + width + 10, y + 17, label, 13))
    return parts


def _box(x: float, y: float, name: str, lines: Sequence[str]) -> str:
    rows = "\n".join(
        _text(x + BOX_WIDTH / 2, y + 42 + 18 * i, line, 12, QUIET, "middle") for i, line in enumerate(lines)
    )
    frame = f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="#f6f8fa" stroke="{LINE}"/>'
    return "\n".join([frame, _text(x + BOX_WIDTH / 2, y + 22, name, 14, anchor="middle", weight=600), rows])


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """Return an arrow from the right edge of one box to the left edge of another."""
    x1, y1, x2, y2 = start[0] + BOX_WIDTH, start[1] + BOX_HEIGHT / 2, end[0] - 7, end[1] + BOX_HEIGHT / 2
    bend = (x1 + x2) / 2
    path = f'<path d="M {x1} {y1} C {bend} {y1} {bend} {y2} {x2} {y2}" fill="none" stroke="{LINE}" stroke-width="1.5"/>'
    return path + f'<path d="M {x2 - 1} {y2 - 4.5} l 8 4.5 l -8 4.5 z" fill="{LINE}"/>'


def _text(x: float, y: float, text: str, size: int, fill: str = INK, anchor: str = "start", weight: int = 400) -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{html.escape(text)}</text>'


if __name__ == "__main__":
    (FIGURES / "demo.svg").write_text(draw(json.loads((FIGURES / "demo.json").read_text())), encoding="utf-8")
