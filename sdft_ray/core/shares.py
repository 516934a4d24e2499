"""Shares of a list of work that several workers take one after another.

In: how much there is, and how many work on it. Out: ranges as long as may be. An engine runs empty at the end of each
share, while it still takes as long for a step, so shares that shrink towards the end cost more than workers that wait
(docs/results.md).
"""

from __future__ import annotations

from collections.abc import Iterator


def shares(count: int, workers: int, most: int) -> Iterator[range]:
    """Yield ranges that cover 0 … count, of `most` at most, and one for each worker where that is enough.

    >>> [len(some) for some in shares(100, 2, 60)], [len(some) for some in shares(100, 2, 40)], [*shares(0, 2, 40)]
    ([50, 50], [40, 40, 20], [])
    """
    size = max(1, min(most, -(-count // workers)))
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
