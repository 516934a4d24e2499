"""A score: the mean over items with its standard error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def make_score(metric: str, values: Iterable[float], chance: float, limited: bool) -> dict[str, Any]:
    """Return a score with the standard error of its mean over items."""
    values = list(values)
    n, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else None
    return {
        "metric": metric,
        "value": mean,
        "stderr": None if variance is None else math.sqrt(variance / n),
        "n": n,
        "chance": chance,
        "limited": limited,
    }
