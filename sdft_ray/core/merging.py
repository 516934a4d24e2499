"""Merge weights: along the arc between two tensors (SLERP), or the weighted mean of several.

In: the tensors that models of one origin have under one name. Out: the merged tensor, computed in float32, how similar
the tensors were, and whether SLERP fell back to the mean. Short trainings of one base hardly turn its weights, and over
so short an arc the two agree: a comparison of SLERP with the mean needs the number of tensors on which they differ.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

# Beyond this |cosine| SLERP is the weighted mean: sin of the angle, which it divides by, vanishes. The usual limit.
COLLINEAR = 0.9995
_CHUNK = 1 << 16  # numbers whose products are summed in float32; the sums of chunks are added in float64
_PIECE = 1 << 16  # numbers that are combined at once: more of them would need new memory from the system each time


class Similarity(NamedTuple):
    """How similar the tensors of one name were."""

    cosines: tuple[float, ...]
    """Of every pair, in the order (0, 1), (0, 2), …, (1, 2), …"""
    identical: bool
    """All were the same, and so is the merged one."""
    fell_back: bool = False
    """SLERP was requested, and the mean was taken."""


class Blend(NamedTuple):
    """How tensors become one."""

    shares: tuple[float, ...]
    """What each is multiplied by before they are added; of the first alone where all are the same."""
    similarity: Similarity


def slerp(a: Tensor, b: Tensor, t: float) -> Blend:
    """Return how to get the tensor at `t` on the arc from `a` (0) to `b` (1), both (N) and of any dtype.

    With θ the angle between them: sin((1 - t) θ) / sin θ · a + sin(t θ) / sin θ · b (Shoemake 1985).
    """
    cosines = (cosine(a, b),)
    if _identical([a, b]):
        return Blend((1.0,), Similarity(cosines, identical=True))
    if abs(cosines[0]) > COLLINEAR:
        return Blend((1 - t, t), Similarity(cosines, identical=False, fell_back=True))
    angle = math.acos(cosines[0])
    shares = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
    return Blend(shares, Similarity(cosines, identical=False))


def mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Blend:
    """Return how to get the mean of tensors (N) of any dtype with weights, which are divided by their sum."""
    cosines = tuple(cosine(a, b) for a, b in itertools.combinations(tensors, 2))
    if _identical(tensors):
        return Blend((1.0,), Similarity(cosines, identical=True))
    return Blend(tuple(weight / sum(weights) for weight in weights), Similarity(cosines, identical=False))


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of the angle between two tensors (N); 0 where one of them has no direction."""
    ab = aa = bb = 0.0
    for x, y in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True):
        x, y = x.float(), y.float()
        ab, aa, bb = ab + float(x @ y), aa + float(x @ x), bb + float(y @ y)
    return max(-1.0, min(1.0, ab / math.sqrt(aa * bb))) if aa and bb else 0.0


def combine(tensors: Sequence[Tensor], shares: Sequence[float]) -> Iterator[Tensor]:
    """Yield the sum of tensors (N), each times its share, computed in float32, in pieces of their own dtype.

    A piece is small enough to be in a core's cache while it is computed, hashed and written.
    """
    for first, *others in zip(*(tensor.split(_PIECE) for tensor in tensors[: len(shares)]), strict=True):
        total = first.float() * shares[0]
        for other, share in zip(others, shares[1:], strict=True):
            total.add_(other.float(), alpha=share)
        yield total.to(first.dtype)


def _identical(tensors: Sequence[Tensor]) -> bool:
    import torch

    return all(torch.equal(tensors[0], other) for other in tensors[1:])
