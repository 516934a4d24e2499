"""The order of a mixture: shares hold at every prefix, whatever the weights, and nothing of a source is lost."""

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest

from sdft_ray.core.mixture import interleave, join_rows, mixture_size, next_source, whole_shares
from sdft_ray.core.rows import Row


def by_definition(shares, places):
    """The rule in fractions: of the sources that lag, the one whose next row is due first; of several, the earliest."""
    order = []
    for place in range(1, places + 1):
        taken = Counter(order)
        exact = [Fraction(share, sum(shares)) for share in shares]
        due = {i: Fraction(taken[i] + 1) / part for i, part in enumerate(exact) if part and taken[i] < part * place}
        order.append(min(due, key=lambda i: (due[i], i)))
    return order


def random_shares(seed):
    draw = random.Random(seed)
    return [
        draw.choice([draw.randint(1, 4), draw.randint(1, 90), draw.randint(1, 3000)]) for _ in range(draw.randint(1, 8))
    ]


@pytest.mark.parametrize("shares", [[1], [3, 1], [1, 1, 1], [2, 7, 1], [98, 64, 27], *map(random_shares, range(6))])
def test_interleave_is_the_rule_of_the_earliest_due_row(shares):
    endless = interleave([math.inf] * len(shares), shares)
    assert list(itertools.islice(endless, 60)) == by_definition(shares, 60)


@pytest.mark.parametrize("shares", [[3, 2096, 3, 39, 677, 4, 66], *map(random_shares, range(40))])
def test_interleave_keeps_the_shares_to_within_a_row_at_every_prefix(shares):
    taken, total = [0] * len(shares), sum(shares)
    for place, source in enumerate(itertools.islice(interleave([math.inf] * len(shares), shares), 1500), 1):
        taken[source] += 1
        assert all(abs(count * total - share * place) < total for count, share in zip(taken, shares, strict=True))


@pytest.mark.parametrize("counts", [[5, 3], [1, 100, 7], [0, 4], [4], *map(random_shares, range(10))])
def test_interleave_by_the_counts_uses_every_row(counts):
    assert [Counter(interleave(counts, counts))[i] for i in range(len(counts))] == counts
    assert mixture_size(counts, None) == sum(counts)


def test_interleave_ends_where_the_source_that_is_due_has_run_out():
    order = list(interleave([4, 100], [1, 1]))
    assert order == [0, 1] * 4
    assert mixture_size([4, 100], [1, 1]) == 8 and next_source([4, 4], [1, 1]) == 0
    assert list(interleave([2, 9], [1, 3])) == [1, 1, 0, 1, 1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "shares", [[1], [3, 1], [5, 5, 1], *([s or 1 for s in random_shares(seed)] for seed in range(12))]
)
def test_mixture_size_is_what_counting_every_place_gives(shares):
    draw = random.Random(len(shares))
    for _ in range(20):
        counts = [draw.choice([0, share, draw.randint(0, 5 * share)]) for share in shares]
        counts[draw.randrange(len(counts))] = draw.randint(0, 400)
        assert mixture_size(counts, shares) == sum(1 for _ in interleave(counts, shares))
    assert mixture_size([10**12 * share for share in shares], shares) == 10**12 * sum(shares)


def test_mixture_size_with_a_source_without_a_known_end_is_not_known():
    assert mixture_size([math.inf, 3], None) == mixture_size([math.inf, math.inf], [1, 1]) == math.inf


def test_mixture_size_is_bounded_by_the_source_whose_end_is_known():
    assert mixture_size([math.inf, 3], [1, 1]) == 7  # the fourth of the other is the last to be due before


@pytest.mark.parametrize(
    ("weights", "shares"),
    [([0.5, 1.5, 1], (1, 3, 2)), ([2, 4], (1, 2)), ([0.1, 0.3], (1, 3)), ([7], (1,)), ([1e-3, 1], (1, 1000))],
)
def test_whole_shares_are_the_smallest_of_the_same_proportions(weights, shares):
    assert whole_shares(weights) == shares


def test_join_rows_keeps_one_of_rows_that_ask_the_same_and_says_whose_it_is():
    first, second = [Row("a?", "1"), Row("b?", "2")], [Row("c?", "3"), Row("b?", "other"), Row("d?", "4")]
    joined = join_rows([first, second])
    assert [(row.prompt, row.origin) for row in joined] == [("a?", 0), ("c?", 1), ("b?", 0), ("d?", 1)]
    assert joined[2].reference == "2"
