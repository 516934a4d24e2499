"""The number of blocks to remove, where a recipe says how small the model becomes.

In: how many parameters a model and each of its blocks have. Out: the least depth that is enough whichever blocks are
chosen: blocks may differ in size (of some mixtures of experts they do), and what chooses them looks at other things.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from sdft_ray.errors import UserError, problem

Way = Literal["span", "anywhere", "tail"]
"""Which blocks may be chosen together: those side by side, any, or the last ones."""


class Sizes(NamedTuple):
    """Numbers of parameters of a model."""

    total: int
    """Of the whole model, those of tied tensors once."""
    blocks: tuple[int, ...]
    """Of each block."""


def least_depth(sizes: Sizes, parameters: float, first: int, last: int, way: Way) -> int:
    """Return the least number of blocks without which a model has at most so many parameters, whichever are removed.

    The `first` and the `last` blocks stay. Raises UserError, which names the nearest number that can be reached.
    """
    left = parameters_left(sizes, first, last, way)
    where, asked = "prune.target.parameters", f"{parameters:,.0f}"
    if len(left) == 1:
        what = f"leaves none of {len(sizes.blocks)} blocks to remove"
        raise UserError(problem("prune.protect", what, "Lower prune.protect"))
    if parameters >= left[0]:
        what = f"{asked} is no fewer than the {left[0]:,} that the model has"
        raise UserError(problem(where, what, f"Give {left[1]} or less"))
    if parameters < left[-1]:
        what = f"{asked} cannot be reached: without {len(left) - 1} of {len(sizes.blocks)} blocks {left[-1]:,} are left"
        more = ", or lower prune.protect" if first + last else ""
        raise UserError(problem(where, what, f"Give {left[-1]} or more{more}"))
    return next(depth for depth, most in enumerate(left) if most <= parameters)


def parameters_left(sizes: Sizes, first: int = 0, last: int = 0, way: Way = "anywhere") -> list[int]:
    """Return how many parameters a model has at most without 0, 1, 2 … blocks, as far as protected ones and one allow.

    >>> parameters_left(Sizes(100, (10, 20, 30)), way="span")
    [100, 90, 70]
    """
    free = sizes.blocks[first : max(first, len(sizes.blocks) - last)]
    most = min(len(free), len(sizes.blocks) - 1)
    return [sizes.total - _least_sum(free, depth, way) for depth in range(most + 1)]


def _least_sum(sizes: Sequence[int], count: int, way: Way) -> int:
    """Return the least sum of so many sizes that may be chosen together."""
    match way:
        case "tail":
            return sum(sizes[len(sizes) - count :])
        case "span":
            return min(sum(sizes[start : start + count]) for start in range(len(sizes) - count + 1))
        case "anywhere":
            return sum(sorted(sizes)[:count])
