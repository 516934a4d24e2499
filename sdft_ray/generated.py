"""Generated answers to held-out rows: what is kept of each, how often they go wrong as texts, and how often one of
several sampled ones is right.

In: the items of a held-out evaluation, and their rows. Out: shares of answers. Generation breaks first in a pruned
model: it runs in circles or does not end where choices among given answers still come out right. What is judged was
stored by the evaluation, so a better detector evaluates nothing again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdft_ray.core.recovery import Estimate, pass_at, ratio
from sdft_ray.core.rows import Row
from sdft_ray.core.selection import is_empty, refuses, repeats_itself, strip_thoughts
from sdft_ray.results import Item
from sdft_ray.store.record import Record


class HeldOutItem(Item):
    """A held-out row, as a model answered it."""

    generated: str
    ended: bool | None = None
    """Whether the answer ended by itself, and not at max_new_tokens; None where an older version did not keep it."""
    bits: float
    """Of the reference."""
    bytes: int
    """Of the reference."""
    right: int | None = None
    """How many of the sampled answers are right, where some were sampled."""


class Sampled(Record):
    """How likely one of k sampled answers to a held-out row is right (pass@k), with 95 % intervals over rows."""

    share: Estimate
    over_base: Estimate | None = None
    """Less the base's, on the same rows; None for the base."""


class Habits(Record):
    """How a model writes: shares of its answers to held-out rows."""

    answers: int
    ended: float | None
    """That ended by themselves; None where that was not kept."""
    repeated: float
    """That run in circles where the reference does not."""
    empty: float
    """That have no text behind their thoughts, or only announce one."""
    refused: float
    """That refuse where the reference does not."""
    characters: float
    """Mean length."""


def describe(items: Sequence[HeldOutItem], rows: Mapping[str, Row], filters: Sequence[Mapping[str, Any]]) -> Habits:
    """Return how often answers have each fault; rows: by id. Filters, one for each source, may hold further
    `refusal_phrases`.

    The detectors are those that choose rewrites: a fault that the reference has, too, is none. Thoughts are no part of
    an answer, except where they do not end.
    """
    texts = [(strip_thoughts(item.generated), item.generated, rows[item.id]) for item in items]
    count = len(items)
    ended = [item.ended for item in items]
    return Habits(
        answers=count,
        ended=None if None in ended else sum(map(bool, ended)) / count,
        repeated=sum(repeats_itself(text or whole, row, filters[row.origin]) for text, whole, row in texts) / count,
        empty=sum(text is None or is_empty(text, row) for text, _, row in texts) / count,
        refused=sum(refuses(text or "", row, filters[row.origin]) for text, _, row in texts) / count,
        characters=sum(len(item.generated) for item in items) / count,
    )


def describe_sampled(items: Sequence[HeldOutItem], base: Sequence[HeldOutItem] | None, k: int, samples: int) -> Sampled:
    """Return pass@k of a model from how many of a row's samples are right; base: the same rows as the base answered
    them, None for the base itself."""
    chances, each = [_pass_at(k, samples, item) for item in items], [1.0] * len(items)
    if base is None:
        return Sampled(share=ratio(chances, each))
    assert [item.id for item in items] == [item.id for item in base], "both answered the same rows"
    gains = [mine - _pass_at(k, samples, item) for mine, item in zip(chances, base, strict=True)]
    return Sampled(share=ratio(chances, each), over_base=ratio(gains, each))


def _pass_at(k: int, samples: int, item: HeldOutItem) -> float:
    assert item.right is not None, f"{item.id} was answered without sampling"
    return pass_at(k, samples, item.right)
