"""The plots of the report, as SVG text to stand inside a page.

In: distances and losses. Out: SVG without a background whose text and axes take the page's text colour, so that one
picture serves light and dark.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

_INK = "#010203"  # stands for the page's text colour until the SVG is written
ARM_COLOURS = {"sft": "#e0832a", "distilled": "#2a8fe0"}


def distance_map(distances: Sequence[Sequence[float]], span: Sequence[int]) -> str:
    """Return the heat-map of d(l, n): start l across, size n up, the removed span outlined.

    distances: (L+1, L+1), d[l][m] between x(l) and x(m).
    """
    blocks = len(distances) - 1
    sizes = max(1, blocks // 2)
    grid = [
        [distances[start][start + size] if start + size <= blocks else math.nan for start in range(blocks)]
        for size in range(1, sizes + 1)
    ]
    figure, axes = _figure(7.2, 3.6)
    image = axes.imshow(
        grid, origin="lower", aspect="auto", cmap="viridis", extent=(-0.5, blocks - 0.5, 0.5, sizes + 0.5)
    )
    start, size = span[0], span[1] - span[0]
    if size <= sizes:
        axes.plot(start, size, "s", markersize=9, markerfacecolor="none", markeredgecolor="#ff2d55", markeredgewidth=2)
    axes.set_xlabel("first removed block l")
    axes.set_ylabel("blocks removed n")
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("angular distance d(l, n)")
    bar.outline.set_edgecolor(_INK)
    return _svg(figure)


def loss_curves(losses: Mapping[str, Mapping[str, Any]]) -> str:
    """Return training loss (line) and validation loss (dots) of each arm by step."""
    figure, axes = _figure(7.2, 3.2)
    for arm, found in losses.items():
        steps = found["curve"]
        colour = ARM_COLOURS[arm]
        axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], color=colour, label=f"{arm}: training")
        checked = [s for s in steps if "validation_loss" in s]
        axes.plot(
            [s["step"] for s in checked],
            [s["validation_loss"] for s in checked],
            "o--",
            color=colour,
            markersize=4,
            linewidth=1,
            label=f"{arm}: validation (references)",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss a trained token, nats")
    axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=_INK, which="both")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_INK)
    for spine in axes.spines.values():
        spine.set_edgecolor(_INK)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    for axes in figure.axes:  # the colour bar brings axes of its own
        axes.tick_params(colors=_INK, which="both")
        axes.yaxis.label.set_color(_INK)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sdft_ray"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
