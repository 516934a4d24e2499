"""The sentences and figures of reports, for the terminal and the pages alike.

In: records of a report. Out: text; scores in percent, because that is how leaderboards print them.
"""

from __future__ import annotations

from sdft_ray.core.merging import COLLINEAR
from sdft_ray.core.recovery import Estimate
from sdft_ray.core.surgery import name_blocks
from sdft_ray.errors import counted
from sdft_ray.report.entries import (
    Comparison,
    Details,
    Draft,
    Exported,
    Greedy,
    Losses,
    MergeEntry,
    Nll,
    Report,
    RetentionComparison,
    Selection,
    Speed,
)
from sdft_ray.report.sweep_entries import GoalEntry, SweepReport, TrialEntry
from sdft_ray.results import HELD_OUT, Cut, Pace, Score
from sdft_ray.stages import finals

_LIMITED = "LIMITED: scores are of a part of each task, not comparable with published ones. "


def caption(report: Report) -> str:
    """Return what a reader must know to read the table of a recipe."""
    limited = any(model.quality.limited for model in report.models)
    text = f"± one standard error. {_name_sizes(report.base.quality.tasks)}"
    text += f" FLOPs: forward, counted at {report.flops_tokens} tokens."
    held_out = {model.model: score for model in report.models if (score := model.quality.tasks.get(HELD_OUT))}
    if held_out:
        text += " Bits per byte of the held-out references (lower is better): "
        text += ", ".join(f"{name} {score.bits_per_byte:.2f}" for name, score in held_out.items()) + "."
    return _LIMITED * limited + text


def sweep_caption(report: SweepReport) -> str:
    """Return what a reader must know to read the figures of a sweep."""
    text = f"± over seeds: one standard deviation. {_name_sizes(report.base.quality.tasks)}"
    if not all(group.chosen for group in report.groups):
        text += " Of one arm, depth and size the setting of the lowest validation loss is chosen."
    if report.base.retention:
        text += " KL(base || model): nats a token, on responses of the base and on plain texts."
    return _LIMITED * report.limited + text


def _name_sizes(scores: dict[str, Score]) -> str:
    return f"Items: {', '.join(f'{task} {score.n}' for task, score in scores.items())}."


def cut_line(cut: Cut, losses: Losses | Greedy | None = None) -> str:
    """Return the removed blocks, what chose them, and how sure the choice is."""
    enough = f", the fewest for {cut.target:,.0f} parameters or less" if cut.target else ""
    if cut.cost is None or cut.agreement is None:
        why = "the last ones that may go" if cut.metric == "tail" else "named by the recipe"
        return f"Cut: blocks {name_blocks(cut.removed)}{enough}, {why}."
    cost = {"angular": "distance", "influence": "summed influence", "loss": "loss on the loss texts"}[cut.metric]
    text = f"Cut: blocks {name_blocks(cut.removed)}{enough}, {cost} {cut.cost:.3f}"
    if losses and cut.metric == "loss":
        text += f" ({losses.base_loss:.3f} with nothing removed)"
    return f"{text}; {cut.agreement:.0%} of bootstrap samples choose the same."


def greedy_line(greedy: Greedy) -> str:
    """Return what it cost to remove blocks one after the other."""
    cost = greedy.cost
    text = f"Removed one after the other: {cost.candidates} candidates in {len(greedy.steps)} steps took the work of"
    return f"{text} {cost.passes:.0f} passes over the loss texts ({cost.from_the_start:.0f} without shared states)."


def finals_line(details: Details) -> str | None:
    """Return what came of the cuts that were trained before one was chosen, and at what cost."""
    return (
        f"Finalists, the loss before and after training: {finals.describe(details.finals)}." if details.finals else None
    )


def speed_line(speed: Speed) -> str:
    """Return how fast the pruned model was against the base, with the range over alternating runs."""

    def name(pace: Pace) -> str:
        return ratio(pace.ratio, pace.ratio_min, pace.ratio_max)

    figures = f"prefill {name(speed.prefill)}, decode {name(speed.decode)}"
    return f"Measured tokens/s of the pruned model, as a multiple of the base's: {figures}."


def difference_line(compared: Comparison) -> str:
    """Return how much better one arm does than the other on the same items, and how sure that is."""
    each = ", ".join(f"{task} {interval(difference)}" for task, difference in compared.tasks.items())
    names = f"{compared.first} - {compared.second}"
    return f"{names} on the same items, in points with 95 % intervals: mean {interval(compared.mean)}; {each}."


def goal_line(goal: GoalEntry) -> str:
    """Return how deep the cut may be, and what was tried to know it."""
    if goal.following is not None:
        found = f"not decided yet: the next try is {counted(goal.following, 'block')}"
    elif goal.chosen is None:
        found = f"no depth {'keeps' if goal.keeps else 'reaches'} {goal.wanted}"
    else:
        blocks = counted(goal.chosen, "block")
        found = f"{blocks} may go" if goal.keeps else f"removing {blocks} is enough"
    tried = "; ".join(goal.lines) or "nothing was tried"
    aim = f"{goal.arm} above {goal.wanted} with its 95 % interval" if goal.keeps else goal.wanted
    return f"Goal, {aim}: {found}. {tried}."


FIGURES = {
    "kl_responses": "KL, responses",
    "kl_texts": "KL, texts",
    "agreement_responses": "agreement, responses",
    "agreement_texts": "agreement, texts",
    "bits_per_byte": "bits/byte, references",
}
"""How figures of retention are called."""


def retention_caption(report: Report) -> str:
    """Return what a reader must know to read the table of retention."""
    sizes = (
        [
            f"{kept.texts} {what} ({kept.tokens} tokens)"
            for what, kept in (("responses of the base", own.responses), ("plain texts", own.texts))
            if kept
        ]
        if (own := report.base.retention)
        else []
    )
    text = f"KL(base || model), nats a token, and agreement on the likeliest token, in %: {', '.join(sizes)}."
    return f"{text} Brackets: 95 % intervals (bootstrap over texts)."


def retention_line(compared: RetentionComparison) -> str:
    """Return how much nearer to the base one arm stays than the other on the same texts, and how sure that is."""
    each = ", ".join(f"{FIGURES[name]} {figure_of(name, figure, '+')}" for name, figure in compared.figures.items())
    return f"{compared.first} - {compared.second} on the same texts, with 95 % intervals: {each}."


def figure_of(name: str, figure: Estimate, sign: str = "") -> str:
    """Return a figure with its interval where it has one; agreement and pass@k in %.

    >>> figure_of("kl_texts", Estimate(0.5, 0.25, 0.75, 9)), figure_of("agreement_texts", Estimate(1.0, 1.0, 1.0, 9))
    ('0.500 [0.250, 0.750]', '100.0')
    """
    scale, places = (100, 1) if name.startswith(("agreement", "pass@")) else (1, 3)
    value, low, high = (f"{scale * each:{sign}.{places}f}" for each in (figure.value, figure.low, figure.high))
    return value if figure.low == figure.high else f"{value} [{low}, {high}]"


def merge_line(name: str, entry: MergeEntry) -> str:
    """Return what was merged, how far that could differ from the mean of the weights, and what it gained."""
    merged = entry.merged
    text = f"{name}: merged from {' and '.join(entry.models)}; {merged.identical} of {merged.tensors} tensors"
    text += f" were identical, the least similar have cosine {merged.least_cosine:.4f}"
    if name == "slerp":
        text += f"; {merged.fell_back_to_linear} with a cosine beyond {COLLINEAR} fell back to the mean"
    gained = ", ".join(f"{other} {interval(difference)}" for other, difference in entry.against.items())
    return f"{text}. {name} less others on the same items, mean in points with 95 % intervals: {gained}."


def export_line(name: str, export: Exported) -> str:
    """Return how large an exported model is, and how far its weights are from those that it was made of."""
    size = f"{export.bytes / 1e6:.1f} MB of weights for {export.of_bytes / 1e6:.1f} MB"
    error = f"off by {export.largest_error:.2g} at most" if export.largest_error else "as they are after rounding"
    return f"{name}: {size}, {error}."


def draft_line(name: str, draft: Draft) -> str:
    """Return what a model is worth as a draft: the best number of drafted tokens, and what it cost and gained."""
    best = draft.greedy.best
    text = f"{name} as draft of the base: a token of it takes {draft.cost:.2f} of the base's time; greedy, with"
    text += f" {best.tokens} drafted: {best.accepted_share:.0%} accepted, {best.tokens_per_call:.2f} tokens a"
    text += f" call, {ratio(best.speedup, best.speedup_min, best.speedup_max)} times the tokens/s"
    text += f" (expected {best.expected_speedup:.2f}; gains below a cost of {best.break_even_cost:.2f})"
    if best.differing:
        text += f"; the text of {len(best.differing)} of {draft.prompts} prompts differs from the base's alone"
    return f"{text}."


def selection_line(selection: Selection) -> str:
    """Return how many rewrites were kept, and why the others were not."""
    others = ", ".join(f"{n} {reason}" for reason, n in selection.reasons.items() if n and reason != "kept")
    by = f" by {selection.teacher}, which is not the base" if selection.teacher else ""
    text = f"Rewrites{by}: {selection.kept} of {selection.rows} rows kept"
    return text + (f"; the reference stays for {others}." if others else ".")


def nll_line(nll: Nll) -> str | None:
    """Return how likely the base model finds rewrites and references, and how long they are; None where none was
    measured."""
    if not (nll.distilled and nll.reference):
        return None
    each = (
        f"{name} {side.nll_per_token:.3f} ({side.mean_tokens:.0f} tokens)"
        for name, side in (("rewrites", nll.distilled), ("references", nll.reference))
    )
    return f"Negative log-likelihood a token under the base, {nll.rows} kept rows: {', '.join(each)}."


def name_trial(trial: TrialEntry) -> str:
    """Return a trial in words."""
    return f"{counted(trial.blocks, 'block')}, {trial.rows} rows, {trial.name}"


def name_chosen(name: str, chosen: bool) -> str:
    """Return the name of a group, marked where another setting was chosen."""
    return name if chosen else f"{name} (not chosen)"


# --- figures --------------------------------------------------------------------------------------------------


def percent(score: Score) -> str:
    """Return a score in percent with its standard error."""
    error = f" ±{100 * score.stderr:.1f}" if score.stderr is not None else ""
    return f"{100 * score.value:.1f}{error}"


def saved(amount: float, of_base: float) -> str:
    """Return how much less than the base a model has of something, or nothing for the base."""
    return f" (-{100 * (1 - amount / of_base):.1f} %)" if amount < of_base else ""


def interval(difference: Estimate) -> str:
    """Return a difference with its interval, in points.

    >>> interval(Estimate(0.012, -0.01, 0.034, 100))
    '+1.2 [-1.0, +3.4]'
    """
    return f"{100 * difference.value:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def ratio(value: float, low: float, high: float) -> str:
    """Return a ratio of speeds with its range over alternating runs."""
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def millions(parameters: int) -> str:
    """Return a number of parameters in millions."""
    return f"{parameters / 1e6:.1f}M"


def number(value: float | None) -> str:
    """Return a number with one decimal."""
    return "-" if value is None else f"{value:.1f}"
