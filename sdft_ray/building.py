"""Build the artifacts of stages: each under its lock, once the cluster can hold it, and evaluations side by side.

In: stages in their order, and the module of each kind. Out: finished artifacts. What another command finished meanwhile
is not built again, and an error names what is kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from typing import Any

from sdft_ray.cluster import below_ray, in_thread, last_line, require_capacity
from sdft_ray.engine import EngineFactory
from sdft_ray.errors import StageFailed, UserError
from sdft_ray.progress import Progress, duration, log
from sdft_ray.spec.compute import Compute
from sdft_ray.stages import StageModule, Timed, Validated, Work, distill, evaluate, retention, train
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage


def survey(stages: Iterable[Stage[Any]], storage: Storage) -> tuple[list[Stage[Any]], list[Stage[Any]]]:
    """Return the stages that are to be built and those that are done, each in their order."""
    todo_and_done: tuple[list[Stage[Any]], list[Stage[Any]]] = [], []
    with storage.survey():
        for stage in stages:
            todo_and_done[storage.status(stage) == "done"].append(stage)
    return todo_and_done


def require_gates(finished: Iterable[Stage[Any]], storage: Storage) -> None:
    """Raise where the counts of a finished stage are above the recipe's gates: it was built when they were looser."""
    for stage in finished:
        match stage.settings:
            case distill.Settings():
                distill.require_gates(stage, distill.Summary.of(stage, storage))
            case train.Settings():
                train.require_gates(stage, train.Counts.of(stage, storage))


def _together(todo: Sequence[Stage[Any]]) -> Iterator[list[Stage[Any]]]:
    """Yield the stages that are built at once: all evaluations (each is small), everything else alone."""
    small = evaluate.Settings | retention.Settings
    for at_once, group in itertools.groupby(todo, key=lambda stage: isinstance(stage.settings, small)):
        stages = list(group)
        yield from [stages] if at_once else ([stage] for stage in stages)


@dataclasses.dataclass(frozen=True)
class Builder:
    """Builds stages, each under its lock."""

    modules: Mapping[str, StageModule]
    """By kind of stage."""
    storage: Storage
    compute: Compute
    validated: Validated
    engine: EngineFactory
    sweep: str | None
    at_once: int
    """The most evaluations at a time."""

    def build(self, stages: Sequence[Stage[Any]], connect: Callable[[], None]) -> None:
        """Build those of some stages that are not there yet, in their order."""
        for group in _together(survey(stages, self.storage)[0]):
            if needs := self.modules[group[0].name].NEEDS:
                connect()
                require_capacity(self.compute, needs, group[0].name)
            self._build_group(group)

    def _build_group(self, group: Sequence[Stage[Any]]) -> None:
        """Build one stage, or several at once."""
        if len(group) == 1:
            with Progress(group[0].name, self.modules[group[0].name].UNIT) as progress:
                self._build_one(group[0], progress, threading.Event(), threading.Semaphore())
            return
        with Progress(group[0].name, "tasks") as progress:
            progress.begin(len(group))
            stopped, place = threading.Event(), threading.Semaphore(self.at_once)
            waiting = [in_thread(self._build_one, each, Progress(each.name, "parts"), stopped, place) for each in group]
            try:
                for done, future in enumerate(as_completed(waiting), 1):
                    future.result()
                    progress.update(done)
            finally:  # at the first failure the others end: else they would go on beside the next trial
                stopped.set()

    def _build_one(
        self, stage: Stage[Any], progress: Progress, stopped: threading.Event, place: threading.Semaphore
    ) -> None:
        """Build one stage under its lock, once there is a place for it, and log its time and directory."""
        with place, self.storage.lock(f"{stage.name}-{stage.id}"):
            if self.storage.status(stage) == "done":  # built by another command while this one waited
                require_gates([stage], self.storage)
                return
            if stopped.is_set():  # while this one waited
                return
            begun = time.monotonic()
            work = Work(stage, self.storage, self.compute, progress, self.validated, stopped, self.engine, self.sweep)
            try:
                summary = self.modules[stage.name].build(work)
                # An evaluation reports itself how long it took: this thread also waited for its turn on the cluster.
                own = summary.seconds if isinstance(summary, Timed) else None
                seconds = time.monotonic() - begun if own is None else own
                self.storage.commit(stage, summary.plain(), seconds)
            except Exception as error:  # the edge: report what is kept and where the trace is
                raise self._explain(stage, error) from error
        log(f"{stage.name}: {duration(seconds)}, {self.storage.where(stage)}")

    def _explain(self, stage: Stage[Any], error: Exception) -> BaseException:
        """Return the error that people see."""
        if isinstance(cause := below_ray(error), (UserError, StageFailed)):
            return cause
        trace = self.storage.keep_trace(stage, "".join(traceback.format_exception(error)))
        kept = f"Its finished work is kept under {self.storage.uri}; run the same command again to go on"
        return StageFailed(f"{stage.name}: failed: {last_line(cause)}. {kept}.{trace}")
