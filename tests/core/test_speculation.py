"""The arithmetic of drafted tokens, held against drawing them."""

import random

import pytest

from sdft_ray.core.speculation import (
    acceptance,
    accepted_share,
    break_even_cost,
    expected_speedup,
    expected_tokens,
    tokens_per_call,
)


@pytest.mark.parametrize(("a", "k"), [(0.3, 1), (0.7, 4), (0.9, 8)])
def test_formulas_agree_with_drawn_drafts(a, k):
    draws, calls = random.Random(0), 20_000
    accepted = [0] * k
    for _ in range(calls):
        for i in range(k):
            if draws.random() >= a:
                break
            accepted[i] += 1
    assert acceptance(calls, accepted) == pytest.approx(a, abs=0.01)
    assert tokens_per_call(calls, accepted) == pytest.approx(expected_tokens(a, k), rel=0.02)
    assert accepted_share(calls, accepted) == pytest.approx((expected_tokens(a, k) - 1) / k, rel=0.03)


@pytest.mark.parametrize(("a", "k"), [(0.3, 1), (0.7, 4), (1.0, 8)])
def test_a_draft_at_the_break_even_cost_gains_nothing_and_a_cheaper_one_gains(a, k):
    cost = break_even_cost(a, k)
    assert expected_speedup(a, k, cost) == pytest.approx(1)
    assert expected_speedup(a, k, cost / 2) > 1


def test_nothing_drafted_is_a_token_a_call():
    assert acceptance(0, [0, 0]) == accepted_share(0, [0, 0]) == 0
    assert tokens_per_call(0, [0, 0]) == 1
