"""How many blocks must go for a model to be small enough, against every choice there is."""

import itertools
import random

import pytest
from refusals import complaint

from sdft_ray.core.depth import Sizes, least_depth, parameters_left
from sdft_ray.errors import UserError


def choices(sizes: Sizes, depth: int, first: int, last: int, way: str):
    """Yield every set of blocks of one size that may be removed."""
    free = range(first, len(sizes.blocks) - last)
    for blocks in itertools.combinations(free, depth):
        is_span = not blocks or blocks[-1] - blocks[0] == depth - 1
        if way == "anywhere" or (is_span and (way == "span" or not blocks or blocks[-1] == free[-1])):
            yield blocks


@pytest.mark.parametrize("way", ["span", "anywhere", "tail"])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 2), (0, 3)])
def test_least_depth_is_the_first_that_is_enough_for_every_choice(way, first, last):
    source = random.Random(f"{way}{first}{last}")
    for _ in range(20):
        blocks = tuple(source.randint(1, 40) for _ in range(7))
        sizes = Sizes(100 + sum(blocks), blocks)
        most = [
            max(sizes.total - sum(blocks[b] for b in chosen) for chosen in choices(sizes, depth, first, last, way))
            for depth in range(min(7 - first - last, 6) + 1)
        ]
        assert parameters_left(sizes, first, last, way) == most
        for parameters in range(most[-1], most[0]):
            expected = next(depth for depth, left in enumerate(most) if left <= parameters)
            assert least_depth(sizes, parameters, first, last, way) == expected


@pytest.mark.parametrize(
    ("parameters", "first", "last", "line"),
    [
        (59, 0, 0, "parameters: 59 cannot be reached: without 3 of 4 blocks 60 are left. Give 60 or more."),
        (
            60,
            1,
            1,
            "parameters: 60 cannot be reached: without 2 of 4 blocks 70 are left. Give 70 or more, or lower "
            "prune.protect.",
        ),
        (9e9, 0, 0, "parameters: 9,000,000,000 is no fewer than the 90 that the model has. Give 80 or less."),
        (90, 0, 0, "parameters: 90 is no fewer than the 90 that the model has. Give 80 or less."),
    ],
)
def test_least_depth_of_what_cannot_be_reached_names_the_nearest_that_can(parameters, first, last, line):
    assert (
        complaint(least_depth, Sizes(90, (10, 10, 10, 10)), parameters, first, last, "span") == f"prune.target.{line}"
    )


@pytest.mark.parametrize(("first", "last"), [(2, 3), (0, 4), (0, 5), (0, 9), (5, 0)])
def test_least_depth_where_every_block_is_protected_says_so(first, last):
    with pytest.raises(UserError, match=r"^prune\.protect: leaves none of 4 blocks to remove\. Lower prune\.protect"):
        least_depth(Sizes(90, (10, 10, 10, 10)), 60, first, last, "span")
