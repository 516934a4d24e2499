"""How a stage's rows are best dealt to engines, simulated: `python -m benchmarks.batches`.

In: nothing. Out: for some pools, the time until the last answer and the share of it that engines wait for the others,
with one batch for each engine (as `core/shares.py` deals) and with batches that shrink to the end. An engine answers so
many rows at once; a step takes as long however few there are (as on a GPU), or 0.3 of that with none and the rest in
proportion. Lengths have a long tail. Times are in steps.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence

from sdft_ray.core.shares import shares

POOLS = ((1500, 4, 16), (7409, 8, 256), (20000, 4, 256), (100000, 8, 256))
"""Rows, engines, rows that an engine answers at once."""
MOST, LEAST = 2048, 16


def main() -> None:
    """Simulate and print."""
    for count, engines, at_once in POOLS:
        draw = random.Random(0)
        tokens = [max(4, round(draw.lognormvariate(4.1, 0.8) * draw.lognormvariate(0, 0.4))) for _ in range(count)]
        for fixed in (1.0, 0.3):
            found = {
                name: simulate([tokens[some.start : some.stop] for some in dealt], engines, at_once, fixed)
                for name, dealt in (("even", shares(count, engines, MOST)), ("shrinking", shrinking(count, engines)))
            }
            shown = ", ".join(f"{name} {last:,.0f} steps, waits {waits:.1%}" for name, (last, waits) in found.items())
            print(f"{count:,} rows, {engines} engines, {at_once} at once, a step of {fixed:.1f} + occupancy: {shown}")


def shrinking(count: int, engines: int) -> Iterator[range]:
    """Yield shares of half of what each engine would still have to do."""
    start = 0
    while start < count:
        size = min(MOST, max(LEAST, -(-(count - start) // (2 * engines))))
        yield range(start, min(start + size, count))
        start += size


def simulate(batches: Sequence[Sequence[int]], engines: int, at_once: int, fixed: float) -> tuple[float, float]:
    """Return when the last engine ends, and the share of that time that engines wait on average."""
    free = [0.0] * engines
    for batch in batches:
        heapq.heapreplace(free, free[0] + batch_time(batch, at_once, fixed))
    return max(free), 1 - sum(free) / (engines * max(free))


def batch_time(batch: Sequence[int], at_once: int, fixed: float) -> float:
    """Return the time of a batch, the longest rows first; fixed: the part of a step that occupancy does not change."""
    waiting, at_work = sorted(batch), list[int]()
    step, time = 0, 0.0
    while waiting or at_work:
        while waiting and len(at_work) < at_once:
            heapq.heappush(at_work, step + waiting.pop())
        occupied, end = len(at_work), heapq.heappop(at_work)
        time += (end - step) * (fixed + (1 - fixed) * occupied / at_once)
        step = end
    return time


if __name__ == "__main__":
    main()
