"""What the history of the losses decides: the best step, the end of patience, the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sdft_ray.results import Step, validations
from sdft_ray.spec import training


def learning_rate(step: int, steps: int, settings: training.Train) -> float:
    """Return the learning rate of a step (0-based): linear warm-up, then the schedule down to zero."""
    warmup = math.ceil(settings.warmup_fraction * steps)
    if step < warmup:
        return float(settings.lr * (step + 1) / warmup)
    along = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - along, "cosine": 0.5 * (1 + math.cos(math.pi * along))}
    return float(settings.lr * shape[settings.schedule])


def best_step(history: Sequence[Step]) -> int | None:
    """Return the step with the lowest validation loss, the first of equals."""
    return min(validations(history), key=lambda seen: seen[1], default=(None, 0.0))[0]


def last_by_source(losses: Iterable[dict[int, float] | None]) -> dict[int, float]:
    """Return the last loss of each source."""
    return {source: loss for each in losses for source, loss in (each or {}).items()}


def is_out_of_patience(history: Sequence[Step], patience: int | None) -> bool:
    """Return whether the last `patience` validations were all no better than one before them."""
    if patience is None or (best := best_step(history)) is None:
        return False
    return sum(step > best for step, _ in validations(history)) >= patience
