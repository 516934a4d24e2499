"""The chain, whole and in order: from a recipe to its stages, and from stages to artifacts.

In: a recipe. Out: its `Chain`, and after `run` an artifact for each stage of it. `chain` connects the stages in plain
code, and a finished artifact is not built again.

    sources of rows ── mix, where there are several
    base model ──┬─ (score) ── (loss) ── (finals) ── cut ── (patch) ─┬─ train (sft, distilled, logits)
                 └─ distill ── (targets) ───────────────────────────┘            └── merge
    nll: likelihoods of rewrites and references under the base
    draft: pruned, tuned and merged models for the base
    export: models in the forms that other programs serve
    whole: tuned decoders, back in the model that also sees or hears
    probes ── retention: every model against the base, token by token
    evaluate: every model on every task
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from sdft_ray import overlap
from sdft_ray.building import Builder, require_gates, survey
from sdft_ray.cluster import live_nodes, ray_cluster
from sdft_ray.cutting import Cutting, cutting
from sdft_ray.engine import EngineFactory, start_engine
from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.measures import draft_stages, evaluation_stages, export_stages, nll_stages, retention_stages
from sdft_ray.preflight import precision, teachers
from sdft_ray.preflight.checks import check
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.stages import (
    StageModule,
    Validated,
    cut,
    distill,
    draft,
    evaluate,
    export,
    finals,
    loss,
    merge,
    mix,
    model,
    nll,
    patch,
    probes,
    retention,
    rows,
    score,
    speed,
    train,
    whole,
)
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage
from sdft_ray.training_data import Data, MixedStage, read_sources, training_data
from sdft_ray.tuning import tuned_models, whole_models

MODULES: dict[str, StageModule] = {
    "model": model,
    "rows": rows,
    "mix": mix,
    "score": score,
    "loss": loss,
    "finals": finals,
    "cut": cut,
    "patch": patch,
    "distill": distill,
    "targets": train.targets,
    "train": train,
    "merge": merge,
    "export": export,
    "whole": whole,
    "nll": nll,
    "draft": draft,
    "speed": speed,
    "probes": probes,
    "retention": retention,
    "evaluate": evaluate,
}
"""Every kind of stage, in the order of a chain."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """All stages of one recipe, by their roles."""

    base: Stage[model.Settings]
    rows: MixedStage
    cutting: Cutting
    data: Mapping[str, Data]
    """Training data: the recipe's own under "", others by the names of their models."""
    models: Mapping[str, Stage[Any]]
    """Every model, by the name that the report gives it: base, pruned, patched, each arm, merged and exported ones."""
    wholes: Mapping[str, Stage[whole.Settings]]
    """By the name of the text model; none where the rest of the base is left out, or where there is none."""
    nll: tuple[Stage[nll.Settings], ...]
    """One for each set of rewrites; the recipe's own first."""
    drafts: Mapping[str, Stage[draft.Settings]]
    """By the name of the model that drafts."""
    speed: Stage[speed.Settings] | None
    retention: Mapping[str, Stage[retention.Settings]]
    """By the name of the model; none where the recipe asks for none."""
    evaluations: Mapping[tuple[str, str], Stage[evaluate.Settings]]
    """By the name of the model and of the task."""

    @property
    def score(self) -> Stage[score.Settings] | None:
        """None where nothing that is measured chooses the blocks."""
        return self.cutting.score

    @property
    def loss(self) -> loss.LossStage | None:
        """The losses of candidates."""
        return self.cutting.loss

    @property
    def finals(self) -> Stage[finals.Settings] | None:
        """What chooses among cuts that were trained; None where none are."""
        return self.cutting.finalists[-1] if self.cutting.finalists else None

    @property
    def pruned(self) -> cut.CutStage:
        """The base without the chosen blocks."""
        return self.cutting.pruned

    @property
    def patched(self) -> Stage[patch.Settings] | None:
        """The pruned model with a linear patch: arms are trained from it where there is one."""
        return self.cutting.patched

    @property
    def own(self) -> Data:
        """The recipe's own rows."""
        return self.data[""]

    @property
    def distilled(self) -> Stage[distill.Settings] | None:
        """The rewrites of the recipe's own rows."""
        return self.own.distilled

    @property
    def trained(self) -> dict[str, Stage[train.Settings]]:
        """The models that are trained here, by name."""
        return {name: stage for name, stage in self.models.items() if isinstance(stage.settings, train.Settings)}

    @property
    def merged(self) -> dict[str, Stage[merge.Settings]]:
        """The models that are merged from others, by name."""
        kinds = (merge.SlerpSettings, merge.LinearSettings)
        return {name: stage for name, stage in self.models.items() if isinstance(stage.settings, kinds)}

    @property
    def exported(self) -> dict[str, Stage[export.Settings]]:
        """The models in other forms, by name and form."""
        return {name: stage for name, stage in self.models.items() if isinstance(stage.settings, export.Settings)}

    def tasks_of(self, name: str) -> dict[str, Stage[evaluate.Settings]]:
        """Return the evaluations of a model, by task."""
        return {task: stage for (model, task), stage in self.evaluations.items() if model == name}

    @cached_property
    def in_order(self) -> tuple[Stage[Any], ...]:
        """Every stage once, in the order in which they are built."""
        # Generation before training: an early failure costs less.
        generated = [stage for data in self.data.values() for stage in data.in_order]
        targets = filter(None, (stage.inputs.get("targets") for stage in self.trained.values()))
        stages = [self.base, *self.own.read, self.rows, *self.cutting.in_order, *generated]
        stages += [*targets, *self.models.values()]
        stages += [each for put in self.wholes.values() for each in (*put.inputs.values(), put)]
        stages += [*self.nll, *self.drafts.values(), *([self.speed] if self.speed else [])]
        stages += [given for stage in self.retention.values() for given in stage.inputs.values()]
        stages += [*self.retention.values(), *self.evaluations.values()]
        return tuple({stage.id: stage for stage in stages}.values())


def chain(recipe: Recipe) -> Chain:
    """Return every stage of a recipe, each with its inputs."""
    base = model.stage(recipe.model)
    own = read_sources(recipe.sources, recipe)
    made = cutting(recipe, base, own.rows)
    data = training_data(recipe, base, own)
    patched = {"patched": made.patched} if made.patched else {}
    models: dict[str, Stage[Any]] = {"base": base, "pruned": made.pruned, **patched}
    models |= tuned_models(recipe, base, made.patched or made.pruned, data)
    drafts = draft_stages(recipe, models, own)  # of no exported ones
    models |= export_stages(recipe, models)
    return Chain(
        base=base,
        rows=own.rows,
        cutting=made,
        data=data,
        models=models,
        wholes=whole_models(recipe, models),
        nll=nll_stages(recipe, base, data),
        drafts=drafts,
        speed=speed.stage(recipe.evaluate.dtype, base, made.pruned) if recipe.evaluate.speed else None,
        retention=retention_stages(recipe, models, own, made.corpora),
        evaluations=evaluation_stages(recipe, models, own),
    )


# --- from stages to artifacts ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Built:
    """The stages of a run."""

    new: tuple[Stage[Any], ...]
    reused: tuple[Stage[Any], ...]


def run(
    recipe: Recipe, compute: Compute, storage: Storage, until: str | None = None, engine: EngineFactory = start_engine
) -> Built:
    """Build every stage of a recipe that is not there yet, up to and including the stages named `until`."""
    check(recipe, compute)
    stages: Sequence[Stage[Any]] = chain(recipe).in_order
    if until is not None:
        stages = _up_to(stages, until)
    todo, _ = survey(stages, storage)
    precision.report_slow(todo, compute)
    teachers.require_endpoints(todo, storage)
    return build(stages, compute, storage, engine=engine)


def require_stage(until: str | None) -> None:
    """Raise UserError for a name that no stage has."""
    if until is not None and until not in MODULES:
        raise UserError(problem("--until", f"{until or 'an empty name'} is no stage", nearest(until, MODULES)))


def _up_to(stages: Sequence[Stage[Any]], until: str) -> Sequence[Stage[Any]]:
    """Return stages up to and including those of a kind; raises UserError where there are none."""
    names = [stage.name for stage in stages]
    if until not in names:
        do = f"Give one of {', '.join(dict.fromkeys(names))}"
        raise UserError(problem("--until", f"this recipe has no stage {until}", do))
    return stages[: len(names) - names[::-1].index(until)]


def build(
    stages: Sequence[Stage[Any]],
    compute: Compute,
    storage: Storage,
    validated: Validated = None,
    engine: EngineFactory = start_engine,
    sweep: str | None = None,
    at_once: int | None = None,
) -> Built:
    """Build every stage that is not there yet, in their order, on one cluster; what needs nothing of each other at the
    same time, where the nodes hold both.

    `validated` is called with the step and the loss of every validation of a training; `sweep` names the sweep that
    trackers show the trainings in; at_once: the most evaluations at a time, else as many as the cluster holds.
    """
    todo, done = survey(stages, storage)
    builder = Builder(MODULES, storage, compute, validated, engine, sweep, at_once or max(1, len(todo)))
    require_gates(done, storage)
    with storage.survey():
        for stage in done:
            storage.drop_pieces(stage)
    with contextlib.ExitStack() as stack:
        # As late as can be: mistakes in the rows show before a cluster starts.
        connect = functools.cache(lambda: stack.enter_context(ray_cluster(compute)))
        for pair in overlap.pairs(todo):
            builder.build(pair.first, connect)
            connect()
            beside = overlap.limit(pair, compute, live_nodes(), lambda name: MODULES[name].NEEDS)
            if beside.stages:
                with overlap.building(build, beside, storage, pair.here[0].name):
                    builder.build(pair.here, connect)
        builder.build(todo, connect)
    return Built(tuple(todo), tuple(done))


class Listed(NamedTuple):
    """What `sdft check` shows of a stage."""

    stage: str
    status: str
    directory: str


def describe(stages: Sequence[Stage[Any]], storage: Storage) -> list[Listed]:
    """Return the status and the directory of each stage."""
    with storage.survey():
        return [Listed(stage.name, storage.status(stage), storage.where(stage)) for stage in stages]
