"""Amounts of a compute file: whole numbers, stages of ZeRO, and GPUs as Ray gives them to a process."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

Count = Annotated[int, Field(gt=0)]


def _require_shares(gpus: float) -> float:
    """Return a number of GPUs; raises ValueError for one that Ray gives to no process."""
    if gpus > 1 and not gpus.is_integer():
        raise ValueError(f"{gpus:g} GPUs are no whole number, and no part of one. Give {math.ceil(gpus)}, or 1 or less")
    return gpus


def _require_one(gpus: float) -> float:
    """Return the GPUs of a process that computes on one; raises ValueError for more."""
    if gpus > 1:
        raise ValueError(f"{gpus:g} are more than the one that a process computes on. Set gpus: 1, and start more")
    return gpus


def _require_whole(given: Any) -> Any:
    """Return what is no number that is only equal to a whole one: pydantic takes it for one of the literals."""
    if isinstance(given, bool | float):
        raise ValueError(f"{json.dumps(given)} is no whole number. Give 0, 1, 2 or 3")
    return given


ZeroStage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(_require_whole)]
Gpus = Annotated[float, Field(ge=0), AfterValidator(_require_shares)]
OneGpu = Annotated[float, Field(ge=0), AfterValidator(_require_one)]
