"""Shares of a list: all of it once, in as few parts as may be."""

import pytest

from sdft_ray.core.shares import shares


@pytest.mark.parametrize("count", [0, 1, 7, 100, 5000])
@pytest.mark.parametrize("workers", [1, 3, 16])
@pytest.mark.parametrize("most", [2048, 8, 1])
def test_shares_cover_everything_once_and_are_as_few_as_may_be(count, workers, most):
    some = list(shares(count, workers, most))
    assert [number for share in some for number in share] == list(range(count))
    sizes = [len(share) for share in some]
    assert sizes == sorted(sizes, reverse=True) and all(0 < size <= most for size in sizes)
    assert len(some) <= max(workers, -(-count // most))
