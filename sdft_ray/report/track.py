"""Logs what a run or a sweep came to in the trackers: results beside the curves of each training.

In: a report, and the plan that it is of. Out: scores, recovery and the removed blocks in the run of each training.
Steps that a tracker missed are logged first: it was down, or the compute file names it only now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdft_ray.core.surgery import name_blocks
from sdft_ray.pipeline import Chain
from sdft_ray.report.entries import Quality, Report
from sdft_ray.report.sweep_entries import SweepReport
from sdft_ray.results import HISTORY, METRICS, read_history
from sdft_ray.spec.compute import Compute
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage
from sdft_ray.sweep.planning import Plan
from sdft_ray.trackers import Tracking, run_of


def log_results(report: Report, chain: Chain, compute: Compute, storage: Storage) -> None:
    """Log the results of every model that a recipe trains."""
    qualities = {entry.model: entry.quality for entry in report.models}
    for name, stage in chain.trained.items() if compute.track else ():
        _log_training(stage, qualities[name], {"removed": name_blocks(report.details.cut.removed)}, compute, storage)


def log_sweep(report: SweepReport, plan: Plan, compute: Compute, storage: Storage) -> None:
    """Log the results of the finished trials of a sweep, and which trials it stopped."""
    removed = {model.id: name_blocks(model.cut.removed) for model in report.models if model.cut}
    trials = {trial.train.id: trial for trial in plan.trials}  # a report may be of some alone
    for entry in report.trials if compute.track else ():
        trial = trials[entry.id]
        if entry.status == "stopped":  # its process was ended, and its run is still open
            with Tracking(compute.track, run_of(trial.train, plan.name), storage, trial.train.id) as tracking:
                tracking.conclude({"final/stopped": 1.0})
        if entry.result:
            more = {"removed": removed[entry.pruned]}
            _log_training(trial.train, entry.result.quality, more, compute, storage, plan.name)


def _log_training(
    stage: Stage[Any],
    quality: Quality,
    more: Mapping[str, str],
    compute: Compute,
    storage: Storage,
    group: str | None = None,
) -> None:
    lines = storage.files(stage, METRICS) / METRICS
    with Tracking(compute.track, run_of(stage, group, **more), storage, stage.id) as tracking:
        for step in read_history(storage.files(stage, HISTORY)):
            tracking.log(step.step, {f"train/{name}": value for name, value in step.metrics().items()})
        tracking.conclude(_results(quality), [lines] if lines.is_file() else [])


def _results(quality: Quality) -> dict[str, float]:
    """Return scores and their mean as fractions, recovery in percent."""
    summed = {"mean": quality.mean, "recovery": quality.recovery, "recovery_over_chance": quality.recovery_over_chance}
    scores = {task: score.value for task, score in quality.tasks.items()} | summed
    return {f"final/{name}": value for name, value in scores.items() if value is not None}
