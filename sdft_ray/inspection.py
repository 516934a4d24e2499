"""The commands that look at what there is: `sdft verify`, `doctor`, `show` and `diff`.

In: parsed options. Out: printed results. Heavy imports stand inside functions, as in the other commands.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from sdft_ray.errors import StageFailed, UserError, problem
from sdft_ray.progress import Progress, open_console


def verify(options: argparse.Namespace) -> None:
    """Verify models."""
    from sdft_ray.store.storage import Storage
    from sdft_ray.verify import checks, models

    results, failed = [], []
    for model in models.find_models(options.target, options.against, Storage(options.root)):
        done = []
        with Progress(f"verify {model.name}") as progress:
            for check in checks.verify(model, options.vllm):
                done.append(check)
                progress.enter(f"{check.check} {check.status}")
        if not options.json:
            checks.show(model, done)
        results.append(checks.describe(model, done))
        if wrong := ", ".join(check.check for check in done if check.status == "FAILED"):
            failed.append(f"{model.name} ({wrong})")
    if options.json:
        print(json.dumps(results, indent=1))
    if failed:
        raise StageFailed(f"verify: failed: {'; '.join(failed)}")


def doctor(options: argparse.Namespace) -> int:
    """Look for obstacles to running a recipe."""
    from rich.table import Table
    from rich.text import Text

    from sdft_ray.preflight import doctor
    from sdft_ray.spec.compute import load_compute
    from sdft_ray.spec.loading import load_recipe

    recipe = load_recipe(options.recipe) if options.recipe else None
    with contextlib.redirect_stdout(sys.stderr), Progress("doctor"):
        findings = list(doctor.examine(recipe, load_compute(options.compute), options.root))
    failed = any(finding.status == "fail" for finding in findings)
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
        return int(failed)
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("where", overflow="fold")
    table.add_column("found", overflow="fold", ratio=1)
    for finding in findings:
        colour = {"ok": "green", "warn": "yellow", "fail": "red"}[finding.status]
        text = Text(finding.what)
        if finding.do:
            text.append(". ").append(finding.do, "bold")
        table.add_row(Text(finding.status, colour), finding.check, finding.where, text)
    open_console(160).print(table)
    return int(failed)


def show(options: argparse.Namespace) -> None:
    """Show one artifact."""
    from sdft_ray.report import terminal
    from sdft_ray.store.manifest import read_manifest
    from sdft_ray.store.storage import Storage

    directory = Storage(options.root).find(options.artifact, "*.json")
    manifest = read_manifest(directory)
    assert manifest, "an artifact is found by its manifest"
    if options.plot and (manifest.stage != "score" or options.plot.suffix not in (".svg", ".png")):
        what = f"cannot draw {manifest.stage} as {options.plot.suffix or 'a file without suffix'}"
        raise UserError(problem("--plot", what, "Give a score artifact and a name in .svg or .png"))
    if options.json:
        print(json.dumps(manifest.plain(), indent=1))
    else:
        terminal.show_artifact(directory, manifest)
    if options.plot:
        from sdft_ray.report import plots
        from sdft_ray.results import DISTANCES, Distances

        plots.save(plots.distance_maps(Distances.from_file(directory / DISTANCES)), options.plot)


def diff(options: argparse.Namespace) -> None:
    """Show which values differ."""
    from sdft_ray.report.table import plain
    from sdft_ray.spec.loading import leaves, names_recipe

    recipes = [name for name in (options.a, options.b) if names_recipe(name)]
    if len(recipes) == 1:
        other = options.b if recipes == [options.a] else options.a
        what = f"is a recipe, and {other or 'an empty name'} is none"
        raise UserError(problem(recipes[0], what, "Give two recipes or two artifacts"))
    first, second = (dict(leaves(_values(name, options.root))) for name in (options.a, options.b))
    differing = [key for key in {**first, **second} if first.get(key, _ABSENT) != second.get(key, _ABSENT)]
    if options.json:
        print(json.dumps({key: [first.get(key), second.get(key)] for key in differing}, indent=1))
        return
    if not differing:
        print("No value differs.")
        return
    table = plain("value", options.a, options.b)
    for key in differing:
        table.add_row(key, str(first.get(key, "-")), str(second.get(key, "-")))
    open_console(160).print(table)


_ABSENT = object()


def _values(name: str, root: str) -> Any:
    """Return the values that identify a recipe file or an artifact."""
    from sdft_ray.spec.loading import load_recipe, names_recipe
    from sdft_ray.store.manifest import MANIFEST, read_manifest
    from sdft_ray.store.storage import Storage

    if names_recipe(name):
        return load_recipe(Path(name))
    manifest = read_manifest(Storage(root).find(name, MANIFEST))
    return manifest and manifest.lineage.plain()
