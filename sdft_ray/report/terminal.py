"""What commands print of reports and artifacts: tables, and the sentences below them.

In: a report, or an artifact's directory and manifest. Out: lines on a console.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from sdft_ray.progress import open_console
from sdft_ray.report import lines, sources, table
from sdft_ray.report.entries import Draft, Greedy, Losses, Report
from sdft_ray.report.sweep_entries import SweepReport
from sdft_ray.spec.loading import leaves
from sdft_ray.stages import score
from sdft_ray.store.manifest import Manifest

_NAME, _BETWEEN = 10, 3
"""Characters of a name, such as that of an arm, that stay together, and characters from one column to the next."""


def show(report: Report, console: Console) -> None:
    """Print the table of a recipe and the sentences that explain it."""
    details = report.details
    print_table(table.recovery_table(report), console)
    if report.base.retention:
        print_table(table.retention_table(report), console)
    if report.base.generated:
        print_table(table.generated_table(report), console)
    if report.base.pass_at:
        print_table(table.pass_at_table(report), console)
    console.print(lines.cut_line(details.cut, details.losses or details.greedy))
    if details.greedy:
        console.print(lines.greedy_line(details.greedy))
    if line := lines.finals_line(details):
        console.print(line)
    for compared in report.compared:
        console.print(lines.difference_line(compared))
    for kept in report.retention:
        console.print(lines.retention_line(kept))
    for name, merged in report.merges.items():
        console.print(lines.merge_line(name, merged))
    for name, export in report.exports.items():
        console.print(lines.export_line(name, export))
    for name, draft in report.drafts.items():
        console.print(lines.draft_line(name, draft))
    if report.speed:
        console.print(lines.speed_line(report.speed))
    if report.sources:
        print_table(sources.table(report), console)
    if details.selection:
        console.print(lines.selection_line(details.selection))
    if details.nll and (line := lines.nll_line(details.nll)):
        console.print(line)


def print_table(figures: Table, console: Console) -> None:
    """Print a table of figures, whose cells a narrow terminal folds. Where they would not fit even so, its lines go on
    in the terminal's next one: rich would leave out whole columns."""
    least = []
    for column in figures.columns:
        longest = max((len(word) for cell in column.cells for word in str(cell).split()), default=0)
        least.append(longest if column.justify == "right" else min(longest, _NAME))
    if (whole := sum(width + _BETWEEN for width in least)) > console.width:
        figures.width = whole
        for column, width in zip(figures.columns, least, strict=True):
            column.min_width = width
    console.print(figures, crop=False)


def show_sweep(report: SweepReport, console: Console) -> None:
    """Print the tables of a sweep, and what did not end."""
    print_table(table.sweep_table(report), console)
    if report.goal:
        console.print(lines.goal_line(report.goal))
    if report.comparisons:
        print_table(table.comparison_table(report), console)
    if any(group.sources for group in report.groups):
        print_table(sources.sweep_table(report), console)
    if report.drafts:
        print_table(table.sweep_draft_table(report), console)
    for model in report.pruned:
        assert model.cut, "a pruned model was cut"
        console.print(lines.cut_line(model.cut) + (f" {lines.speed_line(model.speed)}" if model.speed else ""))
    for trial in report.trials:
        if trial.status != "done":
            _print_open(console, trial.status, lines.name_trial(trial), trial.reason)
    for draft in report.untried:
        _print_open(console, draft.status, draft.draft, draft.reason)


def _print_open(console: Console, status: str, name: str, reason: str | None) -> None:
    console.print(f"{status}: {name}{f': {reason}' if reason else ''}")


# --- an artifact ----------------------------------------------------------------------------------------------

# What tables show of a summary, or what is too long to be shown.
_NOT_AS_LINES = {
    "score": ("choices", "corpora"),
    "loss": ("candidates", "steps"),
    "draft": ("greedy", "sampled"),
    "merge": ("cosines",),
}


def show_artifact(directory: Path, manifest: Manifest) -> None:
    """Print an artifact: what it is, what came of it, what it was made from, and its files."""
    console = open_console(160)
    provenance, identity = manifest.provenance, manifest.identity
    hidden = _NOT_AS_LINES.get(manifest.stage, ())
    facts = table.plain("", "")
    facts.show_header = False
    facts.add_row("artifact", f"{manifest.stage} {manifest.id}")
    facts.add_row("directory", str(directory))
    facts.add_row("made", f"{provenance.created} in {provenance.wall_seconds:.1f} s on {provenance.machine}")
    for key, value in leaves({name: value for name, value in manifest.summary.items() if name not in hidden}):
        facts.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    for key, value in leaves(identity.settings):
        facts.add_row(f"recipe: {key}", str(value))
    for name, inner in identity.inputs.items():
        facts.add_row(f"input: {name}", inner)
    facts.add_row("files", f"{len(manifest.files)}, {manifest.bytes / 1e6:.1f} MB")
    console.print(facts)
    with contextlib.suppress(ValidationError):  # of another version, whose summary holds something else
        for more in _tables(manifest):
            console.print()
            console.print(more)


def _tables(manifest: Manifest) -> list[Table]:
    """Return the tables of what a stage measured."""
    match manifest.stage:
        case "score":
            return table.score_tables(score.Summary.model_validate(manifest.summary))
        case "loss" if "steps" in manifest.summary:
            return [table.greedy_table(Greedy.model_validate(manifest.summary))]
        case "loss":
            return [table.loss_table(Losses.model_validate(manifest.summary))]
        case "draft":
            return [table.draft_table(Draft.model_validate(manifest.summary))]
        case _:
            return []
