"""The typed form of one recipe file: it says what is computed.

In: one complete YAML file and `--set` overrides. Out: a frozen `Recipe`, or a `UserError` with every problem of
the file at once, each with its dotted path. Every field here is part of an artifact's id, through a stage's settings.
The compute file (`compute.py`) says where and how something is computed, and is never hashed.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, field_validator, model_validator

from sdft_ray.spec.evaluation import Evaluate
from sdft_ray.spec.pruning import Prune
from sdft_ray.spec.section import LocalPath, Section, Seed, Share, require_distinct
from sdft_ray.spec.sources import (
    Filters,
    ModelSource,
    RewritingTemplate,
    RowSource,
    RowSources,
    ServedModel,
    TeacherSource,
    in_use,
)
from sdft_ray.spec.training import ARMS, Arm, ArmOverrides, Arms, Train


class Lookup(Section):
    """How words of the prompt are proposed as the next ones (prompt lookup, vLLM's `ngram`)."""

    tokens: int = Field(4, gt=0)
    """Tokens that are proposed at a time."""
    min: int = Field(2, gt=0)
    """The fewest last tokens that are looked up in the text before them."""
    max: int = Field(5, gt=0)
    """The most last tokens that are looked up."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min: {self.min} is above max. Lower it to {self.max}")
        return self


class Distill(Section):
    """How the unpruned model rewrites the references. Defaults: the published code of SDFT (arXiv 2402.13669)."""

    unhashed = ("max_attempts", "shift_rows", "max_failed_fraction")
    optional: ClassVar[tuple[str, ...]] = ("teacher", "seeds", "lookup")

    teacher: TeacherSource | None = None
    """Another model that rewrites instead of the base, also a quantised one or one behind an endpoint: it is not cut.
    Its rewrites are no self-distillation, and reports name it."""
    temperature: float = Field(0.95, ge=0)
    """Sampling temperature of the rewrites; 0 is greedy."""
    top_p: float = Field(0.7, gt=0, le=1)
    """Tokens are sampled from the smallest set whose probabilities sum to this."""
    max_new_tokens: int = Field(512, gt=0)
    """Tokens of one rewrite; a longer one counts as truncated and its reference is kept."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the teacher."""
    seed: Seed = 0
    """Moves the sampling seed of every row (a row's seed is derived from this and its id)."""
    seeds: Literal["row", "engine"] = "row"
    """How texts are drawn: `row` has a random generator for each row, so that its text does not depend on the rows
    beside it; `engine` has one for all, which saves a GPU one kernel for each row and step and is not repeatable."""
    lookup: Lookup | None = None
    """Propose tokens from the prompt, which holds the reference, and let the teacher judge several at once. The
    distribution of texts is the same; the texts are not, and a row's text is not repeatable."""
    template: RewritingTemplate | None = None
    """Your own rewriting instruction with {prompt} and {reference}; where absent, one that suits rows.answer."""
    template_options: dict[str, JsonValue] = Field({"enable_thinking": False})
    """Options of the chat template in rewriting prompts; a template ignores options that it does not know."""
    strip_thinking: bool = True
    """Take the thoughts (<think>…</think> and the like) off a rewrite before it is checked and trained on."""
    filters: Filters = Filters()
    samples: int = Field(1, gt=0)
    """Rewrites that are tried for a row: the next one is drawn only if all before it failed."""
    max_attempts: int = Field(3, gt=0)
    """How often the engine is asked for a sample that ends in an error, over all runs; each run asks at least once.
    A gate: it moves no id."""
    shift_rows: int = Field(64, ge=0)
    """Kept rows on which the stage `nll` measures the base model's likelihood of reference and rewrite; 0 leaves the
    stage out. It moves no other id."""
    max_failed_fraction: float = Field(0.01, ge=0, le=1)
    """The command stops where a larger fraction of rows ends in an engine error (generated rows are kept). A gate: it
    moves no id, and finished artifacts are compared with it, too."""

    @field_validator("template_options")
    @classmethod
    def _are_free(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        ours = {"tokenize", "return_dict", "add_generation_prompt", "continue_final_message", "strftime_now"}
        if taken := sorted(ours & {*value}):
            raise ValueError(f"{taken[0]} is set by sdft. Remove it")
        return value

    @model_validator(mode="after")
    def _looks_up_here(self) -> Self:
        if self.lookup and isinstance(self.teacher, ServedModel):
            raise ValueError("lookup: the endpoint proposes tokens as its server was told to. Remove lookup")
        return self


# Names that the report gives to models of its own.
MODEL_NAMES = ("base", "pruned", "patched", *ARMS, "slerp", "linear", "together")


class Parent(Section):
    """A further model to merge: the arm trained on other rows, or a model that was tuned elsewhere."""

    rows: RowSources | None = None
    """Rows that it is trained on, with the arm's settings and from the same pruned model; or a list of sources."""
    train: ArmOverrides = ArmOverrides()
    """What it trains with instead of the arm's settings."""
    path: LocalPath | None = None
    """Directory of a model that was tuned elsewhere from the same pruned model."""

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if (self.rows is None) == (self.path is None):
            raise ValueError("has neither or both of rows and path. Give exactly one of them")
        if self.path and self.train != ArmOverrides():
            raise ValueError("train: a model of a path is not trained. Remove train")
        return self


class Slerp(Section):
    """Merge two models along the arc between their weights."""

    t: Share | Annotated[tuple[Share, ...], Field(min_length=1)] = 0.5
    """How far from the first (0) to the second (1); or one number for each block of the pruned model. Tensors before
    the blocks then take the first number, tensors behind them the last."""


class Linear(Section):
    """Merge models into the mean of their weights."""

    weights: tuple[float, ...] | None = None
    """One weight for each model, relative to their sum; equal weights where absent."""

    @field_validator("weights")
    @classmethod
    def _have_a_sum(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and sum(value) <= 0:
            raise ValueError("have no positive sum. Raise one")
        return value


class Merge(Section):
    """Models that are merged: an arm of this recipe, and others from the same pruned model."""

    arm: Arm = "distilled"
    """The arm whose model is the first; models on other rows are trained with its settings."""
    others: dict[str, Parent] = Field(min_length=1)
    """The other models, in this order, by the names that the report gives them."""
    slerp: Slerp | None = None
    linear: Linear | None = None
    together: bool = False
    """Whether one model is also trained on all of the rows, to be compared with the merged ones."""

    @field_validator("others")
    @classmethod
    def _have_names_of_their_own(cls, value: dict[str, Parent]) -> dict[str, Parent]:
        for name in value:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in MODEL_NAMES:
                raise ValueError(f"'{name}' cannot name a model. Use another word in small letters")
        return value

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        count = 1 + len(self.others)
        if not (self.slerp or self.linear):
            raise ValueError("names no method. Give at least one of slerp, linear")
        if self.slerp and count != 2:
            raise ValueError(f"slerp: joins two models, here are {count}. Use linear")
        if self.linear and self.linear.weights and len(self.linear.weights) != count:
            raise ValueError(f"linear: has {len(self.linear.weights)} weights for {count} models. Give one for each")
        if self.together and any(parent.path for parent in self.others.values()):
            raise ValueError("together: the rows of a path are not known. Remove together")
        return self

    @property
    def methods(self) -> dict[str, Slerp | Linear]:
        """The methods, by the names of the merged models."""
        return {name: how for name, how in (("slerp", self.slerp), ("linear", self.linear)) if how is not None}


class Draft(Section):
    """Models that are tried as the draft of the unpruned one in speculative decoding; scores do not change."""

    models: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the models, as in the report; the pruned model and the arms' models where absent."""
    tokens: tuple[Annotated[int, Field(gt=0, le=32)], ...] = Field((2, 4, 8), min_length=1)
    """Numbers of drafted tokens at which tokens per second are measured. Acceptance is counted for every number up to
    the largest one."""
    prompts: int = Field(8, gt=0)
    """How many of the first held-out rows have their prompts answered."""
    at_once: int = Field(1, gt=0)
    """Prompts that are answered at a time. Drafting helps where the machine can compute more than these need."""
    max_new_tokens: int = Field(64, gt=0)
    """Tokens of one answer."""
    temperature: float = Field(0.7, gt=0)
    """Temperature of the sampled answers; greedy ones are measured, too."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Sampled answers take their tokens from the smallest set whose probabilities sum to this."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of target and draft. In float32 greedy text must be the target's own."""

    @model_validator(mode="after")
    def _is_distinct(self) -> Self:
        for name, values in (("models", self.models), ("tokens", self.tokens)):
            if values is not None and len({*values}) != len(values):
                raise ValueError(f"{name}: has a value twice. Remove one")
        return self


Format = Literal["f16", "bf16", "q8_0", "q4_k_m", "int8"]


class Export(Section):
    """Models that are also written in other forms, each of which takes the evaluations; other scores do not change."""

    models: Annotated[tuple[str, ...], AfterValidator(require_distinct)] | None = Field(None, min_length=1)
    """Names of the models, as in the report, `base` among them; the arms' models where absent."""
    formats: Annotated[tuple[Format, ...], AfterValidator(require_distinct)] = Field(min_length=1)
    """`f16`, `bf16`, `q8_0`, `q4_k_m`: a GGUF file, for llama.cpp; the last needs `pip install 'sdft-ray[q4]'`. `int8`:
    safetensors with weights and activations of 8 bits (compressed-tensors), for vLLM."""


class Recipe(Section):
    """One complete recipe."""

    model: ModelSource
    """The base: the model that is pruned, and that rewrites the references."""
    rows: RowSources
    """The rows that the pruned model is trained and evaluated on; or a list of sources, which are mixed."""
    prune: Prune
    distill: Distill = Distill()
    train: Train = Train()
    arms: Arms = Arms(sft=ArmOverrides(), distilled=ArmOverrides())
    merge: Merge | None = None
    draft: Draft | None = None
    export: Export | None = None
    evaluate: Evaluate

    @model_validator(mode="after")
    def _has_what_tasks_need(self) -> Self:
        held_out = sum(source.held_out for source in self.sources)
        checkable = any(source.held_out and source.answer != "none" for source in self.sources)
        if self.evaluate.pass_at and not checkable:
            raise ValueError("evaluate.pass_at: needs held-out rows with checkable answers. Remove evaluate.pass_at")
        if "held_out" in self.evaluate.tasks:
            if held_out == 0:
                raise ValueError("evaluate.tasks: names held_out, but rows.held_out is 0. Raise rows.held_out")
            if not checkable:
                what = "held_out needs checkable rows, but rows.answer is none"
                raise ValueError(f"evaluate.tasks: {what}. Remove held_out")
        elif self.evaluate.pass_at:
            raise ValueError("evaluate.pass_at: belongs to held_out, which is no task. Add held_out to evaluate.tasks")
        if (kept := self.evaluate.retention) and not (kept.texts or min(kept.rows, held_out)):
            what = "has neither held-out rows nor texts to measure on"
            raise ValueError(f"evaluate.retention: {what}. Raise rows.held_out or evaluate.retention.texts")
        return self

    @model_validator(mode="after")
    def _has_what_models_need(self) -> Self:
        trained = {"rows": self.sources, **{f"merge.others.{name}.rows": rows for name, rows in self.others.items()}}
        unmeasured = [key for key, rows in trained.items() if not any(source.validation for source in rows)]
        for name, wanted in (("patience", self.train.patience), ("keep", self.train.keep == "best")):
            if wanted and unmeasured:
                where = f"{unmeasured[0]}.validation"
                raise ValueError(f"train.{name}: needs validation rows, but {where} is 0. Raise {where}")
        if self.merge and self.merge.arm not in self.arms.names:
            raise ValueError(f"merge.arm: {self.merge.arm} is not among the arms. Add arms.{self.merge.arm}")
        to_ask = [source for source in self.sources if not getattr(source, "plain", False)]
        if self.draft and self.draft.prompts > (asked := sum(source.held_out for source in to_ask)):
            what = f"{self.draft.prompts} is more than the {asked} held-out rows with prompts"
            raise ValueError(f"draft.prompts: {what}. Lower draft.prompts")
        if self.arms.distilled and not to_ask:
            raise ValueError("arms.distilled: no row is rewritten, for all are plain. Set arms: {sft: {}}")
        return self

    @property
    def sources(self) -> tuple[RowSource, ...]:
        """The sources of rows that are in use."""
        return in_use(self.rows)

    @property
    def others(self) -> dict[str, tuple[RowSource, ...]]:
        """The sources of other models that are trained here to be merged, by the names of these."""
        others = self.merge.others if self.merge else {}
        return {name: in_use(other.rows) for name, other in others.items() if other.rows is not None}

    def train_settings(self, arm: str, other: str | None = None) -> Train:
        """Return the training settings of an arm: the common ones with the arm's overrides, and those of another
        model that is merged with it."""
        overrides = [getattr(self.arms, arm)]
        if other and self.merge:
            overrides.append(self.merge.others[other].train)
        settings = dict(self.train)
        for own in overrides:
            settings |= {name: value for name, value in own if value is not None and name in ArmOverrides.model_fields}
        return Train(**settings)
