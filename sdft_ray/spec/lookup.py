"""Prompt lookup: the teacher's next tokens are proposed from the text before them."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from sdft_ray.spec.section import Section


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
