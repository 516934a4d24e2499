"""The section of a compute file that states how fast its processes are."""

from __future__ import annotations

from pydantic import Field

from sdft_ray.spec.section import Section


class Throughput(Section):
    """What one process does in a second, from which `sdft check --compute` estimates hours. Where absent, finished
    artifacts of the same base under the root are taken."""

    score: float | None = Field(None, gt=0)
    """Texts that an actor of `score` measures."""
    distill: float | None = Field(None, gt=0)
    """Rows that an actor of `distill` rewrites."""
    train: float | None = Field(None, gt=0)
    """Rows that a worker of `train` trains on."""
    retention: float | None = Field(None, gt=0)
    """Texts on which a model is compared with the base."""
    evaluate: float | None = Field(None, gt=0)
    """Items of benchmark tasks."""
