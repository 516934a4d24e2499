"""Measures of the quality that a model kept: means, recovery, and the interval of a difference of two models.

In: scores of tasks, values of items. Out: the figures of the recovery table. Recovery is mean(model) / mean(base),
unweighted over tasks, as in the paper; because a model that guesses also scores, the chance-corrected figure stands
beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class Score(Protocol):
    """One model's result on one task."""

    @property
    def value(self) -> float: ...
    @property
    def chance(self) -> float: ...


def mean_score(scores: Sequence[Score]) -> float:
    """Return the unweighted mean over tasks."""
    return sum(score.value for score in scores) / len(scores)


def mean_error(errors: Sequence[float | None]) -> float | None:
    """Return the standard error of the unweighted mean over tasks from those of the tasks, whose items are others;
    None where one is not known."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None


def recovery(scores: Sequence[Score], base: Sequence[Score]) -> float | None:
    """Return 100 * mean / mean of the base, or None where the base scores nothing."""
    below = mean_score(base)
    return 100 * mean_score(scores) / below if below else None


def recovery_over_chance(scores: Sequence[Score], base: Sequence[Score]) -> float | None:
    """Return recovery of the scores above chance, or None where the base is not above chance."""
    chance = sum(score.chance for score in base) / len(base)
    below = mean_score(base) - chance
    return 100 * (mean_score(scores) - chance) / below if below > 0 else None


@dataclasses.dataclass(frozen=True)
class Difference:
    """The advantage of one model over another on the same items, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Items; of a mean over tasks, the items of all tasks."""


def paired_differences(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]], draws: int = 2000, seed: int = 0
) -> tuple[dict[str, Difference], Difference]:
    """Return first - second of each task, and of the unweighted mean over tasks, by a paired bootstrap over items.

    first, second: the value of every item of every task, in the same order. Items are drawn again task by task, the
    same for both: the difficulty of an item does not widen the interval.
    """
    random = np.random.default_rng(seed)
    by_task: dict[str, Difference] = {}
    drawn = []
    for task, values in first.items():
        assert len(values) == len(second[task]) > 0, f"{task} has other items for the other model"
        gain = np.asarray(values, float) - np.asarray(second[task], float)
        means = np.array([gain[random.integers(0, len(gain), len(gain))].mean() for _ in range(draws)])
        by_task[task] = _difference(float(gain.mean()), means, len(gain))
        drawn.append(means)
    value = sum(difference.value for difference in by_task.values()) / len(by_task)
    return by_task, _difference(value, np.mean(drawn, axis=0), sum(difference.n for difference in by_task.values()))


def _difference(value: float, means: Any, n: int) -> Difference:
    low, high = np.percentile(means, (2.5, 97.5))
    return Difference(value, float(low), float(high), n)
