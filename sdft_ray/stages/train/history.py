"""What the history of the losses decides: the best step, the end of patience, the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdft_ray.results import Step
from sdft_ray.spec import training

if TYPE_CHECKING:
    pass


def learning_rate(step: int, steps: int, settings: training.Train) -> float:
    """Return the learning rate of a step (0-based): linear warm-up, then the schedule down to zero."""
    warmup = math.ceil(settings.warmup_fraction * steps)
    if step < warmup:
        return float(settings.lr * (step + 1) / warmup)
    along = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - along, "cosine": 0.5 * (1 + math.cos(math.pi * along))}
    return float(settings.lr * shape[settings.schedule])


def best_step(history: Sequence[Step]) -> int | None:
    """Return the step with the lowest validation loss, the first of equals.

    >>> best_step([{"step": 1}, {"step": 2, "validation_loss": 3.0}, {"step": 3, "validation_loss": 3.0}])
    2
    """
    seen = [record for record in history if "validation_loss" in record]
    return min(seen, key=lambda record: record["validation_loss"])["step"] if seen else None


def is_out_of_patience(history: Sequence[Step], patience: int | None) -> bool:
    """Return whether the last `patience` validations were all no better than one before them.

    >>> is_out_of_patience([{"step": 1, "validation_loss": 3.0}, {"step": 2, "validation_loss": 3.1}], patience=1)
    True
    """
    if patience is None or (best := best_step(history)) is None:
        return False
    return sum("validation_loss" in record for record in history if record["step"] > best) >= patience
