"""A score: the mean over items with its standard error; and the items of finished evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sdft_ray.results import ITEMS, Item, Score, read_items
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage


def make_score(metric: str, values: Iterable[float], chance: float, limited: bool, **more: Any) -> Score:
    """Return a score with the standard error of its mean over items; more: fields that a kind of task has besides."""
    values = list(values)
    n, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else None
    stderr = None if variance is None else math.sqrt(variance / n)
    return Score(**{"value": mean, **more}, metric=metric, stderr=stderr, n=n, chance=chance, limited=limited)


def item_values(models: Sequence[Mapping[str, Stage[Any]]], storage: Storage) -> dict[str, list[float]]:
    """Return the value of every item of every task, as the mean over models.

    models: of each one its finished evaluations, by task.
    """
    values: dict[str, list[float]] = {}
    for task in models[0]:
        each = [read_items(storage.files(evaluations[task], ITEMS), Item) for evaluations in models]
        assert all([i.id for i in items] == [i.id for i in each[0]] for items in each), f"{task}: other items"
        values[task] = [sum(item.value for item in same) / len(same) for same in zip(*each, strict=True)]
    return values
