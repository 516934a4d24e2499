"""The section of a recipe on sampled answers to held-out rows."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from sdft_ray.spec.section import Section, require_distinct


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
