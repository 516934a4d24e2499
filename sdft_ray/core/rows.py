"""A row: as text, and as the trainer sees it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


class Row(NamedTuple):
    """A prompt with its reference."""

    prompt: str
    reference: str
    answer: str | None = None
    """The final answer; of a raw row what the source has a column for."""
    id: str = ""
    """A hash of the content, once it is decided which rows exist."""


@dataclasses.dataclass(frozen=True)
class TrainingRow:
    """A row as the model sees it in training."""

    ids: list[int]
    """Prompt, response and end of turn."""
    trained_from: int
    """Index of the first token that carries loss."""
