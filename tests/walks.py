"""What generators that walk through a model return, and what is measured of one batch."""

from collections.abc import Generator, Sequence
from typing import Any

from sdft_ray.core.skipping import skipped_losses
from sdft_ray.core.walking import Walk
from sdft_ray.stages.score import pass_by


def result_of(steps: Generator[float, None, Any]) -> Any:
    """Return what a generator returns, whose steps are shares that only grow."""
    shares = [0.0]
    while True:
        try:
            shares.append(next(steps))
        except StopIteration as end:
            assert shares == sorted(shares) and shares[-1] < 1.001
            return end.value


def measure_states(walk: Walk, texts: Sequence[list[int]], first: Sequence[int]) -> tuple[Any, Any]:
    """Return distances and influences of one batch."""
    [measured] = result_of(pass_by(walk, [[*zip(texts, first, strict=True)]]))
    return measured


def measure_losses(walk: Walk, texts: Sequence[list[int]], first: Sequence[int], *removed: Any) -> Any:
    """Return losses of one batch; removed: candidates, and what is gone in all of them."""
    [losses] = result_of(skipped_losses(walk, [[*zip(texts, first, strict=True)]], *removed))
    return losses
