"""The chain, whole and in order: from a recipe to its stages, and from stages to artifacts.

In: a recipe. Out: the plan (a tuple of `Stage`), and after `run` an artifact for each. Plain code: which stage feeds
which is what `stages` says, and nothing is built that is there already.

    base model ──┬─ score ── loss ── cut ──┬─ train (sft, distilled)
                 └─ distill ───────────────┘            └── merge
    nll: rewrites and references in the base's eyes
    draft: pruned, tuned and merged models for the base
    evaluate: base, pruned, tuned and merged models on every task
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

from sdft_ray.cluster import ray_cluster, require_room
from sdft_ray.core import surgery
from sdft_ray.data import benchmarks, calibration, readers
from sdft_ray.errors import StageFailed, UserError, nearest, problem
from sdft_ray.models import directory, sources
from sdft_ray.preflight import limits, precision
from sdft_ray.progress import Progress, duration, say
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.recipe import (
    Draft,
    FileRows,
    GymRows,
    HubModel,
    HubRows,
    LocalModel,
    Merge,
    Recipe,
    Train,
    require_depth,
)
from sdft_ray.stages import (
    Validated,
    Work,
    cut,
    distill,
    draft,
    evaluate,
    loss,
    merge,
    model,
    nll,
    rows,
    score,
    speed,
    train,
)
from sdft_ray.store.files import hash_source
from sdft_ray.store.identity import Stage, slugify
from sdft_ray.store.storage import Storage

STAGE_NAMES = (
    "model", "rows", "score", "loss", "cut", "distill", "train", "merge", "nll", "draft", "speed", "evaluate"
)  # fmt: skip
_UNITS = {"score": "texts", "loss": "texts", "distill": "rows", "train": "steps", "merge": "tensors", "nll": "texts"}
_ON_RAY = ("score", "loss", "distill", "train", "nll", "draft", "speed", "evaluate")
_REQUIRE_GATES = {"distill": distill.require_gates, "train": train.require_gates}


def stages(recipe: Recipe) -> tuple[Stage, ...]:
    """Return every stage of a recipe in the order it is built, each with its inputs."""
    base = sources.model_stage(recipe.model, model.VERSION)
    all_rows = _rows_stage(recipe.rows, recipe.evaluate.preset)
    plan = [base, all_rows, *_prune_stages(recipe, base, all_rows)]
    pruned = plan[-1]
    # Generation before training: what fails early should fail early.
    data = _training_data(recipe, base, all_rows)
    plan += [stage for own in data.values() for stage in own.values() if stage is not all_rows]
    models = {"base": base, "pruned": pruned}
    for arm in recipe.arms.names:
        models[arm] = _train_stage(recipe.train_settings(arm), arm, arm, pruned, [data[""]])
    if recipe.merge:
        models |= _merge_stages(recipe, recipe.merge, pruned, models[recipe.merge.arm], data)
    plan += [stage for stage in models.values() if stage is not base and stage is not pruned]
    if recipe.distill.shift_rows:
        plan += [_nll_stage(recipe, base, own["distilled"]) for own in data.values() if "distilled" in own]
    if recipe.draft:
        names = recipe.draft.models or ("pruned", *recipe.arms.names)
        plan += [_draft_stage(recipe.draft, name, base, models, all_rows) for name in names]
    if recipe.evaluate.speed:
        measured = {"dtype": recipe.evaluate.dtype, **speed.LENGTHS}
        plan.append(Stage("speed", pruned.slug, speed.VERSION, measured, {"model": base, "pruned": pruned}))
    for name, examined in models.items():
        who = examined.settings.get("arm", name)  # recipes that train the same model share its exams
        plan += [_evaluate_stage(recipe, task, who, examined, all_rows) for task in recipe.evaluate.tasks]
    return tuple(plan)


def _training_data(recipe: Recipe, base: Stage, all_rows: Stage) -> dict[str, dict[str, Stage]]:
    """Return the stages that make what is trained on: the recipe's own under "", others by their models' names."""
    others = recipe.merge.others if recipe.merge else {}
    found = {"": {"rows": all_rows}}
    for name, other in others.items():
        if other.rows is not None:
            found[name] = {"rows": _rows_stage(other.rows, recipe.evaluate.preset)}
    for own in found.values():
        if recipe.arms.distilled and (own["rows"] is all_rows or (recipe.merge and recipe.merge.arm == "distilled")):
            own["distilled"] = _distill_stage(recipe, base, own["rows"])
    return found


def _train_stage(settings: Train, arm: str, name: str, pruned: Stage, data: Sequence[Mapping[str, Stage]]) -> Stage:
    """Return the stage that trains the model of this name in an arm, on one or several data together."""
    inputs = {"model": pruned}
    for i, own in enumerate(data):
        for kind in ("rows", "distilled") if arm == "distilled" else ("rows",):
            inputs[f"{kind}_{i}" if i else kind] = own[kind]
    identity = {"arm": arm, "train": settings.model_dump(mode="json", exclude={*train.GATES})}
    gates = settings.model_dump(mode="json", include={*train.GATES})
    return Stage("train", f"{pruned.slug}-{arm}", train.VERSION, identity, inputs, {"model": name}, gates)


def _merge_stages(
    recipe: Recipe, wanted: Merge, pruned: Stage, first: Stage, data: Mapping[str, Mapping[str, Stage]]
) -> dict[str, Stage]:
    """Return the models that are merged with an arm's, one trained on all of their rows, and the merged ones."""
    found: dict[str, Stage] = {}
    for name, other in wanted.others.items():
        if other.path is None:
            settings = recipe.train_settings(wanted.arm, name)
            found[name] = _train_stage(settings, wanted.arm, name, pruned, [data[name]])
        else:
            there = sources.model_stage(LocalModel(path=other.path), model.VERSION, f"merge.others.{name}.path")
            found[name] = dataclasses.replace(there, where={**there.where, "model": name})
    parents = {f"model_{i}": stage for i, stage in enumerate([first, *found.values()])}
    if wanted.together:
        settings = recipe.train_settings(wanted.arm)
        found["together"] = _train_stage(settings, wanted.arm, "together", pruned, list(data.values()))
    for name, how in wanted.methods.items():
        identity = {"method": name, **how.model_dump(mode="json")}
        found[name] = Stage("merge", f"{pruned.slug}-{name}", merge.VERSION, identity, parents, {"model": name})
    return found


def _draft_stage(wanted: Draft, name: str, base: Stage, models: Mapping[str, Stage], all_rows: Stage) -> Stage:
    drafts = {other: stage for other, stage in models.items() if stage is not base}
    if name not in drafts:
        raise UserError(problem("draft.models", f"this recipe makes no {name}", nearest(name, drafts)))
    settings = {**wanted.model_dump(mode="json", exclude={"models"}), "tokens": sorted(wanted.tokens)}
    inputs = {"model": base, "draft": drafts[name], "rows": all_rows}
    return Stage("draft", f"{models['pruned'].slug}-{name}", draft.VERSION, settings, inputs, {"draft": name})


def _prune_stages(recipe: Recipe, base: Stage, all_rows: Stage) -> list[Stage]:
    """Return the stages from calibration rows to the pruned model, which is the last."""
    wanted = recipe.prune
    corpora, corpus_rows, where = _calibration(recipe, all_rows)
    plan = list({stage.id: stage for stage in corpus_rows.values() if stage is not all_rows}.values())
    measured = {"dtype": wanted.dtype, "calibration": corpora}
    scored = Stage("score", base.slug, score.VERSION, measured, {"model": base, **corpus_rows}, where)
    plan.append(scored)
    slug = f"{base.slug}-{wanted.blocks}"
    choice = wanted.model_dump(mode="json", include={"blocks", "contiguous", "protect"})
    inputs = {"model": base, "score": scored}
    if wanted.candidates:
        settings = {**measured, **choice, "candidates": wanted.candidates}
        plan.append(Stage("loss", slug, loss.VERSION, settings, {**inputs, **corpus_rows}, where))
        if wanted.metric == "loss":
            inputs = {**inputs, "loss": plan[-1]}
    plan.append(Stage("cut", slug, cut.VERSION, {"metric": wanted.metric, **choice}, inputs))
    return plan


def _calibration(recipe: Recipe, own: Stage) -> tuple[list[dict[str, Any]], dict[str, Stage], dict[str, str]]:
    """Return the settings of the calibration corpora, the rows stages that they need, and where their files are."""
    settings: list[dict[str, Any]] = []
    rows_stages: dict[str, Stage] = {}
    where: dict[str, str] = {}
    names: list[str] = []
    for i, corpus in enumerate(recipe.prune.calibration):
        settings.append(corpus.model_dump(mode="json", exclude={"text", "rows"}))
        if corpus.rows is None:
            path = calibration.calibration_file(corpus.text or "boolq")
            settings[-1]["sha256"] = hash_source(path)
            where[f"texts_{i}"] = str(path.absolute())  # workers are elsewhere
            names.append("boolq" if corpus.text == "boolq" else path.stem)
        else:
            rows_stages[f"rows_{i}"] = own if corpus.rows == "own" else _rows_stage(corpus.rows, recipe.evaluate.preset)
            names.append(rows_stages[f"rows_{i}"].slug)
    where |= {f"name_{i}": name for i, name in enumerate(_distinct(names))}
    return settings, rows_stages, where


def _distinct(names: Sequence[str]) -> list[str]:
    """Return names of which none is there twice: a further `texts` is `texts-2`."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        found.append(next(each for each in itertools.chain([name], numbered) if each not in found))
    return found


def _rows_stage(source: GymRows | FileRows | HubRows, preset: str) -> Stage:
    split = source.model_dump(mode="json", include={"limit", "held_out", "validation", "seed", "answer"})
    match source:
        case GymRows():
            name = source.gym
        case FileRows():
            name = Path(source.path).stem
        case HubRows():
            name = source.repo
    settings: dict[str, Any] = {"source": readers.rows_identity(source), "split": split}
    where = {"path": source.path} if isinstance(source, FileRows) else {}
    if source.decontaminate:
        files = {task: benchmarks.offline_items_file(task) for task in source.decontaminate if preset == "offline"}
        where |= {f"task {task}": str(file) for task, file in files.items()}
        # What a hub's task holds is the harness's to say, as in evaluations.
        tasks = {task: hash_source(files[task]) if task in files else preset for task in source.decontaminate}
        settings["decontaminate"] = {"tasks": tasks, "ngram": source.ngram}
    return Stage("rows", slugify(name), rows.VERSION, settings, where=where)


def _distill_stage(recipe: Recipe, base: Stage, all_rows: Stage) -> Stage:
    settings = {
        **recipe.distill.model_dump(mode="json", exclude={*distill.GATES, "shift_rows"}),
        "answer": all_rows.settings["split"]["answer"],
        "rows": recipe.train.rows,
    }
    gates = recipe.distill.model_dump(mode="json", include={*distill.GATES})
    return Stage("distill", all_rows.slug, distill.VERSION, settings, {"model": base, "rows": all_rows}, gates=gates)


def _nll_stage(recipe: Recipe, base: Stage, distilled: Stage) -> Stage:
    settings = {"rows": recipe.distill.shift_rows, "dtype": recipe.distill.dtype, "seed": recipe.distill.seed}
    return Stage("nll", distilled.slug, nll.VERSION, settings, {"model": base, "distilled": distilled})


def _evaluate_stage(recipe: Recipe, task: str, who: str, examined: Stage, all_rows: Stage) -> Stage:
    wanted = recipe.evaluate
    settings: dict[str, Any] = {"task": task, "dtype": wanted.dtype}
    inputs, where = {"model": examined}, {}
    if task == evaluate.HELD_OUT:
        settings |= {"max_new_tokens": wanted.max_new_tokens, "answer": all_rows.settings["split"]["answer"]}
        inputs["rows"] = all_rows
    else:
        exam = evaluate.exam(wanted.preset, task)
        settings |= {"metric": exam.metric, "shots": exam.shots}
        settings |= {"revision": exam.revision} if exam.revision else {}
        settings |= {"limit": wanted.limit, "chat_template": wanted.chat_template}
        if wanted.preset == "offline":
            where["file"] = str(benchmarks.offline_task_file(task))
            settings["sha256"] = hash_source(benchmarks.offline_task_file(task))
    return Stage("evaluate", slugify(f"{task}-{who}"), evaluate.VERSION, settings, inputs, where)


def models(plan: Sequence[Stage]) -> dict[str, Stage]:
    """Return the stages of a plan that are models, by the names of the report: base, pruned, each arm, and
    those that are merged."""
    found = {"base": plan[0]}
    for stage in plan:
        if stage.name == "cut":
            found["pruned"] = stage
        elif "model" in stage.where:
            found[stage.where["model"]] = stage
    return found


def check(recipe: Recipe, compute: Compute) -> None:
    """Raise UserError for what can be known to be wrong before anything is built."""
    facts = sources.describe_model(recipe.model)
    others = recipe.merge.others if recipe.merge else {}
    if facts:
        _require_prunable(recipe, facts)
        _require_generates(facts, compute)
    for name, other in others.items():
        if other.path is not None and facts:
            _require_compatible(f"merge.others.{name}.path", other.path, facts, recipe.prune.blocks)
    if facts and recipe.merge and recipe.merge.slerp:
        merge.require_one_for_each(recipe.merge.slerp.t, facts.blocks - recipe.prune.blocks)
    context, count = facts.context if facts else None, limits.token_counter(recipe.model)
    limits.require_numbers(recipe, context)
    for source in (recipe.rows, *(other.rows for other in others.values())):
        if isinstance(source, GymRows):
            readers.read_rows(source.model_copy(update={"limit": 1}))
        if source is not None:
            splits = limits.read_splits(source, recipe.train.rows)
            if source is not recipe.rows:  # of others nothing is evaluated
                splits["held_out"] = []
            if context is not None:
                limits.require_lengths(recipe, compute, splits, context, count)
    limits.require_texts(recipe, count)
    if recipe.evaluate.preset == "harness":
        evaluate.require_known(recipe.evaluate.tasks)
    for arm in recipe.arms.names:
        train.require_fitting(recipe.train_settings(arm), compute.train)
    for name, other in others.items():
        if other.rows is not None and recipe.merge:
            train.require_fitting(recipe.train_settings(recipe.merge.arm, name), compute.train)


def _require_prunable(recipe: Recipe, facts: directory.ModelFacts) -> None:
    """Raise UserError for a model that is here and cannot be pruned as the recipe says."""
    surgery.require_supported(facts.architecture, "model")
    require_depth(recipe.prune.blocks, recipe.prune.protect, facts.blocks)
    assert not isinstance(recipe.model, HubModel), "a hub model has no facts"
    if (path := sources.model_path(recipe.model)).is_dir():
        names = (name for tensors in directory.stored_tensors(path).values() for name in tensors)
        surgery.require_blocks(path, names, facts.blocks)


def _require_generates(facts: directory.ModelFacts, compute: Compute) -> None:
    """Raise UserError for a model of which vLLM's CPU build generates other text (docs/architectures.md)."""
    if facts.architecture == "gpt_oss" and not compute.distill.gpus:
        what = "vLLM's CPU build generates other text than gpt_oss"
        raise UserError(problem("compute.distill.gpus", what, "Set gpus: 1 for each actor"))


def _require_compatible(where: str, path: str, base: directory.ModelFacts, removed: int) -> None:
    """Raise UserError for a model that cannot have been tuned from this base without some blocks."""
    found = sources.describe_model(LocalModel(path=path))
    assert found, "a local model has facts"
    expected = {"architecture": base.architecture, "blocks": base.blocks - removed}
    for field, ours in expected.items():
        if (got := getattr(found, field)) != ours:
            do = "Give a model that was tuned from the same pruned model"
            raise UserError(problem(where, f"{field} is {got}, of the model that is pruned here {ours}", do))


@dataclasses.dataclass(frozen=True)
class Built:
    """What a run did."""

    new: tuple[Stage, ...]
    reused: tuple[Stage, ...]


def run(recipe: Recipe, compute: Compute, storage: Storage, until: str | None = None) -> Built:
    """Build every stage of a recipe that is not there yet, up to and including the stages named `until`."""
    check(recipe, compute)
    plan = stages(recipe)
    if until:
        if until not in STAGE_NAMES:
            raise UserError(problem("--until", f"{until} is no stage", nearest(until, STAGE_NAMES)))
        if until not in (names := [stage.name for stage in plan]):
            do = f"It has {', '.join(dict.fromkeys(names))}"
            raise UserError(problem("--until", f"this recipe has no stage {until}", do))
        plan = plan[: len(plan) - names[::-1].index(until)]
    precision.say_slow(survey(plan, storage)[0], compute)
    return build(plan, compute, storage)


def build(plan: Sequence[Stage], compute: Compute, storage: Storage, validated: Validated = None) -> Built:
    """Build every stage of a plan that is not there yet, in its order, on one cluster.

    `validated` is called with the step and the loss of every validation of a training.
    """
    todo, done = survey(plan, storage)
    require_gates(done, storage)
    with contextlib.ExitStack() as stack:
        connected = False
        for group in _together(todo):
            if group[0].name in _ON_RAY:
                if not connected:  # as late as can be: mistakes in the rows show before a cluster starts
                    with Progress("ray") as progress:
                        progress.enter("connecting" if compute.ray.address != "local" else "starting")
                        stack.enter_context(ray_cluster(compute))
                    connected = True
                require_room(compute, group[0].name)
            _build_group(group, storage, compute, validated)
    return Built(tuple(todo), tuple(done))


def survey(plan: Iterable[Stage], storage: Storage) -> tuple[list[Stage], list[Stage]]:
    """Return the stages of a plan that are to be built and those that are done, each in the plan's order."""
    found: tuple[list[Stage], list[Stage]] = [], []
    with storage.survey():
        for stage in plan:
            found[storage.status(stage) == "done"].append(stage)
    return found


def require_gates(finished: Iterable[Stage], storage: Storage) -> None:
    """Raise where the counts of a finished stage are above the recipe's gates: it was built when they were looser."""
    for stage in finished:
        if stage.gates:
            _REQUIRE_GATES[stage.name](stage, storage.manifest(stage)["summary"])


def _together(todo: Sequence[Stage]) -> Iterator[list[Stage]]:
    """Yield the stages that are built at once: all evaluations (each is small), everything else alone."""
    for name, group in itertools.groupby(todo, key=lambda stage: stage.name):
        each = list(group)
        yield from [each] if name == "evaluate" else ([stage] for stage in each)


def _build_group(group: Sequence[Stage], storage: Storage, compute: Compute, validated: Validated) -> None:
    if len(group) == 1:
        with Progress(group[0].name, _UNITS.get(group[0].name, "parts")) as progress:
            _build(group[0], storage, compute, progress, validated, threading.Event())
        return
    with Progress(group[0].name, "tasks") as progress:
        progress.begin(len(group))
        stopped = threading.Event()
        waiting = [
            _in_thread(_build, stage, storage, compute, Progress(stage.name, "parts"), None, stopped) for stage in group
        ]
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                future.result()
                progress.update(done)
        finally:  # at the first failure the others end: in a trial's process they would go on beside the next trial
            stopped.set()


def _in_thread(work: Callable[..., None], *arguments: Any) -> Future[None]:
    """Return what comes of work in a thread that does not keep the process: an executor's is waited for at its end."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work(*arguments)
            future.set_result(None)
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _build(
    stage: Stage,
    storage: Storage,
    compute: Compute,
    progress: Progress,
    validated: Validated,
    stopped: threading.Event,
) -> None:
    """Build one stage under its lock, and say what came of it."""
    with storage.lock(f"{stage.name}-{stage.id}"):
        if storage.status(stage) == "done":  # built by another command while this one waited
            require_gates([stage], storage)
            return
        if stopped.is_set():  # while this one waited
            return
        begun = time.monotonic()
        module = importlib.import_module(f"sdft_ray.stages.{stage.name}")
        try:
            summary = module.build(Work(stage, storage, compute, progress, validated, stopped))
            # An evaluation says itself how long it took: this thread also waited for its turn on the cluster.
            seconds = summary.get("seconds", time.monotonic() - begun)
            storage.commit(stage, summary, seconds)
        except KeyboardInterrupt:
            raise
        except Exception as error:  # the edge: whatever broke, say what is kept and where the trace is
            if isinstance(cause := below_ray(error), (UserError, StageFailed)):
                raise cause from error
            log = storage.keep_trace(stage, "".join(traceback.format_exception(error)))
            kept = f"What it had finished is kept under {storage.uri}; run the same command again to go on"
            raise StageFailed(f"{stage.name}: failed: {_one_line(cause)}. {kept}.{log}") from error
    say(f"{stage.name}: {duration(seconds)}, {storage.where(stage)}")


def below_ray(error: BaseException) -> BaseException:
    """Return what a worker raised, without the wrappers that Ray puts around it."""
    while type(error).__name__ in ("SystemException", "UserCodeException") and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__ or error
    return getattr(error, "cause", None) or error


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def describe(plan: Sequence[Stage], storage: Storage) -> list[Mapping[str, Any]]:
    """Return, for each stage of a plan, what `sdft check` shows."""
    with storage.survey():
        return [{"stage": each.name, "status": storage.status(each), "directory": storage.where(each)} for each in plan]
