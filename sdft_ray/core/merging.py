"""Merge weights: along the arc between two tensors (SLERP), or the weighted mean of several.

In: the tensors that models of one origin have under one name. Out: one tensor in float32, how similar the tensors
were, and whether SLERP fell back to the mean. Short trainings of one base hardly turn its weights, and along so short
an arc the two agree: a comparison of SLERP with the mean needs the number of tensors on which they differ.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Beyond this |cosine| SLERP is the weighted mean: sin of the angle, which it divides by, vanishes. The usual limit.
COLLINEAR = 0.9995
_CHUNK = 1 << 16  # numbers whose products are summed in float32; the sums of chunks are added in float64


@dataclasses.dataclass(frozen=True)
class Similarity:
    """How similar the tensors of one name were."""

    cosines: tuple[float, ...]
    """Of every pair, in the order (0, 1), (0, 2), …, (1, 2), …"""
    identical: bool
    """All were the same, and so is the merged one."""
    fell_back: bool = False
    """SLERP was requested, and the mean was taken."""


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> tuple[torch.Tensor, Similarity]:
    """Return the tensor at `t` on the arc from `a` (0) to `b` (1), all (N) float32.

    With θ the angle between them: sin((1 - t) θ) / sin θ · a + sin(t θ) / sin θ · b (Shoemake 1985).
    """
    import torch

    similarity = cosine(a, b)
    if torch.equal(a, b):
        return a, Similarity((similarity,), identical=True)
    if abs(similarity) > COLLINEAR:
        return _combine((a, b), (1 - t, t)), Similarity((similarity,), identical=False, fell_back=True)
    angle = math.acos(similarity)
    shares = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
    return _combine((a, b), shares), Similarity((similarity,), identical=False)


def mean(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> tuple[torch.Tensor, Similarity]:
    """Return the mean of tensors (N) float32 with weights, which are divided by their sum."""
    import torch

    cosines = tuple(cosine(a, b) for a, b in itertools.combinations(tensors, 2))
    if all(torch.equal(tensors[0], other) for other in tensors[1:]):
        return tensors[0], Similarity(cosines, identical=True)
    return _combine(tensors, [weight / sum(weights) for weight in weights]), Similarity(cosines, identical=False)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the cosine of the angle between two tensors (N); 0 where one of them has no direction."""
    ab = aa = bb = 0.0
    for x, y in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True):
        ab, aa, bb = ab + float(x @ y), aa + float(x @ x), bb + float(y @ y)
    return max(-1.0, min(1.0, ab / math.sqrt(aa * bb))) if aa and bb else 0.0


def _combine(tensors: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    total = tensors[0] * shares[0]
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        total.add_(tensor, alpha=share)
    return total
