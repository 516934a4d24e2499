"""The blocks that would go: what scoring chooses, stages keep and reports show. Without torch."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Choice:
    """The blocks of one size that matter least."""

    blocks: tuple[int, ...]
    """0-based, ascending."""
    value: float
    """Their cost: mean distance, summed influence, or loss."""
    runner_up: tuple[int, ...] | None
    """The next best; None where there is no other."""
    agreement: float
    """Fraction of bootstrap samples of the texts that choose the same blocks."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate, and the loss without its blocks."""

    blocks: tuple[int, ...]
    loss: float


@dataclasses.dataclass(frozen=True)
class JointChoice(Choice):
    """The blocks that matter least to all corpora together."""

    shared: float
    """Share of its blocks that every corpus alone would choose too, by their number."""
