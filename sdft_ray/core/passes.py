"""What it costs to try every block at every step: the work of removing blocks one after the other.

In: the numbers of blocks. Out: forward passes of the whole model that the same work would be.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Passes:
    """The forward passes over the loss texts that a search takes."""

    candidates: int
    """Removals that are tried, over all steps."""
    passes: float
    """Each goes on from the state before its block; in whole passes of the base."""
    from_the_start: float
    """If each began at the first block."""


def count_passes(blocks: int, depth: int, first: int = 0, last: int = 0) -> Passes:
    """Return the cost of removing `depth` of so many blocks one after the other, the first and last ones being kept.

    >>> count_passes(3, 1)
    Passes(candidates=3, passes=2.0, from_the_start=3.0)
    """
    candidates = run = alone = 0
    for remaining in range(blocks, blocks - depth, -1):
        places = range(first, remaining - last)
        candidates += len(places)
        run += remaining + sum(remaining - 1 - place for place in places)  # each block once for the states
        alone += remaining + len(places) * (remaining - 1)
    return Passes(candidates, run / blocks, alone / blocks)
