"""What reports of sweeps show, as records: the models, trials and comparisons of all of its recipes.

In: nothing. Out: types beside those of a recipe's report (entries.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field

from sdft_ray.core.surgery import name_blocks
from sdft_ray.report.entries import Comparison, Cost, Quality
from sdft_ray.results import Cut, Distances, Drafting, Gain
from sdft_ray.stages.retention import Summary as Retention
from sdft_ray.stages.speed import Summary as Speed
from sdft_ray.store.record import Flat, Record
from sdft_ray.sweep.planning import RECIPE


class SweepModel(Flat):
    """A base, a pruned or a patched model of a sweep."""

    flat = ("cut", "quality", "cost")
    model: Literal["base", "pruned", "patched"]
    slug: str
    blocks: int
    """That were removed."""
    directory: str | None = None
    cut: Cut | None = None
    speed: Speed | None
    id: str
    quality: Quality
    cost: Cost
    retention: Retention | None = None


class SourceResult(Record):
    """What came of one of several sources of rows in a trial, or in the mean of several: the rows that were trained on,
    the share of what could be rewritten that was kept, the last losses, and the score on its held-out rows."""

    rows: float
    rewrites_kept: float | None
    loss: float | None
    validation_loss: float | None
    exact_match: float | None


class TrialResult(Flat):
    """What came of a trial."""

    flat = ("quality", "cost")
    validation_loss: float | None
    seconds: float
    """Of its training."""
    quality: Quality
    cost: Cost
    retention: Retention | None = None
    sources: dict[str, SourceResult] = Field(default_factory=dict)
    """By name, where there are several."""


class SpeedFigures(Drafting):
    """How fast a draft makes the base."""

    speedup: float
    """The mean over seeds, and the range over runs."""
    speedup_min: float
    speedup_max: float


class DraftFigures(Gain, SpeedFigures):
    """What a draft brings for one kind of text, with the best measured number of tokens."""

    acceptance_error: float
    """The standard error; it and the acceptance itself are counted with the largest number of tokens."""


class DraftWorth(Record):
    """What a draft, or several that differ in their seeds, are worth."""

    cost: float
    """Time of a draft's token over the base's."""
    greedy: DraftFigures
    sampled: DraftFigures

    @property
    def texts(self) -> dict[str, DraftFigures]:
        return {"greedy": self.greedy, "sampled": self.sampled}


def _is_apart(path: str) -> bool:
    """Return whether values of an axis make validation losses that do not compare: other bases, or other rows."""
    section, *fields = path.split(".")
    return section in (RECIPE, "model") or (section == "rows" and not {*fields} & {"weight", "template", "filters"})


class Place(Record):
    """Where something lies in a sweep."""

    arm: str
    blocks: int
    rows: int | None
    """None: not trained."""
    values: dict[str, Any]
    """Of the other axes."""

    @property
    def of(self) -> str:
        """The recipe, the base and the rows, where a sweep has several: settings are chosen within one of them, because
        validation losses compare within one."""
        return ", ".join(str(value) for path, value in self.values.items() if _is_apart(path))

    @property
    def name(self) -> str:
        """The arm, and what else it was trained with."""
        return ", ".join([self.arm, *(f"{path} {value}" for path, value in self.values.items())])


class TrialEntry(Flat, Place):
    """A trial."""

    flat = ("result",)
    id: str
    directory: str
    status: Literal["done", "stopped", "failed", "missing"]
    reason: str | None
    pruned: str
    """Id of the model that was trained."""
    result: TrialResult | None
    draft: DraftWorth | None


class Group(Place):
    """Finished trials that differ in their seeds alone; figures are means over them."""

    trials: tuple[int, ...]
    """Their numbers in the report."""
    mean: float
    recovery: float | None
    recovery_sd: float | None
    """None for a single trial."""
    recovery_over_chance: float | None
    validation_loss: float | None
    parameters: int
    retention: dict[str, float] = Field(default_factory=dict)
    """Its figures by their names, where the recipe asks for it."""
    sources: dict[str, SourceResult] = Field(default_factory=dict)
    pruned: str
    limited: bool
    chosen: bool = False
    """Whether it has the lowest validation loss among those of one recipe, base and rows, arm, depth and
    size."""


class SweepComparison(Flat):
    """How much better an arm does than the one before it at one depth and size."""

    flat = ("compared",)
    recipe: str | None
    """And the base and the rows, where there are several."""
    blocks: int
    rows: int
    seeds: dict[str, int]
    """How many, by arm."""
    compared: Comparison


class DraftEntry(Flat, Place):
    """A pruned model or a group of trials as a draft of the base."""

    flat = ("worth",)
    chosen: bool
    drafts: int
    """How many were measured."""
    worth: DraftWorth


class Untried(Record):
    """A draft that is still to be tried."""

    draft: str
    status: Literal["failed", "missing"]
    reason: str | None


class Map(NamedTuple):
    """A scoring, and the blocks that were removed by it."""

    distances: Distances
    removed: Sequence[Sequence[int]]


class GoalEntry(Record):
    """How far the search for the depth that a goal asks for is."""

    wanted: str
    """What it asks for."""
    keeps: bool
    """Whether that is quality, which the lower end of an interval must reach: then the deepest cut is looked for, else
    the least deep one."""
    arm: str
    chosen: int | None
    """Blocks that go; None where no depth reaches the goal, or where the search goes on."""
    following: int | None
    """The depth that is tried next."""
    depths: tuple[int, ...]
    """All that could be tried."""
    lines: tuple[str, ...]
    """What came of each depth that was tried, in their order."""


class SweepReport(Record):
    """What a sweep has come to so far."""

    sweep: str
    axes: tuple[str, ...]
    tasks: tuple[str, ...]
    models: tuple[SweepModel, ...]
    """Bases, then pruned models."""
    trials: tuple[TrialEntry, ...]
    groups: tuple[Group, ...]
    comparisons: tuple[SweepComparison, ...]
    drafts: tuple[DraftEntry, ...]
    untried: tuple[Untried, ...]
    maps: Sequence[Map] = Field(exclude=True)
    flops_tokens: int
    goal: GoalEntry | None = None
    teachers: tuple[str, ...] = ()
    """The models that rewrite, where they are not the base."""

    @property
    def base(self) -> SweepModel:
        return self.models[0]

    @property
    def pruned(self) -> list[SweepModel]:
        return [model for model in self.models if model.model == "pruned"]

    @property
    def has_one_base(self) -> bool:
        return sum(model.model == "base" for model in self.models) == 1

    def name_model(self, model: SweepModel) -> str:
        """Return how an untrained model is called: with its own name where there are several bases, and with its blocks
        or its id where it shares that name."""
        name = model.model if self.has_one_base else f"{model.model}, {model.slug}"
        alike = [each for each in self.models if (each.model, each.slug) == (model.model, model.slug)]
        removed = {each.cut.removed for each in alike if each.cut}
        if len(alike) == 1:
            return name
        return f"{name}, {name_blocks(model.cut.removed) if model.cut and len(removed) == len(alike) else model.id}"

    @property
    def limited(self) -> bool:
        return any(model.quality.limited for model in self.models)
