"""A sweep: many recipes that differ in named fields, as one plan that holds each stage once.

In: a sweep file (a recipe, and axes of values for some of its fields). Out: the stages that several trials share, and
the trials, each of which trains one model and evaluates it (trials.py builds them). Mistakes of any cell are reported
here, before anything is built.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray import pipeline
from sdft_ray.errors import UserError, problem
from sdft_ray.preflight import limits
from sdft_ray.preflight.checks import check as check_recipe
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.loading import dump_yaml, load_recipe, load_section
from sdft_ray.spec.recipe import Distill, Recipe
from sdft_ray.spec.sources import FileRows
from sdft_ray.spec.sweep import Asha, Axes, Goal, Sweep
from sdft_ray.spec.training import Arms, Train
from sdft_ray.stages import cut, distill, draft, evaluate, retention, train
from sdft_ray.store.identity import Stage, distinct, short_id
from sdft_ray.store.storage import Storage

_NOT_OF_TRIALS = ("merge", "export")
DEPTH, TARGET, SIZE, RECIPE = "prune.blocks", "prune.target.parameters", "train.rows", "recipe"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One recipe of a sweep, and the values that make it."""

    values: Mapping[str, Any]
    recipe: Recipe


@dataclasses.dataclass(frozen=True)
class Trial:
    """The training of one model, and its evaluations."""

    train: Stage[train.Settings]
    evaluations: Mapping[str, Stage[evaluate.Settings]]
    """By task."""
    cell: Cell
    """The first cell that needs it."""
    values: Mapping[str, Any]
    """Those of the cell's values that determine it."""
    retention: Stage[retention.Settings] | None = None

    @property
    def stages(self) -> tuple[Stage[Any], ...]:
        """The training and its evaluations."""
        return self.train, *([self.retention] if self.retention else []), *self.evaluations.values()

    @property
    def arm(self) -> str:
        return self.train.settings.arm

    @property
    def compares_with(self) -> tuple[Any, ...]:
        """The key of trials whose validation losses compare: the pruned model, the validation rows, arm and size."""
        rows = self.train.rows
        read = rows.inputs.values() or [rows]  # weights of a mixture move no validation row
        return self.train.model.id, *(each.id for each in read), self.arm, self.train.settings.train.rows

    @property
    def name(self) -> str:
        """The arm and the values, for a line of progress."""
        return ", ".join([self.arm, *(f"{path.rpartition('.')[2]} {value}" for path, value in self.values.items())])


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages of a sweep: first shared ones, in this order, then the trials in any, then the drafts."""

    cells: tuple[Cell, ...]
    shared: tuple[Stage, ...]
    trials: tuple[Trial, ...]
    drafts: tuple[Stage, ...] = ()
    """Pruned and trained models as drafts of the base: last, one at a time, because their speed is measured."""
    asha: Asha | None = None
    goal: Goal | None = None
    """Where there is one, its depths are tried one by one: see goal.py."""
    part_of: str | None = None
    """The name of the whole sweep, of a part of one."""

    @property
    def name(self) -> str:
        """The name of the sweep's own records: other trials, and another way to stop them, make another sweep."""
        stops = [self.asha.model_dump()] if self.asha else []
        return self.part_of or f"sweep-{short_id([*(trial.train.id for trial in self.trials), *stops])}"


# --- from file to plan ----------------------------------------------------------------------------------------


def load_sweep(path: Path | Mapping[str, Any]) -> Plan:
    """Return the plan of the sweep in `path`, or of such content; raises UserError with every problem of it at once.

    Recipes are named from the file's directory, in mere content from the current one.
    """
    sweep = load_section(Sweep, path)
    cells = expand(sweep, path.parent if isinstance(path, Path) else Path())
    if sweep.goal:
        cells = _of_arm(cells, sweep.goal.arm)
        if sweep.goal.tokens_per_second and not cells[0].recipe.evaluate.speed:
            what = "is not measured by the recipe"
            raise UserError(problem("goal.tokens_per_second", what, "Set evaluate.speed: true in it"))
    plan = dataclasses.replace(make_plan(cells), asha=sweep.asha, goal=sweep.goal)
    if problems := list(_mistakes_of_asha(plan)) if plan.asha else []:
        raise UserError(*problems)
    return plan


def expand(sweep: Sweep, folder: Path) -> tuple[Cell, ...]:
    """Return one cell for each combination of values and recipe, in the order of the file."""
    cells: list[Cell] = []
    problems: dict[str, None] = {}
    names = dict(zip(sweep.recipe, distinct([Path(file).stem for file in sweep.recipe]), strict=True))
    first = load_recipe(folder / sweep.recipe[0])
    for file in sweep.recipe:
        whole = load_recipe(folder / file)  # raises for the recipe's own mistakes
        for key in _NOT_OF_TRIALS:
            if getattr(whole, key):
                raise UserError(problem("recipe", f"{file} has {key}, and trials do not", f"Remove {key} from {file}"))
        if whole.model.part == "all":
            fault = f"{file} puts its models back into the whole one, and trials do not"
            raise UserError(problem("recipe", fault, f"Set model.part: text in {file}"))
        if whole.evaluate != first.evaluate:
            what = f"{file} has other evaluations than {sweep.recipe[0]}, so their means do not compare"
            raise UserError(problem("recipe", what, "Give both the same evaluate"))
        if whole.draft != first.draft:
            what = f"{file} tries drafts differently from {sweep.recipe[0]}, so their figures do not compare"
            raise UserError(problem("recipe", what, "Give both the same draft"))
    for axes in sweep.axes:
        crossed: list[Cell] = []
        for values, (file, stem) in itertools.product(_combinations(sweep, axes), names.items()):
            name = {RECIPE: stem} if len(names) > 1 else {}
            overrides = [f"{path}={dump_yaml(value)}" for path, value in values.items()]
            try:
                cell = Cell({**name, **values}, load_recipe(folder / file, overrides))
            except UserError as error:
                problems |= dict.fromkeys(_of_axis(line.removeprefix("--set "), values) for line in error.problems)
                continue
            problems |= dict.fromkeys(_mistakes(cell))
            crossed.append(cell)
        problems |= dict.fromkeys(_repeated(crossed, axes))
        cells += crossed
    if problems:
        raise UserError(*problems)
    return tuple(cells)


def _of_arm(cells: Sequence[Cell], arm: str) -> tuple[Cell, ...]:
    """Return cells that train one arm alone."""
    (own,) = {getattr(cell.recipe.arms, arm) for cell in cells}
    if own is None:
        raise UserError(problem("goal.arm", f"the recipe does not train {arm}", f"Add arms.{arm}: {{}} to it"))
    arms = Arms(**{arm: own})
    return tuple(Cell(cell.values, cell.recipe.model_copy(update={"arms": arms})) for cell in cells)


def _combinations(sweep: Sweep, axes: Axes) -> Iterator[dict[str, Any]]:
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


def _repeated(cells: Sequence[Cell], axes: Axes) -> Iterator[str]:
    """Yield a problem for each listed value of an axis that makes the same recipe as another one."""
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.recipe.model_dump_json(), cell)
        for path in axes:
            if axes[path].values is not None and (value := cell.values[path]) != (same := other.values[path]):
                yield problem(f"axes.{path}", f"{same} and {value} make the same recipe", "Remove one")


def _of_axis(line: str, values: Mapping[str, Any]) -> str:
    """Return a problem of a recipe as one of the axis that made it."""
    where = line.partition(": ")[0]
    is_one = any(line.startswith(path) or path.startswith(f"{where}.") for path in values)
    return f"axes.{line}" if is_one else line


def _mistakes(cell: Cell) -> Iterator[str]:
    """Yield a problem for each axis whose values no trial could compare."""
    for path in cell.values:
        section, _, field = path.partition(".")
        if section in _NOT_OF_TRIALS:
            yield problem(f"axes.{path}", f"trials have no {section}", f"Remove axes.{path}")
        if section == "evaluate":
            yield problem(f"axes.{path}", "every trial has the same evaluations", "Set it in the recipe")
        if field.rpartition(".")[2] in (*Distill.unhashed, *Train.unhashed):
            yield problem(f"axes.{path}", "moves no number of a trial", "Set it in the recipe")
        if section == "draft":
            yield problem(f"axes.{path}", "every draft is tried in the same way", "Set it in the recipe")
        if not (path in (DEPTH, TARGET, SIZE, RECIPE) or is_seed(path)) and not _validates(cell.recipe):
            what = f"without validation rows no loss compares values of {path}"
            yield problem(f"axes.{path}", what, "Set rows.validation in the recipe, for example to 16")
        if field.endswith("weight") and cell.values[path] == 0 and section == "rows":
            what = "0 leaves out its held-out and validation rows, too, so trials do not compare"
            yield problem(f"axes.{path}", what, "Give a small weight, such as 0.01")
        trained = [cell.recipe.train_settings(arm) for arm in cell.recipe.arms.names]
        if path.startswith("train.lora.") and all(settings.method == "full" for settings in trained):
            yield problem(f"axes.{path}", "no arm is trained with method lora", "Remove it")
        for arm in cell.recipe.arms.names if section == "train" else ():
            own = getattr(cell.recipe.arms, arm).model_dump(exclude_none=True)
            if (name := field.partition(".")[0]) in own:
                do = f"Sweep arms.{arm}.{field} instead"
                yield problem(f"axes.{path}", f"the arm {arm} has its own {name}", do)


def _validates(recipe: Recipe) -> bool:
    return any(source.validation for source in recipe.sources)


def _mistakes_of_asha(plan: Plan) -> Iterator[str]:
    """Yield a problem for each reason against comparing and stopping trials of a plan."""
    for path in dict.fromkeys(path for cell in plan.cells for path in cell.values):
        if is_seed(path):
            yield problem(f"axes.{path}", "asha would keep the lucky seeds", "Remove asha")
    if not all(_validates(cell.recipe) for cell in plan.cells):
        yield problem("asha", "there are no validation rows to compare by", "Set rows.validation, for example to 16")
    longest = max(_count_steps(trial.train.settings) for trial in plan.trials)
    if plan.asha and plan.asha.grace_steps >= longest:
        what = f"no training has more than {longest:g} steps, so none is stopped"
        yield problem("asha.grace_steps", what, f"Lower it below {longest:g}")
    if max(Counter(trial.compares_with for trial in plan.trials).values()) < 2:
        what = "no two trials have arm, depth and size in common, so no losses compare"
        yield problem("asha", what, "Remove asha")


def _count_steps(settings: train.Settings) -> float:
    """Return the steps of a training; infinity where its rows are not counted yet."""
    own = settings.train
    return own.count_steps(own.rows) if own.rows else math.inf


def is_seed(path: str) -> bool:
    """Return whether an axis repeats a trial instead of changing its settings."""
    return path.endswith(".seed")


def _require_one_yardstick(chains: Sequence[tuple[Cell, pipeline.Chain]]) -> None:
    """Raise UserError where one base would be evaluated on different rows: scores of trials would not compare."""
    first: dict[str, tuple[Cell, list[str]]] = {}
    for cell, chain in chains:
        kept = chain.retention.get("base")
        ids = [stage.id for stage in (*chain.tasks_of("base").values(), *([kept] if kept else []))]
        other, expected = first.setdefault(chain.base.id, (cell, ids))
        if ids != expected:
            what = "gives trials other held-out rows, so their scores do not compare"
            paths = (path for path, value in cell.values.items() if other.values.get(path) != value)
            if (path := next(paths, RECIPE)) != RECIPE:
                raise UserError(problem(f"axes.{path}", what, "Set it in the recipe"))
            raise UserError(problem(RECIPE, what, "Set rows.held_out: 0 in each recipe"))


def _unmoved(chains: Sequence[tuple[Cell, pipeline.Chain]]) -> Iterator[str]:
    """Yield a problem for each axis of which no value makes another trial than the others do."""
    made = [(cell.values, frozenset(stage.id for stage in chain.trained.values())) for cell, chain in chains]
    for path in dict.fromkeys(path for values, _ in made for path in values if path != RECIPE):
        by_others: dict[str, list[frozenset[str]]] = {}
        for values, trained in made:
            if path in values:
                others = json.dumps({key: value for key, value in values.items() if key != path})
                by_others.setdefault(others, []).append(trained)
        if max(map(len, by_others.values())) > 1 and all(len({*same}) == 1 for same in by_others.values()):
            yield problem(f"axes.{path}", "moves no number of a trial", "Remove it")


def make_plan(cells: Sequence[Cell]) -> Plan:
    """Return the plan of cells, with each stage once."""
    chains = [(cell, pipeline.chain(cell.recipe)) for cell in cells]
    _require_one_yardstick(chains)
    if problems := list(_unmoved(chains)):
        raise UserError(*problems)
    trained: dict[str, tuple[pipeline.Chain, str]] = {}
    needed_by: dict[str, list[Cell]] = {}
    for cell, chain in chains:
        for name, stage in chain.trained.items():
            trained.setdefault(stage.id, (chain, name))
            needed_by.setdefault(stage.id, []).append(cell)
    trials = [
        Trial(
            train=chain.trained[name],
            evaluations=chain.tasks_of(name),
            cell=needed_by[key][0],
            values=_common_values(needed_by[key]),
            retention=chain.retention.get(name),
        )
        for key, (chain, name) in trained.items()
    ]
    drafts = {stage.id: stage for _, chain in chains for stage in chain.drafts.values()}
    own = {*drafts, *(stage.id for trial in trials for stage in trial.stages)}
    own -= {stage.id for _, chain in chains for stage in chain.cutting.in_order}  # a finalist may be a trial, too
    shared = {stage.id: stage for _, chain in chains for stage in chain.in_order if stage.id not in own}
    in_order = _behind_inputs(sorted(shared.values(), key=_place))
    return Plan(tuple(cells), in_order, tuple(trials), drafts=tuple(drafts.values()))


def _behind_inputs(stages: Sequence[Stage[Any]]) -> tuple[Stage[Any], ...]:
    """Return stages in their order, but each behind those of them that it is made from."""
    given, ordered = {stage.id for stage in stages}, dict[str, Stage[Any]]()

    def add(stage: Stage[Any]) -> None:
        for each in stage.inputs.values():
            add(each)
        if stage.id in given:
            ordered.setdefault(stage.id, stage)

    for stage in stages:
        add(stage)
    return tuple(ordered.values())


def _place(stage: Stage[Any]) -> tuple[int, float]:
    """Return a stage's place: as in one chain, but generation at the largest size first: smaller ones share it."""
    rows = stage.settings.rows if isinstance(stage.settings, distill.Settings) else 0
    return [*pipeline.MODULES].index(stage.name), -math.inf if rows is None else -rows


def _common_values(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the values that all cells of a trial share: other values do not determine it."""
    return {
        path: value
        for path, value in cells[0].values.items()
        if all(path in cell.values and cell.values[path] == value for cell in cells)
    }


def check(plan: Plan, compute: Compute) -> None:
    """Raise UserError with the mistakes of all cells that show before anything is built."""
    problems: dict[str, None] = {}
    files: dict[str, limits.Read] = {}

    def read_once(source: FileRows) -> limits.Read:
        key = source.model_dump_json()
        if key not in files:
            files[key] = limits.read_file(source)
        return files[key]

    for cell in plan.cells:
        try:
            check_recipe(cell.recipe, compute, read_once)
        except UserError as error:
            problems |= dict.fromkeys(_of_axis(line, cell.values) for line in error.problems)
    if problems:
        raise UserError(*problems)


def stages_of(plan: Plan) -> tuple[Stage, ...]:
    """Return every stage of a sweep in an order of building."""
    trained = (stage for trial in plan.trials for stage in trial.stages)
    return (*plan.shared, *trained, *plan.drafts)


def name_draft(stage: Stage, plan: Plan) -> str:
    """Return the name of the model that a stage tries as a draft, for a line of progress."""
    model = draft.candidate(stage)
    names = {trial.train.id: trial.name for trial in plan.trials}
    return f"draft {names[model.id] if model.id in names else 'pruned, ' + cut.name_cut(model.settings)}"


def describe_stopped(losses: Sequence[tuple[int, float]]) -> str:
    """Return as text when a trial was stopped.

    >>> describe_stopped([(2, 3.5), (4, 3.25)])
    'stopped at step 4, validation loss 3.250'
    """
    step, loss = losses[-1]
    return f"stopped at step {step}, validation loss {loss:.3f}"


def is_done(trial: Trial, storage: Storage) -> bool:
    """Return whether a trial's model and all of its evaluations are finished."""
    return all(storage.status(stage) == "done" for stage in trial.stages)
