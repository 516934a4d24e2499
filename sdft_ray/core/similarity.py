"""Measure the effect of each block and span of blocks on the residual stream, and choose the blocks to remove.

In: hidden states x(0)..x(L). Out: the angular distance of every span and the Block Influence of every block, the best
choice for each size, and its bootstrap agreement. All spans come from the same L + 1 vectors, so one forward pass
serves every pruning depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sdft_ray.core.choice import Choice

_SAMPLES = 200  # of a bootstrap


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


def span_influences(influences: torch.Tensor, size: int) -> torch.Tensor:
    """Return the summed Block Influence of blocks l..l+size-1 for every l, shape (B, L+1-size), from (B, L)."""
    return influences.unfold(-1, size, 1).sum(dim=-1)


def choose(costs: Sequence[torch.Tensor], alternatives: Sequence[tuple[int, ...]]) -> Choice:
    """Return the alternative (the blocks to remove) of least cost.

    costs: for each corpus (B, C), the cost of each of the C alternatives on each text. Texts of a corpus count the
    same, and so do corpora.
    """
    mean = _mean(costs)
    best, *others = mean.argsort(stable=True).tolist()
    return Choice(
        alternatives[best],
        float(mean[best]),
        alternatives[others[0]] if others else None,
        float(agreeing(costs, best).double().mean()),
    )


def agreeing(costs: Sequence[torch.Tensor], best: int) -> torch.Tensor:
    """Return, for each bootstrap sample of the texts, whether an alternative is the least there too; (samples)."""
    return _bootstrap(costs).argmin(dim=1) == best


def choose_span(costs: Sequence[torch.Tensor], size: int, first: int = 0, last: int = 0) -> Choice:
    """Return the span of `size` blocks of least cost; the first `first` and the last `last` blocks stay.

    costs: for each corpus (B, L+1-size), the cost of the span from every start, for every text.
    """
    starts = range(first, costs[0].shape[1] - last)
    assert starts, f"no span of {size} blocks is left beside {first} first and {last} last ones"
    return choose([cost[:, first : starts.stop] for cost in costs], [tuple(range(s, s + size)) for s in starts])


def choose_blocks(influences: Sequence[torch.Tensor], size: int, first: int = 0, last: int = 0) -> Choice:
    """Return the `size` blocks of least Block Influence, side by side or not (arXiv 2403.03853).

    influences: for each corpus (B, L). The runner-up has its most influential block replaced by the next one.
    """
    allowed = [influence[:, first : influence.shape[1] - last] for influence in influences]
    mean, samples = _mean(allowed), _bootstrap(allowed)

    def lowest(values: torch.Tensor) -> torch.Tensor:
        return values.argsort(dim=-1, stable=True)[..., :size].sort(dim=-1).values

    chosen = lowest(mean)
    order = mean.argsort(stable=True)
    runner_up = None
    if len(order) > size:
        runner_up = tuple(sorted(first + int(i) for i in (*order[: size - 1], order[size])))
    return Choice(
        tuple(first + int(i) for i in chosen),
        float(mean[chosen].sum()),
        runner_up,
        float((lowest(samples) == chosen).all(dim=1).double().mean()),
    )


def _mean(costs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean over corpora of the mean over texts: (B, S) each to (S)."""
    return torch.stack([cost.double().mean(dim=0) for cost in costs]).mean(dim=0)


def _bootstrap(costs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return `_mean` of resampled texts, (samples, S); every corpus is resampled by itself."""
    generator = torch.Generator().manual_seed(0)
    means = []
    for cost in costs:
        rows = len(cost)
        picks = torch.randint(rows, (_SAMPLES, rows), generator=generator)
        weights = torch.zeros(_SAMPLES, rows, dtype=torch.float64)
        weights.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
        means.append(weights @ cost.double() / rows)
    return torch.stack(means).mean(dim=0)
