"""How much quality a model kept: means and recovery.

In: scores of tasks. Out: the figures of the recovery table. Recovery is mean(model) / mean(base), unweighted over
tasks, as the paper has it; because a model that guesses also scores, the chance-corrected figure stands beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Score:
    """One model's result on one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    chance: float
    """What guessing scores, 0 for generated answers."""
    limited: bool


def mean_score(scores: Sequence[Score]) -> float:
    """Return the unweighted mean over tasks."""
    return sum(score.value for score in scores) / len(scores)


def recovery(scores: Sequence[Score], base: Sequence[Score]) -> float | None:
    """Return 100 * mean / mean of the base, or None where the base scores nothing."""
    below = mean_score(base)
    return 100 * mean_score(scores) / below if below else None


def recovery_over_chance(scores: Sequence[Score], base: Sequence[Score]) -> float | None:
    """Return recovery of what lies above chance, or None where the base itself does not."""
    chance = sum(score.chance for score in base) / len(base)
    below = mean_score(base) - chance
    return 100 * (mean_score(scores) - chance) / below if below > 0 else None
