"""What reports show: the report of a recipe and that of a sweep, as records.

In: nothing. Out: types that the terminal tables, `--json`, `--csv` and the HTML pages are all views of, so that they
cannot disagree. The JSON is the records' own: a field that has no value in some entry is absent there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field

from sdft_ray.core.recovery import Difference, Estimate
from sdft_ray.generated import Habits
from sdft_ray.results import Cut, Distances, Drafting, Gain, Score, Step
from sdft_ray.stages.cut import Summary as Pruned
from sdft_ray.stages.distill import SourceSummary as Rewrites
from sdft_ray.stages.distill import Summary as Selection
from sdft_ray.stages.draft import Summary as Draft
from sdft_ray.stages.export import Summary as Exported
from sdft_ray.stages.finals import Summary as Finals
from sdft_ray.stages.loss import GreedySummary as Greedy
from sdft_ray.stages.loss import Summary as Losses
from sdft_ray.stages.merge import Summary as Merged
from sdft_ray.stages.mix import Source as MixedSource
from sdft_ray.stages.nll import SourceLikelihoods as SourceNll
from sdft_ray.stages.nll import Summary as Nll
from sdft_ray.stages.retention import Summary as Retention
from sdft_ray.stages.speed import Summary as Speed
from sdft_ray.stages.train import Summary as Trained
from sdft_ray.store.manifest import Provenance
from sdft_ray.store.record import Flat, Record


class Quality(Record):
    """A model's scores, their mean, and how much of the base's that is."""

    tasks: dict[str, Score]
    mean: float
    recovery: float | None
    """In percent; None where the base scores nothing."""
    recovery_over_chance: float | None
    limited: bool
    """Whether some score is of part of its task."""


class Cost(Record):
    """What a model costs on paper."""

    parameters: int
    flops_per_token: float
    """Forward, at a length of `flops_tokens`."""


class Comparison(Record):
    """How much better one arm does than the other on the same items."""

    first: str
    second: str
    tasks: dict[str, Difference]
    mean: Difference


# --- a recipe -------------------------------------------------------------------------------------------------


class ModelEntry(Flat):
    """A model of a recipe."""

    flat = ("quality", "cost")
    model: str
    id: str
    quality: Quality
    cost: Cost
    retention: Retention | None = None
    """Where the recipe asks for it."""
    generated: Habits | None = None
    """How it answers held-out rows, where those are a task."""


class RetentionComparison(Record):
    """How much nearer to the base one arm stays than the other, on the same texts."""

    first: str
    second: str
    figures: dict[str, Estimate]
    """By their names in a model's retention, such as `kl_responses`."""


class MergeEntry(Flat):
    """A merged model."""

    flat = ("merged",)
    models: tuple[str, ...]
    """That it was merged from."""
    against: dict[str, Difference]
    """What it gained over other models, in the mean over tasks."""
    merged: Merged


class Training(NamedTuple):
    """How a training went."""

    curve: Sequence[Step]
    summary: Trained


class Example(NamedTuple):
    """A row, reference and rewrite side by side."""

    reason: str
    prompt: str
    reference: str
    generated: str


class Artifact(NamedTuple):
    """Where a stage's artifact is."""

    stage: str
    directory: str


class Details(Record):
    """What only the page and the sentences below the table show."""

    distances: Distances | None
    """None where nothing was measured to choose blocks."""
    losses: Losses | None
    greedy: Greedy | None
    finals: Finals | None = None
    """Where cuts were trained before one was chosen."""
    cut: Pruned
    selection: Selection | None
    examples: Sequence[Example]
    """A few rows for every reason."""
    nll: Nll | None
    trainings: dict[str, Training]
    seconds: dict[str, float]
    """Of each kind of stage."""
    provenance: Provenance
    """Of the last stage."""
    artifacts: Sequence[Artifact]
    settings: Mapping[str, Any]
    """The recipe."""


class SourceEntry(Record):
    """One of several sources of rows: what the mixture takes of it, and what came of that."""

    mixed: MixedSource
    rewrites: Rewrites | None = None
    nll: SourceNll | None = None
    exact_match: dict[str, float] = Field(default_factory=dict)
    """On its held-out rows, by model; none where its answers are not checked."""
    loss: dict[str, float] = Field(default_factory=dict)
    """The last one of its training rows, by arm."""
    validation_loss: dict[str, float] = Field(default_factory=dict)
    """The last one on its validation rows, by arm."""


class Report(Record):
    """What a run came to."""

    recipe: str
    flops_tokens: int
    models: tuple[ModelEntry, ...]
    """The base first."""
    comparison: Comparison | None
    """Of the first two arms; None where there is one only."""
    retention: tuple[RetentionComparison, ...] = ()
    """Of each arm with the one before it."""
    speed: Speed | None
    merges: dict[str, MergeEntry]
    drafts: dict[str, Draft]
    exports: dict[str, Exported] = Field(default_factory=dict)
    """By the name of the exported model."""
    sources: tuple[SourceEntry, ...] = ()
    """Where there are several."""
    further_comparisons: tuple[Comparison, ...] = ()
    """Of each further arm with the one before it, and of each exported model with what it was made of."""
    details: Details = Field(exclude=True)

    @property
    def compared(self) -> tuple[Comparison, ...]:
        """Every two arms that are compared."""
        return (*([self.comparison] if self.comparison else []), *self.further_comparisons)

    @property
    def base(self) -> ModelEntry:
        return self.models[0]

    @property
    def tasks(self) -> list[str]:
        return list(self.base.quality.tasks)


# --- a sweep --------------------------------------------------------------------------------------------------


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


class Place(Record):
    """Where something lies in a sweep."""

    arm: str
    blocks: int
    rows: int | None
    """None: not trained."""
    values: dict[str, Any]
    """Of the other axes."""

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
    """Whether it has the lowest validation loss among those of one recipe, arm, depth and size."""


class SweepComparison(Flat):
    """How much better an arm does than the one before it at one depth and size."""

    flat = ("compared",)
    recipe: str | None
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
    def limited(self) -> bool:
        return any(model.quality.limited for model in self.models)
