"""Which depth to train next, where the deepest cut that keeps enough is looked for.

In: a cheap signal of every depth, what was measured of those that were trained, and the goal. Out: the next depth, or
none at the end. What a depth keeps is taken to fall as its signal rises, at a rate that is not known: a Gaussian
process with a random slope, and a random walk along the signal. From it follows how likely the boundary lies behind
each depth, and from that the order of least expected trainings among those that never take more than one above halving.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

# Points of recovery and nats a token. A nat costs SmolLM2-135M-Instruct about 6 points once it was trained, at 5 and at
# 10 of 30 blocks (docs/results.md). Others differ, so the slope is as uncertain as it is large.
START, START_ERROR = 98.0, 2.0  # the lower end of an interval with nothing removed
SLOPE, SLOPE_ERROR = 6.0, 6.0
WALK = 3.0  # departure from the line within a nat
NOISE = 1.0  # of a measurement
EVEN = 0.1  # of the probability is spread over all depths: signals can mislead


def following(signals: Sequence[float] | None, measured: Mapping[int, float], goal: float, count: int) -> int | None:
    """Return the number of the depth to train next, from 0 for the shallowest; None at the end.

    count: of depths. signals: the loss that each costs untrained, in nats a token; without them the middle comes next.
    measured: what the trained ones keep; it meets the goal where it is no less.
    """
    first = max((i + 1 for i, kept in measured.items() if kept >= goal), default=0)
    last = min((i for i, kept in measured.items() if kept < goal and i >= first), default=count)
    if first == last:  # the boundary: the number of depths that meet the goal
        return None
    likely = [1 / (last - first + 1)] * (last - first + 1)
    if signals:
        meets = _chances([*itertools.accumulate(signals, max)], measured, goal)[first:last]
        inside = itertools.pairwise([1.0, *itertools.accumulate(meets, min), 0.0])
        likely = [
            EVEN * even + (1 - EVEN) * (above - below) for even, (above, below) in zip(likely, inside, strict=True)
        ]

    @functools.cache
    def cost(low: int, high: int, left: int) -> tuple[float, int]:
        """Return the least expected number of trainings, weighed by the probability, that find a boundary from `low` to
        `high` with at most `left`, and the first of them."""
        if low == high:
            return 0.0, low
        if 2**left < high - low + 1:
            return math.inf, low
        rest = [cost(low, i, left - 1)[0] + cost(i + 1, high, left - 1)[0] for i in range(low, high)]
        best = min(range(high - low), key=lambda i: (rest[i], abs(2 * i + 1 - (high - low))))  # the middle in a tie
        return sum(likely[low - first : high - first + 1]) + rest[best], low + best

    return cost(first, last, most_trainings(count) - len(measured))[1]


def most_trainings(depths: int) -> int:
    """Return how many trainings a search takes at most: one more than halving, for what it saves on average.

    >>> most_trainings(7)
    4
    """
    return halvings(depths) + (depths > 2)


def halvings(depths: int) -> int:
    """Return how many trainings a search takes at most that halves."""
    return math.ceil(math.log2(depths + 1))


def _chances(signals: Sequence[float], measured: Mapping[int, float], goal: float) -> list[float]:
    """Return how likely each depth meets the goal, given what was measured; signals never fall."""
    import numpy as np

    places = np.array(signals)
    prior = START - SLOPE * places
    spread = START_ERROR**2 + SLOPE_ERROR**2 * np.outer(places, places) + WALK**2 * np.minimum.outer(places, places)
    known = [*measured]
    if known:
        seen = spread[np.ix_(known, known)] + NOISE**2 * np.eye(len(known))
        gain = np.linalg.solve(seen, spread[known]).T  # (depths, known)
        prior = prior + gain @ (np.array([measured[i] for i in known]) - prior[known])
        spread = spread - gain @ spread[known]
    errors = np.sqrt(np.maximum(spread.diagonal(), 0) + NOISE**2)
    return [1 - NormalDist(float(mean), float(error)).cdf(goal) for mean, error in zip(prior, errors, strict=True)]
