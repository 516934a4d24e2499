"""Notes of a sweep on stages without an artifact: the reason of a failure, and the losses of a stopped training.

In: stages. Out: small texts below the root, which every node reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

Losses = list[tuple[int, float]]
"""Validation losses: (step, loss)."""


def keep_failure(storage: Storage, stage: Stage[Any], reason: str) -> None:
    """Write down why a stage could not be built."""
    storage.write_text(_failure(stage), reason)


def read_failure(storage: Storage, stage: Stage[Any]) -> str | None:
    """Return why a stage could not be built when that was last tried, if it was."""
    return storage.read_text(_failure(stage))


def forget_failure(storage: Storage, stage: Stage[Any]) -> None:
    """Drop the reason: the stage is tried again."""
    storage.drop(storage.root / _failure(stage))


def keep_stopped(storage: Storage, sweep: str, stage: Stage[Any], losses: Sequence[tuple[int, float]]) -> None:
    """Write down that a sweep stopped a training, and the validation losses that it had until then."""
    storage.write_text(_stopped(sweep, stage), json.dumps(losses))


def read_stopped(storage: Storage, sweep: str, stage: Stage[Any]) -> Losses | None:
    """Return the validation losses of a training that a sweep stopped; None where it did not."""
    kept = storage.read_text(_stopped(sweep, stage))
    return None if kept is None else [tuple(pair) for pair in json.loads(kept)]


def _failure(stage: Stage[Any]) -> str:
    return f"failures/{stage.name}-{stage.id}.reason.txt"


def _stopped(sweep: str, stage: Stage[Any]) -> str:
    return f"failures/{sweep}/{stage.id}.stopped.json"
