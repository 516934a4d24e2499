"""Merge weights: along the arc between two tensors (SLERP), or the weighted mean of several.

In: the tensors that models of one origin have under one name, in pieces, so that no tensor needs to be in memory. Out:
the merged tensor, computed in float32, how similar the tensors were, and whether SLERP fell back to the mean. Short
trainings of one base hardly turn its weights, and over so short an arc the two agree: a comparison of SLERP with the
mean needs the number of tensors on which they differ.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

# Beyond this |cosine| SLERP is the weighted mean: sin of the angle, which it divides by, vanishes. The usual limit.
COLLINEAR = 0.9995
PIECE = 1 << 16
"""Numbers of a piece of a tensor: products are summed in float32, the sums of pieces are added in float64. It is in a
core's cache while it is read, computed, hashed and written; twice as many would need new memory each time."""


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


def compare(pieces: Iterable[Sequence[Tensor]]) -> Similarity:
    """Return how similar tensors of any dtype are; each of `pieces` has the same piece (N) of all of them."""
    import torch

    products: defaultdict[tuple[int, int], float] = defaultdict(float)
    identical, count = True, 0
    for piece in pieces:
        identical = identical and all(torch.equal(piece[0], other) for other in piece[1:])
        numbers, count = [each.float() for each in piece], len(piece)
        for i, j in itertools.combinations_with_replacement(range(count), 2):
            products[i, j] += float(numbers[i] @ numbers[j])
    pairs = itertools.combinations(range(count), 2)
    return Similarity(tuple(_cosine(products[i, j], products[i, i], products[j, j]) for i, j in pairs), identical)


def slerp(similarity: Similarity, t: float) -> Blend:
    """Return how to get the tensor at `t` on the arc from one (0) to another (1), by how similar they are.

    With θ the angle between them: sin((1 - t) θ) / sin θ · a + sin(t θ) / sin θ · b (Shoemake 1985).
    """
    (cosine,) = similarity.cosines
    if similarity.identical:
        return Blend((1.0,), similarity)
    if abs(cosine) > COLLINEAR:
        return Blend((1 - t, t), similarity._replace(fell_back=True))
    angle = math.acos(cosine)
    return Blend((math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)), similarity)


def mean(similarity: Similarity, weights: Sequence[float]) -> Blend:
    """Return how to get the mean of tensors with weights, which are divided by their sum."""
    if similarity.identical:
        return Blend((1.0,), similarity)
    return Blend(tuple(weight / sum(weights) for weight in weights), similarity)


def combine(piece: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return the sum of tensors (N), each times its share, computed in float32, in their own dtype."""
    first, *others = piece[: len(shares)]
    total = first.float() * shares[0]
    for other, share in zip(others, shares[1:], strict=True):
        total.add_(other.float(), alpha=share)
    return total.to(first.dtype)


def _cosine(ab: float, aa: float, bb: float) -> float:
    """Return the cosine of the angle between tensors with these products; 0 where one of them has no direction, and NaN
    where one holds values that are no numbers."""
    if not math.isfinite(aa + bb):
        return math.nan
    return max(-1.0, min(1.0, ab / math.sqrt(aa * bb))) if aa and bb else 0.0
