"""Shares of a list of work that several workers take one after another, so that all end at nearly the same time.

In: how much there is, and how many work on it. Out: the size of each share, smaller towards the end: half of what each
worker would still have to do. A worker that is late, slow or dead then costs little (guided self-scheduling,
Polychronopoulos and Kuck 1987, with half of their shares: those who begin late leave more to the others).
"""

from __future__ import annotations

from collections.abc import Iterator


def shares(count: int, workers: int, most: int, least: int) -> Iterator[range]:
    """Yield ranges that cover 0 … count; of `most` at most, and where several work of no less than `least`.

    >>> [len(some) for some in shares(100, 2, 20, 8)], [len(some) for some in shares(100, 1, 40, 8)]
    ([20, 20, 15, 12, 9, 8, 8, 8], [40, 40, 20])
    """
    start = 0
    while start < count:
        left = count - start
        size = most if workers == 1 else min(most, max(least, -(-left // (2 * workers))))
        yield range(start, min(start + size, count))
        start += size
