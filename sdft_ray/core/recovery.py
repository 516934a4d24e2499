"""Measures of the quality that a model kept: means, recovery, and the intervals of figures and of their differences.

In: scores of tasks, values of items, sums over texts. Out: the figures of the recovery table. Recovery is mean(model) /
mean(base), unweighted over tasks, as in the paper; because a model that guesses also scores, the chance-corrected
figure stands beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

DRAWS = 2000
"""Bootstrap samples of an interval."""


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
    """Return 100 * mean / mean of the base, or None where the base scores nothing or less."""
    below = mean_score(base)
    return 100 * (mean_score(scores) / below) if below > 0 else None  # the base itself has 100.0 to the last bit


def recovery_over_chance(scores: Sequence[Score], base: Sequence[Score]) -> float | None:
    """Return recovery of the scores above chance, or None where the base is not above chance."""
    chance = sum(score.chance for score in base) / len(base)
    below = mean_score(base) - chance
    return 100 * ((mean_score(scores) - chance) / below) if below > 0 else None


def pass_at(k: int, samples: int, right: int) -> float:
    """Return the chance that one of k answers is right, without bias, where `right` of n samples are.

    1 - C(n - c, k) / C(n, k), the share of k of the samples with a right one among them (Chen et al. 2021,
    arXiv 2107.03374).
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure, or the difference of two models' on the same items, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Items or texts; of a mean over tasks, the items of all tasks."""


def ratio(sums: Sequence[float], counts: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Return sum(sums) / sum(counts) over texts, such as nats over tokens, with the interval of a bootstrap over texts.

    Tokens of one text are not independent, so texts are drawn again, whole. With differences of two models as sums, and
    what both were measured on as counts, it is the paired interval of the difference.
    """
    random = np.random.default_rng(seed)
    above, below = np.asarray(sums, float), np.asarray(counts, float)
    assert len(above) == len(below) > 0, "every text has a sum and a count"
    drawn = (random.integers(0, len(above), len(above)) for _ in range(draws))
    interval = _interval([above[texts].sum() / below[texts].sum() for texts in drawn])
    return Estimate(float(above.sum() / below.sum()), *interval, len(above))


def paired_differences(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]
) -> tuple[dict[str, Estimate], Estimate]:
    """Return first - second of each task, and of the unweighted mean over tasks, by a paired bootstrap over items.

    first, second: the value of every item of every task, in the same order. Items are drawn again task by task, the
    same for both: the difficulty of an item does not widen the interval.
    """
    random = np.random.default_rng(0)
    by_task: dict[str, Estimate] = {}
    drawn = []
    for task, values in first.items():
        assert len(values) == len(second[task]) > 0, f"{task} has other items for the other model"
        gain = np.asarray(values, float) - np.asarray(second[task], float)
        (means,) = _draw_means(random, DRAWS, gain)
        by_task[task] = Estimate(float(gain.mean()), *_interval(means), len(gain))
        drawn.append(means)
    value = sum(difference.value for difference in by_task.values()) / len(by_task)
    n = sum(difference.n for difference in by_task.values())
    return by_task, Estimate(value, *_interval(np.mean(drawn, axis=0)), n)


def recovery_interval(
    model: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]], draws: int = DRAWS, seed: int = 0
) -> Estimate | None:
    """Return the recovery in percent with its 95 % interval, by a paired bootstrap over items; None where the base
    scores nothing.

    model, base: the value of every item of every task, in the same order.
    """
    random = np.random.default_rng(seed)
    pairs = [(np.asarray(model[task], float), np.asarray(values, float)) for task, values in base.items()]
    means = sum(_draw_means(random, draws, *pair) for pair in pairs)
    below = sum(values.mean() for _, values in pairs)
    if below <= 0:
        return None
    means = means[:, means[1] > 0]  # few items may be drawn so that the base has none of them right
    value = 100 * (sum(values.mean() for values, _ in pairs) / below)
    return Estimate(float(value), *_interval(100 * (means[0] / means[1])), sum(len(values) for values, _ in pairs))


def _draw_means(random: np.random.Generator, draws: int, *columns: Any) -> Any:
    """Return the means (columns, draws) over items that are drawn again, the same ones for every column (items)."""
    n = len(columns[0])
    assert {len(column) for column in columns} == {n} and n, "all have the same items"
    chosen = (random.integers(0, n, n) for _ in range(draws))
    return np.array([[column[items].mean() for column in columns] for items in chosen]).T


def _interval(values: Any) -> tuple[float, float]:
    """Return the ends of the 95 % interval of what was drawn."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
