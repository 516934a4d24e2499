"""A sweep: many recipes that differ in named fields, and what they share built once.

In: a sweep file (a recipe, and axes of values for some of its fields). Out: its plan, stages that several trials need
and then the trials, and after `run` an artifact for each. A trial trains one model and takes it through its exams;
trials are side by side under Ray Tune where the cluster holds more than one. Resuming is by artifacts: what is finished
is not even submitted, so Tune's own state is thrown away.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from sdft_ray import pipeline
from sdft_ray.artifacts import Stage, short_id
from sdft_ray.cluster import ray_cluster, require_room
from sdft_ray.compute import Compute
from sdft_ray.errors import StageFailed, UserError, problem
from sdft_ray.progress import Progress, duration, say
from sdft_ray.recipe import Recipe, Section, load_recipe, load_section, read_yaml
from sdft_ray.storage import Storage

DEPTH, SIZE, RECIPE = "prune.blocks", "train.rows", "recipe"
_FOR_EVER = 10**7  # seconds: a trial's room is there by construction, only other trials' exams are in it for a while


class Axis(Section):
    """The values that one recipe field takes: a list, or a range that values are drawn from."""

    values: tuple[JsonValue, ...] | None = None
    from_: int | float | None = Field(None, alias="from")
    """Lower end of a range; with two whole numbers whole numbers are drawn."""
    to: int | float | None = None
    """Upper end of a range."""
    scale: Literal["log", "linear"] = "linear"

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        if self.values is None:
            if self.from_ is None or self.to is None:
                raise ValueError("gives no values. List them, or give from and to")
            if self.from_ >= self.to:
                raise ValueError(f"from {self.from_} is not below to {self.to}. Change either")
            if self.scale == "log" and self.from_ <= 0:
                raise ValueError(f"from {self.from_} has no logarithm. Raise it, or use scale: linear")
        elif not self.values:
            raise ValueError("has no values. Give at least one")
        elif len({json.dumps(value) for value in self.values}) < len(self.values):
            raise ValueError("names a value twice. Remove one")
        return self

    def draw(self, count: int, seed: str) -> tuple[int | float, ...]:
        """Return `count` values of the range, to three digits: short enough to be typed into a recipe."""
        assert self.from_ is not None and self.to is not None
        low, high = (math.log(end) if self.scale == "log" else end for end in (self.from_, self.to))
        places = random.Random(seed)
        drawn = [low + (high - low) * places.random() for _ in range(count)]
        numbers = [float(f"{math.exp(value) if self.scale == 'log' else value:.3g}") for value in drawn]
        whole = isinstance(self.from_, int) and isinstance(self.to, int)
        return tuple(round(number) for number in numbers) if whole else tuple(numbers)


OneAxis = Annotated[Axis, BeforeValidator(lambda given: {"values": tuple(given)} if isinstance(given, list) else given)]
Axes = dict[str, OneAxis]


def _several(given: Any) -> Any:
    """Return one thing as a tuple of one."""
    return tuple(given) if isinstance(given, list) else (given,)


class Sweep(Section):
    """One complete sweep file."""

    recipe: Annotated[tuple[str, ...], BeforeValidator(_several)]
    """A recipe file, relative to this one; or several, whose results stand side by side."""
    axes: Annotated[tuple[Axes, ...], BeforeValidator(_several)]
    """Recipe fields by their dotted paths, each with its values; lists are crossed. Several such mappings: all that any
    of them makes."""
    samples: int | None = Field(None, gt=0)
    """Values drawn of the ranges, the same for every combination of listed values."""
    seed: int = 0
    """Moves what is drawn."""

    @model_validator(mode="after")
    def _draws_where_there_is_a_range(self) -> Self:
        if not all(self.axes):
            raise ValueError("axes: names no field. Give at least one")
        ranges = [path for axes in self.axes for path, axis in axes.items() if axis.values is None]
        if ranges and self.samples is None:
            raise ValueError(f"samples: is missing. Say how many values of {ranges[0]} to draw")
        if self.samples is not None and not ranges:
            raise ValueError("samples: has no range to draw from. Remove it, or give an axis from and to")
        return self


@dataclasses.dataclass(frozen=True)
class Cell:
    """One recipe of a sweep, and the values that make it."""

    values: Mapping[str, Any]
    recipe: Recipe


@dataclasses.dataclass(frozen=True)
class Trial:
    """The training of one model, and its exams."""

    train: Stage
    exams: tuple[Stage, ...]
    cell: Cell
    """The first cell that needs it; where it lies in the sweep."""
    values: Mapping[str, Any]
    """What of the cell's values bears on it."""

    @property
    def arm(self) -> str:
        return str(self.train.settings["arm"])

    @property
    def name(self) -> str:
        """The arm and the values, as a line of progress has them."""
        return ", ".join([self.arm, *(f"{path.rpartition('.')[2]} {value}" for path, value in self.values.items())])


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep builds: first what is shared, in this order, then the trials in any."""

    cells: tuple[Cell, ...]
    shared: tuple[Stage, ...]
    trials: tuple[Trial, ...]


# --- from file to plan ----------------------------------------------------------------------------------------


def is_sweep(path: Path) -> bool:
    """Return whether a file is a sweep and not a recipe: it has axes."""
    return "axes" in read_yaml(path)


def load_sweep(path: Path) -> Plan:
    """Return the plan of the sweep in `path`; raises UserError with every problem of the file at once."""
    sweep = load_section(Sweep, path)
    return make_plan(expand(sweep, path.parent))


def expand(sweep: Sweep, folder: Path) -> tuple[Cell, ...]:
    """Return one cell for each recipe and combination of values, in the order of the file."""
    cells: list[Cell] = []
    problems: dict[str, None] = {}
    for file in sweep.recipe:
        exams = load_recipe(folder / file).evaluate  # its own mistakes are its own
        if exams != load_recipe(folder / sweep.recipe[0]).evaluate:
            what = f"{file} has other exams than {sweep.recipe[0]}, so their means do not compare"
            raise UserError(problem("recipe", what, "Give both the same evaluate"))
        which = {RECIPE: Path(file).stem} if len(sweep.recipe) > 1 else {}
        for values in _combinations(sweep):
            overrides = [f"{path}={json.dumps(value)}" for path, value in values.items()]
            try:
                cell = Cell({**which, **values}, load_recipe(folder / file, overrides))
            except UserError as error:
                problems |= dict.fromkeys(_of_axis(line.removeprefix("--set "), values) for line in error.problems)
                continue
            problems |= dict.fromkeys(_mistakes(cell))
            cells.append(cell)
    if problems:
        raise UserError(*problems)
    return tuple(cells)


def _combinations(sweep: Sweep) -> Iterator[dict[str, Any]]:
    for axes in sweep.axes:
        listed = {path: axis.values for path, axis in axes.items() if axis.values is not None}
        # A seed for each axis: one more of them moves no other's values.
        drawn = {
            path: axis.draw(sweep.samples or 0, f"{sweep.seed}:{path}")
            for path, axis in axes.items()
            if axis.values is None
        }
        draws = [dict(zip(drawn, values, strict=True)) for values in zip(*drawn.values(), strict=True)] or [{}]
        for values in itertools.product(*listed.values()):
            for draw in draws:
                yield {**dict(zip(listed, values, strict=True)), **draw}


def _of_axis(line: str, values: Mapping[str, Any]) -> str:
    """Return a problem of a recipe as one of the axis that made it."""
    return f"axes.{line}" if any(line.startswith(path) for path in values) else line


def _mistakes(cell: Cell) -> Iterator[str]:
    """Yield a problem for each axis that cannot show what it is there for."""
    for path in cell.values:
        section, _, field = path.partition(".")
        if section == "evaluate":
            yield problem(f"axes.{path}", "every trial takes the same exams", "Set it in the recipe")
        if not (path in (DEPTH, SIZE, RECIPE) or is_seed(path)) and cell.recipe.rows.validation == 0:
            what = f"without validation rows nothing says which {path} is best"
            yield problem(f"axes.{path}", what, "Give rows.validation in the recipe, for example 16")
        for arm in cell.recipe.arms.names if section == "train" else ():
            own = getattr(cell.recipe.arms, arm).model_dump(exclude_none=True)
            if (name := field.partition(".")[0]) in own:
                do = f"Sweep arms.{arm}.{field} instead, or take {name} off the arm"
                yield problem(f"axes.{path}", f"the arm {arm} has its own {name}", do)


def is_seed(path: str) -> bool:
    """Return whether an axis repeats a trial instead of changing what it is."""
    return path.endswith(".seed")


def make_plan(cells: Sequence[Cell]) -> Plan:
    """Return everything that the cells need, each stage once."""
    shared: dict[str, Stage] = {}
    trained: dict[str, Stage] = {}
    exams: dict[str, dict[str, Stage]] = {}
    needed_by: dict[str, list[Cell]] = {}
    for cell in cells:
        for stage in pipeline.stages(cell.recipe):
            model = stage.inputs.get("model")
            if stage.name == "train":
                trained.setdefault(stage.id, stage)
                needed_by.setdefault(stage.id, []).append(cell)
            elif stage.name == "evaluate" and model is not None and model.name == "train":
                exams.setdefault(model.id, {}).setdefault(stage.id, stage)
            else:
                shared.setdefault(stage.id, stage)
    trials = [
        Trial(stage, tuple(exams[key].values()), needed_by[key][0], _common_values(needed_by[key]))
        for key, stage in trained.items()
    ]
    return Plan(tuple(cells), tuple(sorted(shared.values(), key=_in_order)), tuple(trials))


def _in_order(stage: Stage) -> tuple[int, float]:
    """Return a stage's place: as in one chain, and generation first at the largest size, which smaller ones share."""
    rows = stage.settings["rows"] if stage.name == "distill" else 0
    return pipeline.STAGE_NAMES.index(stage.name), -math.inf if rows is None else -rows


def _common_values(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the values that all cells of a trial have: another one's value does not bear on it."""
    return {
        path: value
        for path, value in cells[0].values.items()
        if all(path in cell.values and cell.values[path] == value for cell in cells)
    }


def check(plan: Plan, compute: Compute) -> None:
    """Raise UserError for what can be known to be wrong with any cell before anything is built."""
    problems: dict[str, None] = {}
    for cell in plan.cells:
        try:
            pipeline.check(cell.recipe, compute)
        except UserError as error:
            problems |= dict.fromkeys(_of_axis(line, cell.values) for line in error.problems)
    if problems:
        raise UserError(*problems)


# --- building -------------------------------------------------------------------------------------------------


def stages_of(plan: Plan) -> tuple[Stage, ...]:
    """Return every stage of a sweep in an order in which they can be built."""
    return (*plan.shared, *(stage for trial in plan.trials for stage in (trial.train, *trial.exams)))


def is_done(trial: Trial, storage: Storage) -> bool:
    """Return whether a trial's model and all of its exams are there."""
    return all(storage.status(stage) == "done" for stage in (trial.train, *trial.exams))


def run(plan: Plan, compute: Compute, storage: Storage) -> pipeline.Built:
    """Build everything that a sweep lacks; what is shared first, for no trial waits for another.

    A trial that fails does not hold up the others: StageFailed at the end names each with its reason.
    """
    check(plan, compute)
    everything = stages_of(plan)
    name = f"sweep-{short_id([trial.train.id for trial in plan.trials])}"
    with storage.lock(name):
        todo = [stage for stage in everything if storage.status(stage) != "done"]
        if todo:
            with ray_cluster(compute):
                pipeline.build(plan.shared, compute, storage)
                _run_trials([trial for trial in plan.trials if not is_done(trial, storage)], compute, storage, name)
    if failed := [trial for trial in plan.trials if not is_done(trial, storage)]:
        lines = [f"{trial.name}: {storage.failure(trial.train)}" for trial in failed]
        done = f"{len(plan.trials) - len(failed)} of {len(plan.trials)} trials are done"
        what = f"sweep: {len(failed)} failed, {done}. Run the same command again to try those once more."
        raise StageFailed("\n".join([*lines, what]))
    return pipeline.Built(tuple(todo), tuple(stage for stage in everything if stage not in todo))


def _run_trials(trials: Sequence[Trial], compute: Compute, storage: Storage, name: str) -> None:
    """Run trials under Ray Tune, as many at a time as the cluster holds."""
    if not trials:
        return
    # Read by Tune when it is imported or started. Ctrl-C is ours, and a trial stays in the directory of the command.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints a table whatever its verbosity
    from ray import tune

    require_room(compute, "train")
    require_room(compute, "evaluate")
    place = storage.root / "scratch" / name
    shutil.rmtree(place, ignore_errors=True)  # of a run that was killed
    patient = compute.model_copy(update={"ray": compute.ray.model_copy(update={"wait_seconds": _FOR_EVER})})
    work = functools.partial(_run_trial, trials=tuple(trials), compute=patient, storage=storage)
    for trial in trials:
        storage.forget_failure(trial.train)
    with Progress("sweep", "trials") as progress:
        progress.begin(len(trials))
        try:
            tune.Tuner(
                # Tune refuses a trial that needs nothing. Its CPUs are its workers', who ask for themselves.
                tune.with_resources(work, {"memory": 1e6}),
                param_space={"trial": tune.grid_search(list(range(len(trials))))},
                tune_config=tune.TuneConfig(
                    max_concurrent_trials=trials_at_once(compute),
                    reuse_actors=True,  # a process imports torch once
                ),
                run_config=tune.RunConfig(
                    name="trials",
                    storage_path=str(place),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=compute.train.max_failures),
                    callbacks=[_watcher(trials, storage, progress)],
                ),
            ).fit()
        finally:
            shutil.rmtree(place, ignore_errors=True)


def trials_at_once(compute: Compute) -> int:
    """Return how many trials the nodes that are there hold side by side: by their training, which needs most."""
    import ray

    workers, cpus, gpus = compute.needs()["train"]
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    held = sum(int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) // gpus if gpus else math.inf)) for node in nodes)
    return max(1, held // workers)


def _run_trial(
    config: Mapping[str, int], trials: Sequence[Trial], compute: Compute, storage: Storage
) -> dict[str, Any]:
    """Train and examine one model; runs in a Ray worker, on the cluster that is there."""
    sys.argv = ["sdft", "sweep"]  # what the manifests say; a worker's own arguments say nothing to anyone
    trial = trials[config["trial"]]
    try:
        pipeline.build([trial.train, *trial.exams], compute, storage)
    except (UserError, StageFailed) as error:  # a result of this trial, not a fault of its process: no second try
        storage.keep_failure(trial.train, str(error))
    return {"done": True}


def _watcher(trials: Sequence[Trial], storage: Storage, progress: Progress) -> Any:
    """Return what says a line at the end of every trial and keeps the reasons of those that Tune gave up."""
    from ray.tune import Callback

    class Watcher(Callback):
        def __init__(self) -> None:
            self.begun: dict[int, float] = {}
            self.ended = 0

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self.begun.setdefault(trial.config["trial"], time.monotonic())

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self.tell(trial.config["trial"])

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            lines = str(trial.get_error() or "its process died").strip().splitlines()
            storage.keep_failure(mine[trial.config["trial"]].train, lines[-1])
            self.tell(trial.config["trial"])

        def tell(self, number: int) -> None:
            trial, self.ended = mine[number], self.ended + 1
            what = storage.failure(trial.train)
            took = duration(time.monotonic() - self.begun[number])
            say(f"trial {trial.name}: {f'FAILED after {took}: {what}' if what else took}")
            progress.update(self.ended)

    mine = trials
    return Watcher()
