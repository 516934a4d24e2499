import pytest

from sdft_ray.core.recovery import Score, mean_score, recovery, recovery_over_chance


def scores(*values, chance=0.25):
    return [Score(f"t{i}", "acc", value, None, 10, chance, False) for i, value in enumerate(values)]


def test_recovery_is_the_ratio_of_unweighted_means():
    assert mean_score(scores(0.2, 0.6)) == pytest.approx(0.4)
    assert recovery(scores(0.2, 0.4), scores(0.5, 0.5)) == pytest.approx(60)


def test_recovery_over_chance_of_a_guessing_model_is_nothing():
    base = scores(0.75, 0.75)
    assert recovery(scores(0.25, 0.25), base) == pytest.approx(100 / 3)
    assert recovery_over_chance(scores(0.25, 0.25), base) == pytest.approx(0)
    assert recovery_over_chance(base, base) == pytest.approx(100)


def test_recovery_of_a_base_that_scores_nothing_is_not_a_number_but_none():
    assert recovery(scores(0.1), scores(0.0)) is None
    assert recovery_over_chance(scores(0.3), scores(0.2)) is None
