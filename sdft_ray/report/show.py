"""What `sdft show` prints of one artifact: its summary, and of scores and losses the spans and how sure they are.

In: an artifact's directory and manifest. Out: tables on the terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdft_ray.core.surgery import name_blocks
from sdft_ray.report.table import DRAFT_COLUMNS, draft_rows
from sdft_ray.spec.loading import leaves


def show(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Print an artifact: what it is, what came of it, what it was made from, and its files."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    summary = dict(manifest["summary"])
    tables = {
        "score": score_tables,
        "loss": lambda found: [loss_table(found)],
        "draft": lambda found: [draft_table(found)],
    }
    more = tables[manifest["stage"]](summary) if manifest["stage"] in tables else []
    for shown in ("choices", "corpora", "candidates", "greedy", "sampled"):
        if more:
            summary.pop(shown, None)
    summary.pop("cosines", None)  # of a merge, one for each tensor
    provenance = manifest["provenance"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("artifact", f"{manifest['stage']} {manifest['id']}")
    table.add_row("directory", str(directory))
    table.add_row("made", f"{provenance['created']} in {provenance['wall_seconds']:.1f} s on {provenance['machine']}")
    for key, value in leaves(summary):
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    for key, value in leaves(manifest["identity"]["settings"]):
        table.add_row(f"recipe: {key}", str(value))
    for name, inner in manifest["identity"]["inputs"].items():
        table.add_row(f"input: {name}", inner)
    size = sum(entry["bytes"] for entry in manifest["files"])
    table.add_row("files", f"{len(manifest['files'])}, {size / 1e6:.1f} MB")
    console.print(table)
    for each in more:
        console.print()
        console.print(each)


def score_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return what the corpora are, and for each metric the span it would remove of every size and how sure that is."""
    corpora = summary["corpora"]
    found = Table("corpus", "positions", "texts", "tokens", "cut to max_tokens", box=None, pad_edge=False)
    for corpus in corpora:
        counts = (corpus["texts"], corpus["tokens"], corpus["shortened"])
        found.add_row(corpus["name"], corpus["positions"], *map(str, counts))
    return [found, *(span_table(metric, choices, corpora) for metric, choices in summary["choices"].items())]


def span_table(metric: str, choices: Mapping[str, Any], corpora: Sequence[Mapping[str, Any]]) -> Table:
    """Return, for each number of blocks, the span of least cost, its runner-up, and how sure that is.

    Where there are several corpora: what each would choose alone, and the share of blocks that all of them choose.
    """
    table = Table("blocks", metric, "cost", "runner-up", "bootstrap", box=None, pad_edge=False)
    several = corpora if len(corpora) > 1 else []
    for corpus in several:
        table.add_column(f"{corpus['name']} alone")
    if several:
        table.add_column("in common")
    for size, choice in choices.items():
        runner_up = choice["runner_up"]
        alone = [name_blocks(corpus["choices"][metric][size]["blocks"]) for corpus in several]
        table.add_row(
            size,
            name_blocks(choice["blocks"]),
            f"{choice['value']:.4f}",
            name_blocks(runner_up) if runner_up else "-",
            f"{choice['agreement']:.0%}",
            *alone,
            *([f"{choice['shared']:.0%}"] if several else []),
        )
    return table


def loss_table(losses: Mapping[str, Any]) -> Table:
    """Return the candidates by loss, each with its rank by distance and by influence."""
    title = f"held-back loss in nats a token; nothing removed: {losses['base_loss']:.3f}"
    table = Table("removed", "loss", "rank", "distance rank", "influence rank", box=None, pad_edge=False, title=title)
    table.title_justify = "left"
    several = losses["texts"] if len(losses["texts"]) > 1 else []
    for corpus in several:
        table.add_column(corpus)
    for rank, candidate in enumerate(losses["candidates"], 1):
        table.add_row(
            name_blocks(candidate["blocks"]),
            f"{candidate['loss']:.3f}",
            str(rank),
            str(candidate.get("distance_rank", "-")),
            str(candidate.get("influence_rank", "-")),
            *(f"{candidate['losses'][corpus]:.3f}" for corpus in several),
        )
    return table


def draft_table(found: Mapping[str, Any]) -> Table:
    """Return what each number of drafted tokens brings."""
    table = Table(*DRAFT_COLUMNS, box=None, pad_edge=False)
    for row in draft_rows(found):
        table.add_row(*row)
    return table
