"""The search for a depth: against trying every depth, and what it takes on average over many curves."""

import itertools
import math
import random

import pytest

from benchmarks.goal import count_trainings, draw_curve
from sdft_ray.core.searching import following, most_trainings

CURVES = 150


@pytest.mark.parametrize("depths", [2, 3, 7, 15])
@pytest.mark.parametrize("is_misled", [False, True])
def test_search_finds_what_a_grid_finds_with_no_more_trainings_than_it_says(depths, is_misled):
    source = random.Random(depths)
    for number in range(CURVES):
        signals, kept = draw_curve(source, depths)
        if is_misled:
            signals = [source.choice([0.0, source.random() * 9]) for _ in kept]
        goal = source.choice([source.uniform(min(kept) - 1, max(kept) + 1), *kept])
        meets = [i for i in range(depths) if kept[i] >= goal]
        found, trained = count_trainings(signals, kept, goal)
        assert found == max(meets, default=None), number
        assert trained <= most_trainings(depths) <= math.ceil(math.log2(depths + 1)) + 1
        halved, trained = count_trainings(None, kept, goal)
        assert halved == found and trained <= math.ceil(math.log2(depths + 1))


@pytest.mark.parametrize("depths", [7, 15])
def test_search_with_signals_trains_two_fifths_of_the_depths_or_fewer(depths):
    source, trained, halved = random.Random(0), 0, 0
    for _ in range(CURVES):
        signals, kept = draw_curve(source, depths)
        goal = source.choice([90.0, 95.0, 97.0])
        trained += count_trainings(signals, kept, goal)[1]
        halved += count_trainings(None, kept, goal)[1]
    assert trained / CURVES / depths <= 0.4 and trained < halved


def test_search_begins_where_the_goal_should_be_crossed_and_learns_the_slope():
    signals = [0.1 * 1.4**i for i in range(10)]
    assert following(signals, {}, 99.9, 10) < following(signals, {}, 95, 10) < following(signals, {}, 80, 10)
    gentle, steep = ([97 - slope * signal for signal in signals] for slope in (2, 20))
    first = following(signals, {}, 94, 10)
    seconds = [following(signals, {first: kept[first]}, 94, 10) for kept in (steep, gentle)]
    assert seconds[0] < first < seconds[1]


def test_search_of_a_base_that_scores_nothing_ends():
    trained = {}
    for _ in itertools.count():
        number = following([0.1, 0.2, 0.3], trained, 95, 3)
        if number is None:
            break
        trained[number] = 0.0
    assert len(trained) <= 3
