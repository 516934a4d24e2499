import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest

from sdft_ray.core.recovery import (
    Estimate,
    mean_score,
    paired_differences,
    pass_at,
    ratio,
    recovery,
    recovery_interval,
    recovery_over_chance,
)


class Score(NamedTuple):
    value: float
    chance: float


def scores(*values, chance=0.25):
    return [Score(value, chance) for value in values]


def test_recovery_is_the_ratio_of_unweighted_means():
    assert mean_score(scores(0.2, 0.6)) == pytest.approx(0.4)
    assert recovery(scores(0.2, 0.4), scores(0.5, 0.5)) == pytest.approx(60)


def test_recovery_over_chance_of_a_guessing_model_is_nothing():
    base = scores(0.75, 0.75)
    assert recovery(scores(0.25, 0.25), base) == pytest.approx(100 / 3)
    assert recovery_over_chance(scores(0.25, 0.25), base) == pytest.approx(0)
    assert recovery_over_chance(base, base) == pytest.approx(100)


@pytest.mark.parametrize("right", [7, 13, 26, 57])  # 100 * 0.07 / 0.07 is 100.00000000000001
def test_recovery_of_the_base_itself_is_100_to_the_last_bit(right):
    base, values = scores(right / 100, chance=0.01), {"a": [1] * right + [0] * (100 - right)}
    assert recovery(base, base) == recovery_over_chance(base, base) == 100
    found = recovery_interval(values, values)
    assert (found.value, found.low, found.high) == (100, 100, 100)


def test_recovery_of_a_base_below_nothing_is_none():
    assert recovery(scores(-0.2), scores(-0.1)) is None
    assert recovery_interval({"a": [1, 0]}, {"a": [-1, 0]}) is None


def test_recovery_of_a_base_that_scores_nothing_is_not_a_number_but_none():
    assert recovery(scores(0.1), scores(0.0)) is None
    assert recovery_over_chance(scores(0.3), scores(0.2)) is None


def test_paired_differences_of_two_that_agree_on_every_item_is_exactly_nothing():
    values = {"a": [0, 1, 1, 0, 1], "b": [1, 0]}
    each, mean = paired_differences(values, values)
    for found in (*each.values(), mean):
        assert (found.value, found.low, found.high) == (0, 0, 0)
    assert mean.n == 7


def test_paired_differences_interval_is_the_binomial_one_and_narrower_than_an_unpaired_one():
    # The first is right on 20 of 200 items more, and hard items are hard for both.
    first, second = {"a": [1] * 100 + [0] * 100}, {"a": [1] * 80 + [0] * 120}
    each, mean = paired_differences(first, second)
    assert each["a"].value == pytest.approx(0.1) == mean.value
    # 1.96 * sqrt(0.1 * 0.9 / 200) = 0.042; unpaired it would be 0.098.
    assert each["a"].low == pytest.approx(0.1 - 0.042, abs=0.008)
    assert each["a"].high == pytest.approx(0.1 + 0.042, abs=0.008)


def test_paired_differences_mean_counts_every_task_the_same():
    each, mean = paired_differences({"small": [1, 1], "large": [0] * 50}, {"small": [0, 0], "large": [0] * 50})
    assert each["small"].value == 1 and each["large"].value == 0
    assert mean.value == pytest.approx(0.5)


def test_paired_differences_refuses_other_items():
    with pytest.raises(AssertionError, match="a has other items"):
        paired_differences({"a": [1, 0]}, {"a": [1]})


def test_recovery_interval_of_the_base_itself_is_exactly_all_of_it():
    values = {"a": [0, 1, 1, 0, 1] * 4, "b": [1, 0] * 5}
    found = recovery_interval(values, values)
    assert (found.value, found.low, found.high) == pytest.approx((100, 100, 100))
    assert found.n == 30


def test_recovery_interval_covers_the_truth_as_often_as_it_says():
    """Models that keep 80 % of the base's right answers: the interval holds 80 in about 95 of 100 draws of items."""
    random, covered = np.random.default_rng(1), 0
    for draw in range(100):
        base = {task: (random.random(200) < 0.6).astype(float) for task in "ab"}
        model = {task: values * (random.random(200) < 0.8) for task, values in base.items()}
        found = recovery_interval(model, base, draws=300, seed=draw)
        covered += found.low <= 80 <= found.high
    assert 88 <= covered <= 100


def test_recovery_interval_of_a_base_that_scores_nothing_is_none():
    assert recovery_interval({"a": [0, 1]}, {"a": [0, 0]}) is None


def test_ratio_of_sums_to_counts_has_the_interval_of_its_standard_error():
    random = np.random.default_rng(3)
    counts = random.integers(20, 60, 400)
    sums = counts * random.normal(2.0, 0.5, 400)
    found = ratio(sums, counts)
    assert found.value == pytest.approx(sums.sum() / counts.sum()) and found.n == 400
    # The delta method: residuals of the ratio over the mean count.
    error = np.std(sums - found.value * counts, ddof=1) / counts.mean() / math.sqrt(400)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.2 * error)


def test_ratio_is_seeded():
    sums, counts = [1.0, 5.0, 2.0, 9.0], [3, 4, 2, 5]
    assert ratio(sums, counts) == ratio(sums, counts) == ratio(sums, counts, seed=0)
    assert ratio(sums, counts) != ratio(sums, counts, draws=100, seed=1)


def test_ratio_of_what_is_the_same_everywhere_has_no_interval():
    assert ratio([0.0, 0.0], [3, 4]) == Estimate(0.0, 0.0, 0.0, 2)
    assert ratio([4], [8]) == Estimate(0.5, 0.5, 0.5, 1)


def test_ratio_of_differences_is_narrower_than_that_of_either():
    random = np.random.default_rng(5)
    hard = random.normal(50, 20, 100)
    first, second = hard + random.normal(1, 1, 100), hard + random.normal(0, 1, 100)
    alone, paired = ratio(first, [30] * 100), ratio(first - second, [30] * 100)
    assert 0 < paired.low < paired.value < paired.high
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)


@pytest.mark.parametrize(("samples", "k"), [(1, 1), (5, 1), (5, 3), (6, 6), (7, 4)])
def test_pass_at_is_the_share_of_all_choices_of_k_samples_with_a_right_one(samples, k):
    for right in range(samples + 1):
        is_right = [i < right for i in range(samples)]
        choices = [any(chosen) for chosen in itertools.combinations(is_right, k)]
        assert pass_at(k, samples, right) == pytest.approx(sum(choices) / len(choices), abs=1e-12)


def test_pass_at_is_without_bias():
    # Each answer is right with chance p, so one of k is with 1 - (1 - p)^k, whatever number is sampled.
    p, k, samples = 0.3, 3, 8
    weights = [math.comb(samples, c) * p**c * (1 - p) ** (samples - c) for c in range(samples + 1)]
    mean = sum(weight * pass_at(k, samples, right) for right, weight in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
