"""Figures of trials that differ in their seeds alone, as one: means and spreads.

In: what came of each. Out: the figures of their group; None stands for what is not known of any.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from sdft_ray.report.sweep_entries import SourceResult, TrialResult


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of what is known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def spread(values: Sequence[float | None]) -> float | None:
    """Return the standard deviation over seeds, None for a single one."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def mean_retention(results: Sequence[TrialResult]) -> dict[str, dict[str, float]]:
    """Return the means of what is known of how near to the base models stay, as the field of a group."""
    if not (figures := [result.retention.figures for result in results if result.retention]):
        return {}
    return {"retention": {name: statistics.fmean(own[name].value for own in figures) for name in figures[0]}}


def mean_sources(results: Sequence[TrialResult]) -> dict[str, dict[str, SourceResult]]:
    """Return the means of what came of each source, as the field of a group; none where there is one only."""
    if not (names := list(results[0].sources)):
        return {}
    return {"sources": {name: _mean_source([result.sources[name] for result in results]) for name in names}}


def _mean_source(each: Sequence[SourceResult]) -> SourceResult:
    return SourceResult(**{field: mean([getattr(own, field) for own in each]) for field in SourceResult.model_fields})
