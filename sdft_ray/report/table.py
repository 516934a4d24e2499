"""The recovery table on the terminal.

In: the collected report. Out: a rich table; scores in percent, because that is how leaderboards print them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sdft_ray.core.merging import COLLINEAR
from sdft_ray.core.speculation import best_measured
from sdft_ray.core.surgery import name_blocks


def recovery_table(report: dict[str, Any]) -> Table:
    """Return models down, tasks across, then mean, recovery, parameters and FLOPs."""
    tasks = list(report["models"][0]["tasks"])
    limited = any(model["limited"] for model in report["models"])
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{report['recipe']}: quality kept, in %",
        caption=caption(report, limited),
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("model")
    for task in tasks:
        table.add_column(task, justify="right")
    for column in ("mean", "recovery", "over chance", "parameters", "FLOPs/token"):
        table.add_column(column, justify="right")
    base = report["models"][0]
    for model in report["models"]:
        table.add_row(
            model["model"],
            *(percent(model["tasks"][task]) for task in tasks),
            f"{100 * model['mean']:.1f}",
            _or_dash(model["recovery"]),
            _or_dash(model["recovery_over_chance"]),
            f"{model['parameters'] / 1e6:.1f}M{saved(model, base, 'parameters')}",
            f"{model['flops_per_token'] / 1e6:.0f}M{saved(model, base, 'flops_per_token')}",
        )
    return table


def caption(report: dict[str, Any], limited: bool) -> str:
    """Return what a reader must know to read the table."""
    first = report["models"][0]["tasks"]
    sizes = ", ".join(f"{task} {score['n']}" for task, score in first.items())
    text = f"± one standard error. Items: {sizes}. FLOPs: forward, counted at {report['flops_tokens']} tokens."
    if limited:
        text = f"LIMITED: scores are of a part of each task, not comparable with published ones. {text}"
    bits = {m["model"]: m["tasks"]["held_out"]["bits_per_byte"] for m in report["models"] if "held_out" in m["tasks"]}
    if bits:
        text += " Bits per byte of the held-out references (lower is better): "
        text += ", ".join(f"{name} {value:.2f}" for name, value in bits.items()) + "."
    return text


def percent(score: dict[str, Any]) -> str:
    """Return a score in percent with its standard error."""
    error = f" ±{100 * score['stderr']:.1f}" if score["stderr"] is not None else ""
    return f"{100 * score['value']:.1f}{error}"


def saved(model: dict[str, Any], base: dict[str, Any], key: str) -> str:
    """Return how much less than the base a model has of something, or nothing for the base."""
    return f" (-{100 * (1 - model[key] / base[key]):.1f} %)" if model[key] < base[key] else ""


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table and the two lines that explain it."""
    console.print(recovery_table(report))
    console.print(cut_line(report["cut"], report["losses_of_spans"]))
    if compared := report["comparison"]:
        console.print(difference_line(compared))
    for name, merged in report["merges"].items():
        console.print(merge_line(name, merged))
    for name, draft in report["drafts"].items():
        console.print(draft_line(name, draft))
    if report["speed"]:
        console.print(speed_line(report["speed"]))
    if selection := report["selection"]:
        others = ", ".join(f"{n} {reason}" for reason, n in selection["reasons"].items() if n and reason != "kept")
        console.print(
            f"Rewrites: {selection['kept']} of {selection['rows']} rows kept"
            + (f"; the reference stays for {others}." if others else ".")
        )
    if report["nll"] and report["nll"]["rows"]:
        console.print(nll_line(report["nll"]))


def nll_line(nll: Mapping[str, Any]) -> str:
    """Return how likely the base model finds rewrites and references, and how long they are."""
    each = (
        f"{name} {nll[key]['nll_per_token']:.3f} ({nll[key]['mean_tokens']:.0f} tokens)"
        for name, key in (("rewrites", "distilled"), ("references", "reference"))
    )
    return f"Negative log-likelihood a token under the base, {nll['rows']} kept rows: {', '.join(each)}."


def cut_line(cut: Mapping[str, Any], losses: Mapping[str, Any] | None = None) -> str:
    """Return which blocks went, by which metric, and how sure that is."""
    cost = {"angular": "distance", "influence": "summed influence", "loss": "loss on held-back text"}[cut["metric"]]
    text = f"Cut: blocks {name_blocks(cut['removed'])}, {cost} {cut['cost']:.3f}"
    if losses and cut["metric"] == "loss":
        text += f" ({losses['base_loss']:.3f} with nothing removed)"
    return f"{text}; {cut['agreement']:.0%} of bootstrap samples choose the same."


def merge_line(name: str, merged: Mapping[str, Any]) -> str:
    """Return what was merged, how far that could differ from the mean of the weights, and what it gained."""
    text = f"{name}: merged from {' and '.join(merged['models'])}; {merged['identical']} of {merged['tensors']} tensors"
    text += f" were identical, the least alike have cosine {merged['least_cosine']:.4f}"
    if name == "slerp":
        text += f"; {merged['fell_back_to_linear']} with a cosine beyond {COLLINEAR} fell back to the mean"
    gained = ", ".join(f"{other} {interval(found)}" for other, found in merged["against"].items())
    return f"{text}. {name} less others on the same items, mean in points with 95 % intervals: {gained}."


def draft_line(name: str, draft: Mapping[str, Any]) -> str:
    """Return what a model is worth as a draft: the best number of drafted tokens, and what it cost and gained."""
    best = best_measured(draft["greedy"]["measured"])
    text = f"{name} as draft of the base: a token of it takes {draft['cost']:.2f} of the base's time; greedy, with"
    text += f" {best['tokens']} drafted: {best['accepted_share']:.0%} accepted, {best['tokens_per_call']:.2f} tokens a"
    text += f" call, {ratio(best, 'speedup')} times the tokens/s"
    text += f" (expected {best['expected_speedup']:.2f}; gains below a cost of {best['break_even_cost']:.2f})"
    if best["differing"]:
        text += f"; the text of {len(best['differing'])} of {draft['prompts']} prompts differs from the base's alone"
    return f"{text}."


DRAFT_COLUMNS = (
    "text",
    "drafted",
    "a",
    "accepted",
    "tokens a call",
    "expected speed",
    "measured speed",
    "pays below c",
)


def draft_rows(draft: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield a row under DRAFT_COLUMNS for each number of drafted tokens: measured with it, else counted with more."""
    for text in ("greedy", "sampled"):
        measured = {one["tokens"]: one for one in draft[text]["measured"]}
        for counted in draft[text]["counted"]:
            one = measured.get(counted["tokens"], counted)
            yield [
                text,
                str(one["tokens"]),
                f"{one['acceptance']:.2f}",
                f"{one['accepted_share']:.0%}",
                f"{one['tokens_per_call']:.2f}",
                f"{one['expected_speedup']:.2f}",
                ratio(one, "speedup") if "speedup" in one else "-",
                f"{one['break_even_cost']:.2f}",
            ]


def speed_line(speed: Mapping[str, Any]) -> str:
    """Return how fast the pruned model was against the base, with the range over alternating runs."""
    each = [f"{kind} {ratio(found, 'ratio')}" for kind, found in speed.items()]
    return f"Measured tokens/s of the pruned model, as a multiple of the base's: {', '.join(each)}."


def difference_line(compared: Mapping[str, Any]) -> str:
    """Return how much better one arm does than the other on the same items, and how sure that is."""
    each = ", ".join(f"{task} {interval(found)}" for task, found in compared["tasks"].items())
    names = f"{compared['first']} - {compared['second']}"
    return f"{names} on the same items, in points with 95 % intervals: mean {interval(compared['mean'])}; {each}."


def interval(found: Mapping[str, float]) -> str:
    """Return a difference with its interval, in points.

    >>> interval({"value": 0.012, "low": -0.01, "high": 0.034})
    '+1.2 [-1.0, +3.4]'
    """
    return f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def ratio(found: Mapping[str, float], name: str) -> str:
    """Return a ratio of speeds with its range over alternating runs."""
    return f"{found[name]:.2f} ({found[f'{name}_min']:.2f} to {found[f'{name}_max']:.2f})"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
