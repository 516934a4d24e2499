"""Shares of a list: all of it once, smaller towards the end, so that those who take them end together."""

import heapq
import random

import pytest

from sdft_ray.core.shares import shares


@pytest.mark.parametrize("count", [0, 1, 7, 100, 5000])
@pytest.mark.parametrize("workers", [1, 3, 16])
@pytest.mark.parametrize(("most", "least"), [(2048, 16), (8, 16), (1, 1)])
def test_shares_cover_everything_once_and_do_not_grow(count, workers, most, least):
    some = list(shares(count, workers, most, least))
    assert [number for share in some for number in share] == list(range(count))
    sizes = [len(share) for share in some]
    assert sizes == sorted(sizes, reverse=True) and all(0 < size <= most for size in sizes)
    if workers == 1:
        assert len(some) == -(-count // most)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("late", [0.0, 0.2])
def test_workers_that_take_shares_of_uneven_work_end_within_a_twentieth(seed, late):
    """Four workers, one of which begins late; work of 1,500 items with a long tail."""
    draw = random.Random(seed)
    costs = [draw.lognormvariate(0, 0.8) for _ in range(1500)]
    free = [0.0, 0.0, 0.0, late * sum(costs) / 4]  # when each is; the first is the least
    for share in shares(len(costs), 4, 2048, 16):
        heapq.heapreplace(free, free[0] + sum(costs[i] for i in share))
    end = max(free)
    assert sum(end - each for each in free) / (4 * end) < 0.05
