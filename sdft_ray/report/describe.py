"""What `sdft show` prints of one artifact: its summary, and for distances the chosen span of every size.

In: an artifact's directory and manifest. Out: tables on the terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdft_ray.recipe import leaves


def show(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Print an artifact: what it is, what came of it, what it was made from, and its files."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    summary = dict(manifest["summary"])
    choices = summary.pop("choices", None)
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
    if choices:
        console.print(span_table(choices))


def span_table(choices: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return, for each number of blocks, the span chosen, its distance, the runner-up, and how sure that is."""
    table = Table("blocks", "span", "distance", "runner-up", "bootstrap agrees", box=None, pad_edge=False)
    for size, choice in choices.items():
        table.add_row(
            size,
            f"[{choice['start']}, {choice['stop']})",
            f"{choice['distance']:.4f}",
            f"from {choice['runner_up']}",
            f"{choice['agreement']:.0%}",
        )
    return table
