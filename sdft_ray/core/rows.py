"""A row as the trainer sees it: token ids, and where the trained part begins."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TrainingRow:
    """A row as the model sees it in training."""

    ids: list[int]
    """Prompt, response and end of turn."""
    trained_from: int
    """Index of the first token that carries loss."""
