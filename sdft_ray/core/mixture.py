"""The order in which rows of several sources are mixed.

In: how many rows each source has, and its weight. Out: the number of the source at each place. Of the sources that lag
behind their share, the one whose next row is due first comes next (Tijdeman 1980): no prefix then differs from the
shares by as much as one row of any source. To take the source that lags most is simpler, but lets several small ones
wait at once: with seven sources some lagged by more than a row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

from sdft_ray.core.rows import Row


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Return weights as the smallest whole numbers of the same proportions.

    >>> whole_shares([0.5, 1.5, 1])
    (1, 3, 2)
    """
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [int(weight * math.lcm(*(each.denominator for each in exact))) for weight in exact]
    return tuple(share // (math.gcd(*whole) or 1) for share in whole)


def next_source(taken: Sequence[int], shares: Sequence[int]) -> int:
    """Return the source of the next place where so many rows of each were taken; of several that are due, the first."""
    total, place = sum(shares), sum(taken) + 1
    return _next(taken, shares, total, place)


def _next(taken: Sequence[int], shares: Sequence[int], total: int, place: int) -> int:
    due = -1
    for i, share in enumerate(shares):
        # It lags where taken < share * place / total; its next row is due at place (taken + 1) * total / share.
        lags = taken[i] * total < share * place
        if lags and (due < 0 or (taken[i] + 1) * shares[due] < (taken[due] + 1) * share):
            due = i
    return due


def interleave(counts: Sequence[float], shares: Sequence[int]) -> Iterator[int]:
    """Yield the source of each place, up to where the one that comes next has no row left; nothing without shares.

    counts: rows of each source; infinity where they have no known end.
    """
    taken, total = [0] * len(shares), sum(shares)
    for place in itertools.count(1):
        source = _next(taken, shares, total, place)
        if source < 0 or taken[source] == counts[source]:
            return
        taken[source] += 1
        yield source


def mixture_size(counts: Sequence[float], shares: Sequence[int] | None) -> float:
    """Return how many rows a mixture has; without shares all of them are used. Every share is above 0."""
    if shares is None or math.isinf(min(counts)):
        return sum(counts)
    # After as many places as the shares sum to, each source has given exactly its share: whole rounds need no counting.
    rounds = min(int(count // share) for count, share in zip(counts, shares, strict=True) if count < math.inf)
    left = [count - rounds * share for count, share in zip(counts, shares, strict=True)]
    return rounds * sum(shares) + sum(1 for _ in interleave(left, shares))


def join_rows(sources: Sequence[Sequence[Row]]) -> list[Row]:
    """Return the rows of several sources as one list, evenly mixed, each with the number of its source.

    Of rows that ask the same the one of the earliest source stays.
    """
    seen: set[str] = set()
    kept: list[list[Row]] = []
    for number, rows in enumerate(sources):
        kept.append([row._replace(origin=number) for row in rows if row.key not in seen])
        seen |= {row.key for row in rows}
    counts = [len(rows) for rows in kept]
    each = [iter(rows) for rows in kept]
    return [next(each[source]) for source in interleave(counts, counts)]
