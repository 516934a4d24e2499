"""What reports show: the report of a recipe, as records; sweep_entries.py has that of a sweep.

In: nothing. Out: types that the terminal tables, `--json`, `--csv` and the HTML pages are all views of, so that they
cannot disagree. The JSON is the records' own: a field that has no value in some entry is absent there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from sdft_ray.core.recovery import Estimate
from sdft_ray.generated import Habits, Sampled
from sdft_ray.results import Distances, Score, Step
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
    tasks: dict[str, Estimate]
    mean: Estimate


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
    pass_at: dict[int, Sampled] | None = None
    """By the number of answers, where the recipe asks for it."""


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
    against: dict[str, Estimate]
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
