"""The tables of reports: of a recipe, of a sweep, and of single artifacts; here alone they are built.

In: records of a report, or an artifact's summary. Out: tables for the terminal, and rows for the pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.table import Column, Table

from sdft_ray.core.choice import JointChoice
from sdft_ray.core.surgery import name_blocks
from sdft_ray.report import several
from sdft_ray.report.entries import Draft, Greedy, Losses, Report
from sdft_ray.report.lines import (
    FIGURES,
    caption,
    figure_of,
    interval,
    millions,
    name_chosen,
    number,
    percent,
    ratio,
    retention_caption,
    saved,
    sweep_caption,
)
from sdft_ray.report.sweep_entries import SweepReport
from sdft_ray.results import Corpus, Measured
from sdft_ray.stages import score

# --- a recipe -------------------------------------------------------------------------------------------------


def recovery_table(report: Report) -> Table:
    """Return models down, tasks across, then mean, recovery, parameters and FLOPs."""
    columns = ["model", *report.tasks, "mean", "recovery", "over chance", "parameters", "FLOPs/token"]
    base, rows = report.base.cost, list[list[str]]()
    for model in report.models:
        quality, cost = model.quality, model.cost
        rows.append(
            [
                model.model,
                *(percent(quality.tasks[task]) for task in report.tasks),
                number(100 * quality.mean),
                number(quality.recovery),
                number(quality.recovery_over_chance),
                f"{millions(cost.parameters)}{saved(cost.parameters, base.parameters)}",
                f"{cost.flops_per_token / 1e6:.0f}M{saved(cost.flops_per_token, base.flops_per_token)}",
            ]
        )
    return filled(titled(f"{report.recipe}: quality kept, in %", caption(report)), columns, rows)


def retention_columns(report: Report) -> list[str]:
    """Return the columns of the table of retention; none where it was not measured."""
    own = report.base.retention
    return ["model", *(FIGURES[name] for name in own.figures)] if own else []


def retention_rows(report: Report) -> list[list[str]]:
    """Return how near each model stays to the base."""
    kept = [(model.model, model.retention.figures) for model in report.models if model.retention]
    return [[name, *(figure_of(*figure) for figure in figures.items())] for name, figures in kept]


def retention_table(report: Report) -> Table:
    """Return how near each model stays to the base."""
    return filled(titled("Retention", retention_caption(report)), retention_columns(report), retention_rows(report))


_NAMES = ("of", "model", "source", "draft", "text")  # columns of them
GENERATED_COLUMNS = ("model", "end by themselves", "repeat", "empty", "refuse", "characters", "of the base's")
GENERATED_NOTE = (
    "In % of the answers; repetition and refusal count where the reference has none. Characters: mean length."
)


def generated_rows(report: Report) -> list[list[str]]:
    """Return what goes wrong in each model's answers to held-out rows, in %, and how long they are."""
    rows = []
    for model in report.models:
        if (own := model.generated) and (base := report.base.generated):
            shares = (own.ended, own.repeated, own.empty, own.refused)
            length = f"{own.characters / base.characters:.0%}" if base.characters else "-"
            cells = (number(None if share is None else 100 * share) for share in shares)
            rows.append([model.model, *cells, f"{own.characters:.0f}", length])
    return rows


def generated_table(report: Report) -> Table:
    """Return how each model answers held-out rows."""
    return filled(titled("Answers to held-out rows", GENERATED_NOTE), GENERATED_COLUMNS, generated_rows(report))


PASS_AT_NOTE = (
    "pass@k: the chance, in %, that one of k sampled answers is right (Chen et al. 2021); beside it less the base's on "
    "the same rows. Brackets: 95 % intervals (bootstrap over rows)."
)


PASS_AT_COLUMNS = ("model", "k", "pass@k", "less the base's")


def pass_at_rows(report: Report) -> list[list[str]]:
    """Return how likely one of k sampled answers of each model is right; no rows where none were sampled."""
    rows = []
    for model in report.models:
        for k, own in (model.pass_at or {}).items():
            gain = figure_of("pass@k", own.over_base, "+") if own.over_base else ""
            rows.append([model.model, str(k), figure_of("pass@k", own.share), gain])
    return rows


def pass_at_table(report: Report) -> Table:
    """Return how likely one of k sampled answers of each model is right."""
    return filled(titled("Sampled answers", PASS_AT_NOTE), PASS_AT_COLUMNS, pass_at_rows(report))


def filled(table: Table, columns: Sequence[str], rows: Iterable[Sequence[str]] = ()) -> Table:
    """Return a table with columns of names on the left and of figures on the right, which a narrow terminal folds."""
    for column in columns:
        table.add_column(column, justify="left" if column in _NAMES else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def plain(*columns: str, title: str | None = None) -> Table:
    """Return an empty table without lines."""
    folded = (Column(column, overflow="fold") for column in columns)
    return Table(*folded, box=None, pad_edge=False, title=title, title_justify="left")


def titled(title: str, below: str | None = None) -> Table:
    """Return an empty table."""
    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", caption=below, caption_justify="left")


# --- a sweep --------------------------------------------------------------------------------------------------


def sweep_table(report: SweepReport) -> Table:
    """Return the base, the pruned models and the trained ones, those that differ in seeds alone as one line."""
    columns = ["blocks", "rows", "model", "seeds", "mean", "recovery", "over chance", "validation loss", "parameters"]
    kept = sweep_retention(report)
    table = titled(f"{report.sweep}: quality kept, in %", sweep_caption(report))
    filled(table, [*columns, *map(FIGURES.__getitem__, kept)])
    for model in report.models:
        quality = model.quality
        figures = (100 * quality.mean, quality.recovery, quality.recovery_over_chance)
        cells = (*map(number, figures), "", millions(model.cost.parameters))
        own = {name: each.value for name, each in model.retention.figures.items()} if model.retention else {}
        table.add_row(
            str(model.blocks), "", report.name_model(model), "", *cells, *(three(own.get(name)) for name in kept)
        )
    for group in report.groups:
        table.add_row(
            str(group.blocks),
            str(group.rows),
            name_chosen(group.name, group.chosen),
            str(len(group.trials)),
            number(100 * group.mean),
            number(group.recovery) + (f" ±{group.recovery_sd:.1f}" if group.recovery_sd is not None else ""),
            number(group.recovery_over_chance),
            three(group.validation_loss),
            millions(group.parameters),
            *(three(group.retention.get(name)) for name in kept),
        )
    return table


def sweep_retention(report: SweepReport) -> list[str]:
    """Return the names of the figures of retention that the table of a sweep shows."""
    own = report.base.retention
    return [name for name in ("kl_responses", "kl_texts") if own and name in own.figures]


def three(value: float | None) -> str:
    """Return a figure as text."""
    return "-" if value is None else f"{value:.3f}"


def comparison_table(report: SweepReport) -> Table:
    """Return how much better each arm does than the one before it on the same items, with 95 % intervals."""
    pairs = {f"{entry.compared.first} - {entry.compared.second}": None for entry in report.comparisons}
    title = f"{', '.join(pairs)} on the same items, in points, with 95 % intervals (paired bootstrap)"
    table = filled(titled(title), ["blocks", "rows", *report.tasks, "mean"])
    for entry in report.comparisons:
        differences = [*(entry.compared.tasks[task] for task in report.tasks), entry.compared.mean]
        rows = f"{entry.rows} {entry.recipe}" if entry.recipe else str(entry.rows)
        rows += f" {entry.compared.first} - {entry.compared.second}" if len(pairs) > 1 else ""
        table.add_row(str(entry.blocks), rows, *map(interval, differences))
    return table


SWEEP_DRAFT_COLUMNS = (
    *("blocks", "rows", "draft", "text", "a", "c", "drafted"),
    *("measured speed", "expected speed", "pays below c"),
)
DRAFT_NOTE = (
    "a: a drafted token is accepted where all before it were, ± one standard error as if tokens were independent, "
    "counted with the largest number of drafted tokens; c: a draft's time for a token over the base's. Speeds: with "
    "the best measured number of drafted tokens, the base alone is 1."
)


def sweep_draft_table(report: SweepReport) -> Table:
    """Return what each model is worth as a draft of the base, greedy and sampled."""
    table = titled(f"{report.sweep}: as drafts of the base", DRAFT_NOTE)
    return filled(table, SWEEP_DRAFT_COLUMNS, sweep_draft_rows(report))


def sweep_draft_rows(report: SweepReport) -> Iterator[list[str]]:
    """Yield a row under SWEEP_DRAFT_COLUMNS for each draft and kind of text."""
    for draft in report.drafts:
        for text, figures in draft.worth.texts.items():
            yield [
                str(draft.blocks),
                str(draft.rows or ""),
                name_chosen(draft.name, draft.chosen),
                text,
                f"{figures.acceptance:.2f} ±{figures.acceptance_error:.2f}",
                f"{draft.worth.cost:.2f}",
                str(figures.tokens),
                ratio(figures.speedup, figures.speedup_min, figures.speedup_max),
                f"{figures.expected_speedup:.2f}",
                f"{figures.break_even_cost:.2f}",
            ]


def several_table(reports: several.Reports) -> Table:
    """Return the models of several reports."""
    table = titled("Side by side, in %", "\n".join(several.notes(reports)))
    return filled(table, several.columns(reports), several.rows(reports))


# --- single artifacts -----------------------------------------------------------------------------------------


def score_tables(summary: score.Summary) -> list[Table]:
    """Return what the corpora are, and for each metric the span it would remove of every size and how sure that is."""
    corpora = plain("corpus", "positions", "texts", "tokens", "cut to max_tokens")
    for corpus in summary.corpora:
        corpora.add_row(corpus.name, corpus.positions, str(corpus.texts), str(corpus.tokens), str(corpus.shortened))
    spans = (_span_table(metric, choices, summary.corpora) for metric, choices in summary.choices.items())
    return [corpora, *spans]


def _span_table(metric: str, choices: Mapping[int, JointChoice], corpora: Sequence[Corpus]) -> Table:
    """Return, for each number of blocks, the span of least cost, its runner-up, and how sure that is.

    Where there are several corpora: what each would choose alone, and the share of blocks that all of them choose.
    """
    compared = corpora if len(corpora) > 1 else []
    alone = [f"{corpus.name} alone" for corpus in compared]
    table = plain("blocks", metric, "cost", "runner-up", "bootstrap", *alone, *(["in common"] if compared else []))
    for size, choice in choices.items():
        table.add_row(
            str(size),
            name_blocks(choice.blocks),
            f"{choice.value:.4f}",
            name_blocks(choice.runner_up) if choice.runner_up else "-",
            f"{choice.agreement:.0%}",
            *(name_blocks(corpus.choices[metric][size].blocks) for corpus in compared),
            *([f"{choice.shared:.0%}"] if compared else []),
        )
    return table


def loss_table(losses: Losses) -> Table:
    """Return the candidates by loss, each with its rank by distance and by influence."""
    title = f"loss on the loss texts in nats a token; nothing removed: {losses.base_loss:.3f}"
    corpora = several_corpora(losses)
    table = plain("removed", "loss", "rank", "distance rank", "influence rank", *corpora, title=title)
    for rank, candidate in enumerate(losses.candidates, 1):
        table.add_row(
            name_blocks(candidate.blocks),
            f"{candidate.loss:.3f}",
            str(rank),
            str(candidate.distance_rank or "-"),
            str(candidate.influence_rank or "-"),
            *(f"{candidate.losses[corpus]:.3f}" for corpus in corpora),
        )
    return table


STEP_COLUMNS = ("removed", "loss", "next best", "its loss", "bootstrap")


def greedy_table(greedy: Greedy) -> Table:
    """Return the blocks that were removed one after the other, each with the loss that it left."""
    title = f"loss on the loss texts in nats a token; nothing removed: {greedy.base_loss:.3f}"
    table = plain(*STEP_COLUMNS, *several_corpora(greedy), title=title)
    for row in greedy_rows(greedy):
        table.add_row(*row)
    return table


def several_corpora(losses: Losses | Greedy) -> list[str]:
    """Return the names of corpora where there are several."""
    return list(losses.texts) if len(losses.texts) > 1 else []


def greedy_rows(greedy: Greedy) -> Iterator[list[str]]:
    """Yield a row for each step."""
    for step in greedy.steps:
        other = ("-", "-") if step.runner_up is None else (str(step.runner_up), f"{step.runner_up_loss:.3f}")
        each = (f"{step.losses[corpus]:.3f}" for corpus in several_corpora(greedy))
        yield [str(step.block), f"{step.loss:.3f}", *other, f"{step.agreement:.0%}", *each]


DRAFT_COLUMNS = (
    *("text", "drafted", "a", "accepted", "tokens a call"),
    *("expected speed", "measured speed", "pays below c"),
)


def draft_table(draft: Draft) -> Table:
    """Return what each number of drafted tokens brings."""
    table = plain(*DRAFT_COLUMNS)
    for row in draft_rows(draft):
        table.add_row(*row)
    return table


def draft_rows(draft: Draft) -> Iterator[list[str]]:
    """Yield a row under DRAFT_COLUMNS for each number of drafted tokens: measured with it, else counted with more."""
    for text, drafted in (("greedy", draft.greedy), ("sampled", draft.sampled)):
        measured = {one.tokens: one for one in drafted.measured}
        for counted in drafted.counted:
            one = measured.get(counted.tokens, counted)
            yield [
                text,
                str(one.tokens),
                f"{one.acceptance:.2f}",
                f"{one.accepted_share:.0%}",
                f"{one.tokens_per_call:.2f}",
                f"{one.expected_speedup:.2f}",
                ratio(one.speedup, one.speedup_min, one.speedup_max) if isinstance(one, Measured) else "-",
                f"{one.break_even_cost:.2f}",
            ]
