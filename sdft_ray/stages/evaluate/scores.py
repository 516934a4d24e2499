"""A score: the mean over items with its standard error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from sdft_ray.results import Score


def make_score(metric: str, values: Iterable[float], chance: float, limited: bool, **more: Any) -> Score:
    """Return a score with the standard error of its mean over items; more: fields that a kind of task has besides."""
    values = list(values)
    n, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else None
    stderr = None if variance is None else math.sqrt(variance / n)
    return Score(**{"value": mean, **more}, metric=metric, stderr=stderr, n=n, chance=chance, limited=limited)
