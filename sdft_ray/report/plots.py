"""The plots of the report, as SVG text to stand inside a page.

In: distances and losses. Out: SVG without a background whose text and axes take the page's text colour, so that one
picture serves light and dark.
"""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sdft_ray.core.recovery import mean_error
from sdft_ray.report.entries import ModelEntry, Training
from sdft_ray.report.sweep_entries import DraftEntry, Group, SweepModel, SweepReport
from sdft_ray.results import Distances, validations

_INK = "#010203"  # stands for the page's text colour until the SVG is written
_METRIC_MARKS = {"angular": ("o", "#ffffff"), "influence": ("^", "#ff9f1c")}
ARM_COLOURS = {"sft": "#e0832a", "distilled": "#2a8fe0", "logits": "#8a4fd0"}
_OTHER_COLOURS = ("#a15fd6", "#3aa59b", "#c2527a")  # of models on other rows, in their order
_UNTRAINED, _BASE = "#8a8f98", "#14a06a"
_STYLES = ("-", "--", ":", "-.")
_HALF_A_LINE = 32
"""Characters of a legend that leave place for as many beside them."""


def distance_maps(measured: Distances, removed: Sequence[Sequence[int]] = ()) -> Any:
    """Return the heat-maps of d(l, n), one a corpus: start l across, size n up.

    Marked are, for every n, the span that each metric would remove on that corpus, and the spans that were removed.
    """
    blocks, corpora = measured.blocks, measured.corpora
    sizes = max(1, blocks // 2)
    figure, all_axes = _figure(7.2, 3.4 * len(corpora), rows=len(corpora))
    grids = [
        [
            [corpus.distances[start][start + size] if start + size <= blocks else math.nan for start in range(blocks)]
            for size in range(1, sizes + 1)
        ]
        for corpus in corpora
    ]
    highest = max(value for grid in grids for line in grid for value in line if not math.isnan(value))
    for corpus, grid, axes in zip(corpora, grids, all_axes, strict=True):
        image = axes.imshow(
            grid,
            origin="lower",
            aspect="auto",
            cmap="viridis",
            extent=(-0.5, blocks - 0.5, 0.5, sizes + 0.5),
            vmin=0,
            vmax=highest,
        )
        for metric, (marker, colour) in _METRIC_MARKS.items():
            chosen = [(choice.blocks[0], size) for size, choice in corpus.choices[metric].items()]
            inside = [(start, size) for start, size in chosen if size <= sizes]
            marks = {"color": colour, "markeredgecolor": "#555555", "markeredgewidth": 0.5, "markersize": 5}
            axes.plot(*zip(*inside, strict=True), marker, label=f"least by {metric}", **marks)
        for blocks_gone in removed:
            start, size = blocks_gone[0], len(blocks_gone)
            if blocks_gone[-1] - start == size - 1 <= sizes - 1:
                axes.plot(start, size, "s", color="none", markersize=10, markeredgecolor="#ff2d55", markeredgewidth=2)
        axes.set_title(f"{corpus.name}, {corpus.texts} texts, {corpus.positions}", color=_INK, fontsize=9)
        axes.set_xlabel("first removed block l")
        axes.set_ylabel("blocks removed n")
        bar = figure.colorbar(image, ax=axes)
        bar.set_label("angular distance d(l, n)")
        bar.outline.set_edgecolor(_INK)
    figure.legend(
        *all_axes[0].get_legend_handles_labels(),
        loc="outside lower left",
        ncols=2,
        frameon=False,
        labelcolor=_INK,
        fontsize=8,
    )
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure on white, as .svg or .png."""
    _take_texts_as_written(figure)
    figure.savefig(path, facecolor="white", dpi=150)


def loss_curves(trainings: Mapping[str, Training]) -> str:
    """Return training loss (line) and validation loss (dots) of each arm by step."""
    figure, (axes,) = _figure(7.2, 3.2)
    others = itertools.cycle(_OTHER_COLOURS)
    for arm, training in trainings.items():
        steps = training.curve
        colour = ARM_COLOURS[arm] if arm in ARM_COLOURS else next(others)
        axes.plot([step.step for step in steps], [step.loss for step in steps], color=colour, label=f"{arm}: training")
        checked = validations(steps)
        axes.plot(
            [step for step, _ in checked],
            [loss for _, loss in checked],
            "o--",
            color=colour,
            markersize=4,
            linewidth=1,
            label=f"{arm}: validation (references)",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss a trained token, nats")
    axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
    return as_svg(figure)


def ladder(models: Sequence[ModelEntry]) -> str:
    """Return the mean score of each model, from the cut that nothing was done for to the models of the last step.

    Bars are 95 % intervals over items; the line with its band is the base.
    """
    base, *steps = models
    figure, (axes,) = _figure(5.4, 1.1 + 0.32 * len(steps))
    names, others = [entry.model for entry in steps], itertools.cycle(_OTHER_COLOURS)
    for place, entry in enumerate(steps):
        known = {"pruned": _UNTRAINED, "patched": _UNTRAINED, **ARM_COLOURS}
        colour = known[entry.model] if entry.model in known else next(others)
        mean, half = _interval(entry)
        axes.errorbar([mean], [place], xerr=[half], fmt="o", color=colour, markersize=5, capsize=3)
    mean, half = _interval(base)
    axes.axvline(mean, color=_BASE, linewidth=1)
    axes.axvspan(mean - half, mean + half, color=_BASE, alpha=0.15, linewidth=0)
    axes.text(mean, -0.75, f"base {mean:.1f}", color=_BASE, ha="center", va="bottom", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.7)  # the cut on top
    axes.set_xlabel("mean over tasks, %")
    return as_svg(figure)


def _interval(entry: ModelEntry) -> tuple[float, float]:
    """Return a model's mean and half of its 95 % interval, in percent; 0 where a task has no error."""
    error = mean_error([score.stderr for score in entry.quality.tasks.values()])
    return 100 * entry.quality.mean, 196 * (error or 0.0)


def recovery_lines(report: SweepReport, along: str, apart: str, label: str) -> str:
    """Return recovery of the chosen trials along one of blocks and rows, a line for each arm and value of the other.

    Bars are one standard deviation over seeds; what was trained with other settings is shown as a faint point.
    """
    figure, (axes,) = _figure(5.4, 4.0)
    groups = [group for group in report.groups if group.recovery is not None]
    others = sorted({_apart(group, apart) for group in groups})
    for arm in dict.fromkeys(group.arm for group in groups):
        for other, style in zip(others, itertools.cycle(_STYLES)):
            mine = [group for group in groups if group.arm == arm and _apart(group, apart) == other]
            label_of = f"{arm}, {other[0]} {other[1]} {apart}".replace(",  ", ", ") if len(others) > 1 else arm
            _draw_recovery(axes, mine, along, label_of, style)
    ticks = {getattr(group, along) for group in groups}
    if along == "blocks":
        ticks |= {model.blocks for model in report.pruned}
        pruned = sorted((model.blocks, model.quality.recovery) for model in report.pruned)
        axes.plot(*zip(*pruned, strict=True), "x:", color=_UNTRAINED, label="pruned, not trained")
    axes.set_xticks(sorted(ticks))
    axes.minorticks_off()
    return _finish(figure, axes, label, "recovery, % of the base")


def _apart(group: Group, name: str) -> tuple[str, int]:
    return group.of, getattr(group, name)


def _draw_recovery(axes: Any, groups: Sequence[Group], along: str, label: str, style: str) -> None:
    """Draw the line of the chosen groups of one arm, and the others as faint points; nothing where none is chosen."""
    line = sorted((group for group in groups if group.chosen), key=lambda group: getattr(group, along))
    if not line:
        return
    colour = ARM_COLOURS[line[0].arm]
    axes.errorbar(
        [getattr(group, along) for group in line],
        [group.recovery for group in line],
        yerr=[group.recovery_sd or 0 for group in line],
        label=label,
        color=colour,
        linestyle=style,
        marker="o",
        markersize=4,
        capsize=3,
    )
    rest = [group for group in groups if not group.chosen]
    axes.plot([getattr(g, along) for g in rest], [g.recovery for g in rest], "o", color=colour, alpha=0.3)


def _finish(figure: Any, axes: Any, across: str, up: str) -> str:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    longest = max(map(len, axes.get_legend_handles_labels()[1]))  # where a line is of a base by its path
    columns = 2 if longest <= _HALF_A_LINE else 1
    figure.legend(loc="outside lower left", ncols=columns, frameon=False, labelcolor=_INK, fontsize=8, handlelength=3)
    return as_svg(figure)


def draft_lines(report: SweepReport, figure_of: Literal["acceptance", "speedup"], label: str) -> str:
    """Return a figure of the chosen drafts by depth, a line for each model and size, greedy and sampled.

    Acceptance stands with its standard error, beside the measured speed stands what is expected.
    """
    figure, (axes,) = _figure(5.4, 4.0)
    by_name: dict[tuple[str, ...], list[DraftEntry]] = {}
    for draft in report.drafts:
        if draft.chosen:
            size = f"{draft.rows} rows" if draft.rows else ""
            by_name.setdefault((draft.arm, draft.of, size), []).append(draft)
    arms = [arm for arm, *_ in by_name]
    for (names, drafts), marker in zip(by_name.items(), itertools.cycle("os^D")):
        who = ", ".join(filter(None, names if arms.count(names[0]) > 1 else names[:1]))
        look = {"color": ARM_COLOURS.get(names[0], _UNTRAINED), "marker": marker}
        depths = [draft.blocks for draft in drafts]
        for text, style in (("greedy", "-"), ("sampled", "--")):
            each = [draft.worth.texts[text] for draft in drafts]
            errors = [one.acceptance_error for one in each] if figure_of == "acceptance" else None
            heights = [getattr(one, figure_of) for one in each]
            more = {"linestyle": style, "markersize": 4, "capsize": 3, "label": f"{who}, {text}"}
            axes.errorbar(depths, heights, yerr=errors, **look, **more)
            if figure_of == "speedup":
                expected = [one.expected_speedup for one in each]
                axes.plot(depths, expected, linestyle="", **look, markersize=6, fillstyle="none", alpha=0.6)
    if figure_of == "speedup":
        axes.axhline(1, color=_BASE, linewidth=1, label="base alone")
    axes.set_xticks(sorted({draft.blocks for draft in report.drafts}))
    return _finish(figure, axes, "blocks removed", label)


def pareto_front(report: SweepReport, cost: Literal["parameters", "decode"]) -> str:
    """Return recovery by cost of every model; the line joins those that no cheaper one does better than.

    cost: `parameters`, or `decode`, the measured time of a token as a multiple of the base's.
    """
    figure, (axes,) = _figure(5.4, 4.0)
    models = {model.id: model for model in report.models}

    def price(model: SweepModel) -> float:
        if cost == "parameters":
            return model.cost.parameters / 1e6
        return 1 / model.speed.decode.ratio if model.speed else 1.0

    points = [(price(model), model.quality.recovery, str(model.model)) for model in models.values()]
    points += [(price(models[group.pruned]), group.recovery, group.arm) for group in report.groups]
    for name, colour in {"base": _BASE, "pruned": _UNTRAINED, "patched": _OTHER_COLOURS[2], **ARM_COLOURS}.items():
        if mine := [point for point in points if point[2] == name]:
            axes.plot([x for x, _, _ in mine], [y for _, y, _ in mine], "o", color=colour, markersize=5, label=name)
    best, front = -math.inf, []
    known = [(size, recovery) for size, recovery, _ in points if recovery is not None]
    for size, recovery in sorted(known, key=lambda point: (point[0], -point[1])):
        if recovery > best:
            best = recovery
            front.append((size, recovery))
    axes.plot(*zip(*front, strict=True), "-", color=_INK, linewidth=0.8, alpha=0.6, zorder=0)
    across = "parameters, millions" if cost == "parameters" else "measured time of a decoded token, base = 1"
    return _finish(figure, axes, across, "recovery, % of the base")


def _figure(width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    """Return a figure in the page's ink and its axes, one under the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    all_axes = figure.subplots(rows, squeeze=False)[:, 0]
    for axes in all_axes:
        axes.patch.set_alpha(0)
        axes.tick_params(colors=_INK, which="both")
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(_INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(_INK)
    return figure, all_axes


def _take_texts_as_written(figure: Any) -> None:
    """Let no name of a file or a recipe be a formula: one with two dollar signs ended the page."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)


def as_svg(figure: Any) -> str:
    """Return a figure as SVG text in the page's text colour."""
    import matplotlib

    for axes in figure.axes:  # the colour bar brings axes of its own
        axes.tick_params(colors=_INK, which="both")
        axes.yaxis.label.set_color(_INK)
    _take_texts_as_written(figure)
    buffer, rules = io.StringIO(), {"svg.fonttype": "none", "svg.hashsalt": "sdft_ray"}
    with matplotlib.rc_context(rules), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a browser has others
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
