"""How far each span of blocks moves the residual stream: d(l, n) for every l and n at once.

In: hidden states x(0)..x(L) at one token. Out: the matrix of angular distances, the best span for each size, and how
sure that choice is. All spans come from the same L + 1 vectors, so one forward pass serves every pruning depth.
"""

from __future__ import annotations

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class SpanChoice:
    """The span of one size that moves the residual stream least."""

    start: int
    stop: int
    distance: float
    runner_up: int
    """Start of the next best span of that size."""
    agreement: float
    """Fraction of bootstrap samples of the rows that choose the same start."""


def angular_distances(states: torch.Tensor) -> torch.Tensor:
    """Return d[b, l, m] = arccos(cos_sim(x(l), x(m))) / pi in [0, 1], shape (B, L+1, L+1), of states (B, L+1, D).

    d(l, n) of arXiv 2403.17887, eq. 7 is d[l, l+n]. Computed in float64: near cos = 1, where the answer lies for
    blocks worth removing, float32 rounding alone is worth 1e-4.
    """
    assert states.ndim == 3, f"states are (B, L+1, D), got {tuple(states.shape)}"
    unit = torch.nn.functional.normalize(states.double(), dim=-1)
    cos = unit @ unit.transpose(1, 2)  # (B, L+1, L+1)
    return torch.arccos(cos.clamp(-1.0, 1.0)) / math.pi


def span_distances(distances: torch.Tensor, size: int) -> torch.Tensor:
    """Return d(l, size) for every start l, shape (..., L+1-size), from distances (..., L+1, L+1)."""
    return distances.diagonal(offset=size, dim1=-2, dim2=-1)


def choose_span(distances: torch.Tensor, size: int, samples: int = 200, seed: int = 0) -> SpanChoice:
    """Return the span of `size` blocks with the lowest mean distance over rows, and how sure that is.

    distances: (B, L+1, L+1). The last block may be part of a span. Certainty is the share of `samples` bootstrap
    resamplings of the B rows with the same winner.
    """
    rows, states = distances.shape[:2]
    assert 0 < size < states - 1, f"a span of {size} blocks does not leave any of {states - 1}"
    each = span_distances(distances, size)  # (B, L+1-size)
    mean = each.mean(dim=0)
    order = mean.argsort(stable=True)
    start = int(order[0])
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(rows, (samples, rows), generator=generator)  # (samples, B)
    weights = torch.zeros(samples, rows, dtype=each.dtype).scatter_add_(
        1, picks, torch.ones_like(picks, dtype=each.dtype)
    )
    winners = (weights @ each).argmin(dim=1)
    return SpanChoice(
        start=start,
        stop=start + size,
        distance=float(mean[start]),
        runner_up=int(order[1]),
        agreement=float((winners == start).double().mean()),
    )
