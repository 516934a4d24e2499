"""The value of drafted tokens: acceptance, expected speed-up, and the cost at which a draft stops paying.

In: the calls of the target that judged drafted tokens, and the accepted first, second, … tokens. In a call the
draft proposes k tokens, one after another, and the target reads them all at once: it keeps those before the first that
it refuses, and adds one of its own. Formulas are those of Leviathan et al. (arXiv 2211.17192, theorem 3.8), which take
one acceptance probability a for every token, and a call of the target to cost the same for one token and for k + 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence


def acceptance(drafts: int, accepted: Sequence[int]) -> float:
    """Return a, the probability that a drafted token is accepted where all before it in its call were.

    accepted: the number of the `drafts` calls in which the first, the second, … token was accepted. A token after a
    refused one is not judged, so it does not count.

    >>> acceptance(100, [80, 40])
    0.6666666666666666
    """
    judged = drafts + sum(accepted[:-1])
    return sum(accepted) / judged if judged else 0.0


def acceptance_error(drafts: int, accepted: Sequence[int]) -> float:
    """Return the standard error of a, as if every judged token were drawn by itself.

    >>> acceptance_error(100, [50])
    0.05
    """
    a, judged = acceptance(drafts, accepted), drafts + sum(accepted[:-1])
    return math.sqrt(a * (1 - a) / judged) if judged else 0.0


def accepted_share(drafts: int, accepted: Sequence[int]) -> float:
    """Return the share of all drafted tokens that are accepted, tokens after a refused one included.

    >>> accepted_share(100, [80, 40])
    0.6
    """
    return sum(accepted) / (drafts * len(accepted)) if drafts else 0.0


def tokens_per_call(drafts: int, accepted: Sequence[int]) -> float:
    """Return the mean number of tokens that one call of the target brings, its own included.

    >>> tokens_per_call(100, [80, 40])
    2.2
    """
    return 1 + sum(accepted) / drafts if drafts else 1.0


def expected_tokens(a: float, k: int) -> float:
    """Return (1 - a^(k+1)) / (1 - a), the tokens expected of one call with k drafted ones.

    >>> expected_tokens(0.5, 2), expected_tokens(1.0, 4), expected_tokens(0.0, 4)
    (1.75, 5.0, 1.0)
    """
    return float(sum(itertools.accumulate([a] * k, lambda power, _: power * a, initial=1.0)))


def expected_speedup(a: float, k: int, c: float) -> float:
    """Return the expected speed-up over the target alone; c: time of a draft's token over a target's.

    >>> expected_speedup(0.5, 2, 0.25)
    1.1666666666666667
    """
    return expected_tokens(a, k) / (k * c + 1)


def break_even_cost(a: float, k: int) -> float:
    """Return the c at which k drafted tokens gain nothing.

    >>> break_even_cost(0.5, 2)
    0.375
    """
    return (expected_tokens(a, k) - 1) / k


@dataclasses.dataclass(frozen=True)
class Worth:
    """What counts of accepted tokens say, and what they promise."""

    acceptance: float
    accepted_share: float
    tokens_per_call: float
    expected_speedup: float
    break_even_cost: float


def worth(drafts: int, accepted: Sequence[int], c: float) -> Worth:
    """Return what counts of accepted tokens are worth at a draft's cost of c."""
    a, k = acceptance(drafts, accepted), len(accepted)
    return Worth(
        acceptance=a,
        accepted_share=accepted_share(drafts, accepted),
        tokens_per_call=tokens_per_call(drafts, accepted),
        expected_speedup=expected_speedup(a, k, c),
        break_even_cost=break_even_cost(a, k),
    )
