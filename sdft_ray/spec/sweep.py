"""The typed form of one sweep file: a recipe, and axes of values for some of its fields."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

from sdft_ray.spec.section import Name, Section, require_distinct
from sdft_ray.spec.training import Arm


class Axis(Section):
    """The values that one recipe field takes: a list, or a range that values are drawn from."""

    values: Annotated[tuple[JsonValue, ...], Field(strict=False)] | None = None
    """The values, one after another; a plain list in place of this section is the same."""
    from_: int | float | None = Field(None, alias="from")
    """Lower end of a range; with two whole numbers whole numbers are drawn."""
    to: int | float | None = None
    """Upper end of a range."""
    scale: Literal["log", "linear"] = "linear"
    """Whether values are drawn evenly from the range (`linear`) or from its logarithm (`log`)."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        if self.values is not None and len(self.model_fields_set) > 1:
            raise ValueError("gives values and a range. Keep one of them")
        if self.values is None:
            if self.from_ is None or self.to is None:
                raise ValueError("gives no values. List them")
            if self.from_ >= self.to:
                raise ValueError(f"from {self.from_} is not below to {self.to}. Lower from")
            if self.scale == "log" and self.from_ <= 0:
                raise ValueError(f"from {self.from_} has no logarithm. Set scale: linear")
        elif not self.values:
            raise ValueError("has no values. Give at least one")
        elif any(_are_equal(*pair) for pair in itertools.combinations(self.values, 2)):
            raise ValueError("names a value twice. Remove one")
        return self

    def draw(self, count: int, seed: str) -> tuple[int | float, ...]:
        """Return `count` values of the range, to three digits: short enough to be typed into a recipe."""
        assert self.from_ is not None and self.to is not None
        low, high = (math.log(end) if self.scale == "log" else end for end in (self.from_, self.to))
        places = random.Random(seed)
        drawn = [low + (high - low) * places.random() for _ in range(count)]
        numbers = [float(f"{math.exp(value) if self.scale == 'log' else value:.3g}") for value in drawn]
        inside = [min(max(number, self.from_), self.to) for number in numbers]  # rounding leads out of it
        whole = isinstance(self.from_, int) and isinstance(self.to, int)
        return tuple(round(number) for number in inside) if whole else tuple(map(float, inside))


def _are_equal(first: JsonValue, second: JsonValue) -> bool:
    """Return whether two values are one to a recipe, as 1 and 1.0 are; true is no number."""
    return first == second and isinstance(first, bool) == isinstance(second, bool)


def _as_axis(given: Any) -> Any:
    if isinstance(given, list):
        return {"values": tuple(given)}
    if isinstance(given, Mapping | Axis):
        return given
    raise ValueError(f"{json.dumps(given)} is neither a list of values nor a range. Write [{json.dumps(given)}]")


_Values = Annotated[tuple[JsonValue, ...], Field(min_length=1)]
OneAxis = Annotated[Axis, BeforeValidator(_as_axis, json_schema_input_type=_Values | Axis)]
Axes = dict[str, OneAxis]
_NotEmpty = Annotated[Axes, Field(min_length=1)]


def _several(given: Any) -> Any:
    """Return a tuple of a list's values, or of one value."""
    return tuple(given) if isinstance(given, list) else (given,)


class Asha(Section):
    """Early stopping by validation loss (asynchronous successive halving), as Ray Tune does it."""

    grace_steps: int = Field(gt=0)
    """No trial is stopped before this step."""
    reduction_factor: int = Field(3, gt=1)
    """Of this many trials that reach a rung the best one goes on. Rungs are at grace_steps times its powers."""


class Goal(Section):
    """What a model must keep, or become. Only those depths are tried that find the one: the deepest cut that keeps
    enough, or the least deep one that is small or fast enough."""

    recovery: float | None = Field(None, gt=0)
    """Recovery in percent that the lower end of its 95 % interval must reach. Either this, `parameters` or
    `tokens_per_second` is needed."""
    parameters: float | None = Field(None, gt=0)
    """Parameters that the model may have at most. Depths are only cut to see; the chosen one is trained."""
    tokens_per_second: float | None = Field(None, gt=0)
    """Tokens per second in decoding, as a multiple of the base's, that the slowest of the alternating runs must reach.
    It needs evaluate.speed. Depths are cut and timed; the chosen one is trained."""
    arm: Arm = "distilled"
    """The arm that is trained; the others are not."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(each is not None for each in (self.recovery, self.parameters, self.tokens_per_second)) != 1:
            raise ValueError("names none or several. Give one of recovery, parameters, tokens_per_second")
        if self.recovery is not None and 0.5 <= self.recovery <= 1:  # a fraction, as people write one
            raise ValueError(f"recovery: {self.recovery:g} is in percent. Write {100 * self.recovery:g}")
        return self

    @property
    def wanted(self) -> str:
        """What it asks for, in words."""
        if self.recovery is not None:
            return f"{self.recovery:g} %"
        if self.parameters is not None:
            return f"{self.parameters:,.0f} parameters or fewer"
        return f"{self.tokens_per_second:g} times the base's tokens per second"


class Sweep(Section):
    """One complete sweep file."""

    recipe: Annotated[
        tuple[Name, ...],
        Field(min_length=1),
        AfterValidator(require_distinct),
        BeforeValidator(_several, json_schema_input_type=str | Annotated[tuple[str, ...], Field(min_length=1)]),
    ]
    """A recipe file, relative to this one; or several, whose results stand side by side."""
    axes: Annotated[
        tuple[Axes, ...], BeforeValidator(_several, json_schema_input_type=_NotEmpty | tuple[_NotEmpty, ...])
    ]
    """Recipe fields by their dotted paths, each with its values; lists are crossed. A list of such mappings gives the
    combinations of all of them."""
    samples: int | None = Field(None, gt=0)
    """Number of values drawn from the ranges, the same values for every combination of listed ones."""
    seed: int = 0
    """Seed of the values that are drawn from the ranges."""
    goal: Goal | None = None
    """Look for one depth, among those of the axis prune.blocks, that reaches this."""
    asha: Asha | None = None
    """Stops trials that do worse than others of the same arm, depth and size; without it all are trained to the end."""

    @model_validator(mode="after")
    def _draws_where_there_is_a_range(self) -> Self:
        if not (self.axes and all(self.axes)):
            raise ValueError("axes: names no field. Give at least one")
        if wrong := [path for axes in self.axes for path in axes if not all(path.split("."))]:
            raise ValueError(f"axes: '{wrong[0]}' is the path of no field. Write for example train.lr")
        ranges = [path for axes in self.axes for path, axis in axes.items() if axis.values is None]
        if ranges and self.samples is None:
            raise ValueError(f"samples: is missing. Set samples to the number of values to draw of {ranges[0]}")
        if self.samples is not None and not ranges:
            raise ValueError("samples: has no range to draw from. Remove samples")
        return self

    @model_validator(mode="after")
    def _looks_for_a_depth_alone(self) -> Self:
        if not self.goal:
            return self
        if self.asha:
            raise ValueError("asha: stops trials that a goal needs whole. Remove asha")
        if len(self.axes) > 1 or len(self.recipe) > 1:
            raise ValueError("goal: is of one recipe and one set of axes. Remove the others")
        (axes,) = self.axes
        depths = axis.values if (axis := axes.get("prune.blocks")) else None
        if depths is None or len(depths) < 2:
            raise ValueError("goal: has no depths to choose from. List two or more in axes.prune.blocks")
        if others := [path for path in axes if path != "prune.blocks" and not path.endswith(".seed")]:
            raise ValueError(f"goal: looks for a depth, not for {others[0]}. Remove axes.{others[0]}")
        return self
