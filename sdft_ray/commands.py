"""The commands of `sdft`: from parsed options to calls of the package and printed results.

Results go to stdout, progress to stderr. Heavy imports stand inside functions: `sdft --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.errors import StageFailed, UserError, problem
from sdft_ray.progress import WIDE, log, open_console

if TYPE_CHECKING:
    from sdft_ray.preflight.disk import Disk
    from sdft_ray.report.entries import Report
    from sdft_ray.report.sweep_entries import SweepReport
    from sdft_ray.spec.compute import Compute
    from sdft_ray.spec.recipe import Recipe
    from sdft_ray.store.storage import Storage
    from sdft_ray.sweep.planning import Plan


def check(options: argparse.Namespace) -> None:
    """Validate a recipe or a sweep, and show the status of its stages."""
    from rich.table import Table
    from rich.text import Text

    from sdft_ray import pipeline
    from sdft_ray.preflight import cuts, disk, precision, teachers
    from sdft_ray.preflight.checks import check
    from sdft_ray.preflight.costs import estimate_stages
    from sdft_ray.spec.loading import is_sweep

    if is_sweep(options.recipe):
        _check_sweep(options)
        return
    recipe, compute, storage = _load(options)
    check(recipe, compute)
    chain = pipeline.chain(recipe)
    lines = pipeline.describe(chain.in_order, storage)
    todo = [stage for stage, line in zip(chain.in_order, lines, strict=True) if line.status != "done"]
    precision.report_slow(todo, compute)
    teachers.require_endpoints(todo)
    costs = estimate_stages(recipe, compute, chain, storage) if options.compute else []
    takes = disk.estimate([(recipe, chain)], compute, storage) if options.compute else None
    if options.json:
        stages: Any = [line._asdict() for line in lines]
        print(json.dumps({"stages": stages, **_plain(costs, takes)} if options.compute else stages, indent=1))
        return
    print(*cuts.describe([recipe]), sep="\n")
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "status", "directory"):
        table.add_column(column, overflow="fold")
    for stage, status, directory in lines:
        colour = {"done": "green", "partial": "yellow", "missing": ""}[status]
        table.add_row(stage, Text(status, colour), directory)
    open_console(WIDE).print(table)
    if costs:
        _show_costs(costs, takes)


def _plain(costs: Sequence[Any], takes: Disk | None) -> dict[str, Any]:
    return {
        "estimates": [dataclasses.asdict(cost) for cost in costs],
        "disk": takes and dataclasses.asdict(takes),
    }


def _show_costs(costs: Sequence[Any], takes: Disk | None, title: str = "Estimate") -> None:
    from rich.table import Table
    from rich.text import Text

    from sdft_ray.preflight import hours

    table = Table(
        box=None, pad_edge=False, title=f"{title}: hours, and memory at the peak of each process", title_justify="left"
    )
    for column in ("stage", "work", "processes", "hours", "GB each", "fits", "of which, in GB"):
        table.add_column(column, overflow="fold")
    for cost in costs:
        fits = {None: Text("-"), True: Text("yes"), False: Text("no", "red")}[cost.fits]
        gb, long = ("-" if number is None else f"{number:.2f}" for number in (cost.gb, cost.hours))
        table.add_row(cost.stage, cost.work, str(cost.processes), long, gb, fits, cost.parts)
    console = open_console(WIDE)
    console.print(table)
    console.print(hours.describe({cost.stage: cost.rate for cost in costs}))
    if takes:
        console.print(takes.describe())


def run(options: argparse.Namespace) -> None:
    """Build the missing artifacts of a recipe, then report."""
    from sdft_ray import pipeline
    from sdft_ray.engine import start_engine
    from sdft_ray.report import track

    recipe, compute, storage = _load(options)
    reports = options.until in (None, "evaluate")
    pipeline.require_stage(options.until)
    for name in ("html", "json"):
        if getattr(options, name) and not reports:
            what = f"shows what --until {options.until} leaves out"
            raise UserError(problem(f"--{name}", what, f"Remove --{name}"))
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints notices of dead workers to stdout, which is for results
        built = pipeline.run(recipe, compute, storage, options.until, options.engine or start_engine)
    if not built.new:
        log(f"Nothing to do: all {len(built.reused)} artifacts are there already under {storage.uri}.")
    if reports:
        report = _show_report(options, recipe, storage)
        with contextlib.redirect_stdout(sys.stderr):
            track.log_results(report, pipeline.chain(recipe), compute, storage)


def report(options: argparse.Namespace) -> None:
    """Show the results of a recipe or a sweep, or of several side by side."""
    from sdft_ray.spec.loading import is_sweep

    files, options.recipe = options.recipe, options.recipe[0]
    if len(files) > 1:
        _show_several(options, files)
        return
    if is_sweep(options.recipe):
        plan, _, storage = _load_sweep(options)
        _show_sweep(options, plan, storage)
        return
    if options.csv:
        raise UserError(problem("--csv", f"{options.recipe} is a recipe, not a sweep", "Use --json"))
    recipe, _, storage = _load(options)
    _show_report(options, recipe, storage)


def sweep(options: argparse.Namespace) -> None:
    """Build the missing artifacts of a sweep, then report."""
    from sdft_ray.engine import start_engine
    from sdft_ray.report import track
    from sdft_ray.sweep import goal, planning

    plan, compute, storage = _load_sweep(options)
    failed = None
    with contextlib.redirect_stdout(sys.stderr):
        try:
            built = goal.run(plan, compute, storage, options.engine or start_engine)
        except StageFailed as error:
            if not any(planning.is_done(trial, storage) for trial in plan.trials):
                raise
            failed = error
    if not failed and not built.new:
        log(f"Nothing to do: all {len(built.reused)} artifacts are there already under {storage.uri}.")
    try:
        report = _show_sweep(options, plan, storage)
    except UserError:
        if failed:  # before what finished trials are compared with was there
            raise failed from None
        raise
    with contextlib.redirect_stdout(sys.stderr):
        track.log_sweep(report, plan, compute, storage)
    if failed:
        raise failed


def submit(options: argparse.Namespace) -> int:
    """Run a recipe or a sweep as a Ray job."""
    import tempfile

    from sdft_ray import pipeline
    from sdft_ray.submit import job, kuberay, slurm

    pipeline.require_stage(options.until)
    if options.print_manifest:
        print(kuberay.render(options.recipe, options.compute, options.root, options.until, options.image), end="")
        return 0
    if options.print_slurm:
        print(slurm.render(options.recipe, options.compute, options.root, options.until), end="")
        return 0
    if not options.address:
        do = "Give the cluster's dashboard, for example http://127.0.0.1:8265"
        raise UserError(problem("--address", "is missing", do))
    with tempfile.TemporaryDirectory(prefix="sdft-submit-") as folder:
        archive = Path(folder) / "job.zip"
        command = job.pack(options.recipe, options.compute, options.root, options.until, archive)
        client, number = job.submit(options.address, archive, command, options.recipe.name)
    log(f"Submitted as {number}: {command}")
    if options.no_wait:
        print(number)
        return 0
    return job.follow(client, number, options.address)


def _show_report(options: argparse.Namespace, recipe: Recipe, storage: Storage) -> Report:
    from sdft_ray.report import collect, page, terminal

    report = collect.collect(recipe, str(options.recipe), storage)
    _print_report(options, report, terminal.show)
    if options.html:
        _write("Report", options.html, page.render(report))
    return report


def _print_report(options: argparse.Namespace, report: Any, show: Callable[[Any, Any], None]) -> None:
    if options.json:
        print(json.dumps(report.plain(), indent=1))
    else:
        show(report, open_console(160))


def _write(kind: str, file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    log(f"{kind}: {file}")


def _check_sweep(options: argparse.Namespace) -> None:
    from sdft_ray import pipeline
    from sdft_ray.preflight import cuts, disk, precision, savings, teachers
    from sdft_ray.preflight.costs import estimate_sweep
    from sdft_ray.sweep import goal, planning

    plan, compute, storage = _load_sweep(options)
    planning.check(plan, compute)
    todo, _ = pipeline.survey(planning.stages_of(plan), storage)
    precision.report_slow(todo, compute)
    teachers.require_endpoints(todo)
    saved = savings.measure(plan, storage)
    costs, takes = [], None
    if options.compute:
        costs = estimate_sweep(plan, compute, storage)
        takes = disk.estimate(((cell.recipe, pipeline.chain(cell.recipe)) for cell in plan.cells), compute, storage)
    if options.json:
        print(json.dumps({**saved.plain(), **_plain(costs, takes)}, indent=1))
        return
    print(*cuts.describe(cell.recipe for cell in plan.cells), sep="\n")
    if plan.goal:
        print(goal.describe_search(plan))
    savings.show(saved, open_console(WIDE))
    if costs:
        _show_costs(costs, takes, "Estimate, the most of any recipe")


def _show_sweep(options: argparse.Namespace, plan: Plan, storage: Storage) -> SweepReport:
    from sdft_ray.report import frame, page, sweep, terminal

    report = sweep.collect(plan, str(options.recipe), storage)
    _print_report(options, report, terminal.show_sweep)
    if options.csv:
        _write("Table", options.csv, frame.as_csv(frame.lines(report)))
    if options.html:
        _write("Report", options.html, page.render_sweep(report, options.html.parent))
    return report


def _show_several(options: argparse.Namespace, files: Sequence[Path]) -> None:
    from sdft_ray.report import collect, frame, page, table, terminal
    from sdft_ray.report import sweep as of_sweep
    from sdft_ray.spec.loading import is_sweep
    from sdft_ray.store.identity import distinct

    if options.set:
        raise UserError(problem("--set", "is for one recipe", "Copy the recipe and change the copy"))
    reports: dict[str, Report | SweepReport] = {}
    for name, file in zip(distinct([file.stem for file in files]), files, strict=True):
        options.recipe = file
        if is_sweep(file):
            plan, _, storage = _load_sweep(options)
            reports[name] = of_sweep.collect(plan, str(file), storage)
        else:
            recipe, _, storage = _load(options)
            reports[name] = collect.collect(recipe, str(file), storage)
    if options.json:
        print(json.dumps({name: each.plain() for name, each in reports.items()}, indent=1))
    else:
        terminal.print_table(table.several_table(reports), open_console(160))
    if options.csv:
        _write("Table", options.csv, frame.as_csv(frame.of_several(reports)))
    if options.html:
        _write("Report", options.html, page.render_several(reports))


def _load_sweep(options: argparse.Namespace) -> tuple[Plan, Compute, Storage]:
    from sdft_ray.spec.compute import load_compute
    from sdft_ray.spec.loading import kind_of, read_yaml
    from sdft_ray.store.storage import Storage
    from sdft_ray.sweep.planning import load_sweep

    if kind_of(read_yaml(options.recipe)) not in ("sweep", "compute file"):  # the latter is refused as it is loaded
        do = f"Do: sdft run {options.recipe}"
        raise UserError(problem(str(options.recipe), "is a recipe, not a sweep", do))
    if getattr(options, "set", None):
        raise UserError(problem("--set", "is for recipes", f"Change {options.recipe}"))
    _require_places(options)
    return load_sweep(options.recipe), load_compute(options.compute), Storage(options.root)


def _require_places(options: argparse.Namespace) -> None:
    """Raise UserError for a page or a table that could not be written when all else is done."""
    from sdft_ray.spec.loading import is_yaml

    for name in ("html", "csv"):
        file: Path | None = getattr(options, name, None)
        if file and file.is_dir():
            raise UserError(problem(f"--{name}", f"{file} is a directory", "Give the name of a file"))
        if file and is_yaml(file):
            raise UserError(problem(f"--{name}", f"{file} is named as a recipe is", f"Give a name in .{name}"))
        if file and not file.absolute().parent.is_dir() and file.parent != Path(options.root):
            raise UserError(problem(f"--{name}", f"{file.parent} is no directory", f"Make {file.parent}"))


def _load(options: argparse.Namespace) -> tuple[Recipe, Compute, Storage]:
    from sdft_ray.spec.compute import load_compute
    from sdft_ray.spec.loading import is_sweep, load_recipe
    from sdft_ray.store.storage import Storage

    if is_sweep(options.recipe):
        do = f"Do: sdft sweep {options.recipe}"
        raise UserError(problem(str(options.recipe), "is a sweep, not a recipe", do))
    _require_places(options)
    return load_recipe(options.recipe, options.set), load_compute(options.compute), Storage(options.root)


def schema(options: argparse.Namespace) -> None:
    """Print a JSON Schema."""
    from sdft_ray.spec import schema

    print(schema.render(options.kind), end="")


def explain(options: argparse.Namespace) -> None:
    """Explain a key."""
    from sdft_ray.spec import help

    entries = help.explain(options.key)
    print(json.dumps(help.as_data(entries), indent=1) if options.json else help.show(entries))


def completion(options: argparse.Namespace) -> None:
    """Print a script for a shell."""
    from sdft_ray import completion

    print(completion.render(options.shell, options.parsers), end="")


def init(options: argparse.Namespace) -> None:
    """Write a starter recipe."""
    from sdft_ray.preflight import starter

    columns = starter.Columns(options.prompt, options.response, options.context, options.answer)
    log(starter.write(options.model, options.rows, options.out, columns))
