"""The run of a training in each tracker that the compute file names.

In: metrics of steps as they come, and results at the end. Out: one run a training in each tracker, which goes on after
a restart, and a small note of each under the root: its key, and how far it is. No tracker can stop or slow a training:
each works in a thread of its own, and one that fails is one line and left out until the command runs again. Workers
write TensorBoard's files and metrics.jsonl (stages/train/log.py), whatever becomes of the trackers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field

from sdft_ray.cluster import in_thread, last_line
from sdft_ray.errors import problem
from sdft_ray.progress import log
from sdft_ray.spec.compute import TrackerName
from sdft_ray.spec.loading import leaves
from sdft_ray.store.identity import Stage
from sdft_ray.store.record import Record
from sdft_ray.store.storage import Storage
from sdft_ray.trackers.libraries import Run, Tracker, UnknownRun, make

_END_SECONDS = 30.0  # that a command waits at its end for a tracker's next answer
_LOOK_SECONDS = 0.5  # between two looks at whether it is there
_KEEP_SECONDS = 10.0  # between two notes of how far a tracker is: in an object store each is a request
Make = Callable[[TrackerName], Tracker]
_replaced: set[TrackerName] = set()  # of which it was reported that they know no earlier run


class Kept(Record):
    """The note of one run in one tracker."""

    key: str | None = None
    step: int = 0
    """The last one that was logged."""
    results: dict[str, float] = Field(default_factory=dict)
    """That were logged."""


class _Step(NamedTuple):
    step: int
    metrics: Mapping[str, float]


class _Results(NamedTuple):
    metrics: Mapping[str, float]
    files: Sequence[Path]


class _End(NamedTuple):
    status: Literal["done", "stopped"]


def run_of(stage: Stage[Any], group: str | None = None, **more: str) -> Run:
    """Return the run of a training stage, with its settings and what else is known of it."""
    settings: dict[str, str | int | float] = dict(more)
    for key, value in leaves(stage.settings):
        settings[key] = value if isinstance(value, int | float) else str(value)
    return Run(stage.directory_name, group, settings)


class Tracking:
    """One run in several trackers; none gets again what it has."""

    def __init__(
        self, names: Sequence[TrackerName], run: Run, storage: Storage, training: str, make: Make = make
    ) -> None:
        """training: the id of its stage, under which the notes are kept."""
        self._followers = [_Follower(name, run, storage, training, make) for name in names]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for follower in self._followers:
            follower.end("stopped" if kind else "done")
        for follower in self._followers:
            follower.wait()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step, by names as TensorBoard has them."""
        for follower in self._followers:
            follower.given.put(_Step(step, metrics))

    def conclude(self, results: Mapping[str, float], files: Sequence[Path] = ()) -> None:
        """Log what came of the run as a whole, with small files."""
        for follower in self._followers:
            follower.given.put(_Results(results, files))


class _Follower:
    """One tracker, in a thread: what it is given it logs in order, until a call of its library fails."""

    def __init__(self, name: TrackerName, run: Run, storage: Storage, training: str, make: Make) -> None:
        self.given: SimpleQueue[_Step | _Results | _End] = SimpleQueue()
        self._name, self._run, self._storage, self._make = name, run, storage, make
        self._note = f"tracking/{training}-{name}.json"
        self._tracker: Tracker | None = None
        self._had: list[_Step] = []  # that the tracker should have; given again to one that was replaced
        self._answered_at = time.monotonic()
        self._thread: Future[None] = in_thread(self._follow)

    def end(self, status: Literal["done", "stopped"]) -> None:
        """Let the tracker close its run once it has everything."""
        self._answered_at = time.monotonic()
        self.given.put(_End(status))

    def wait(self) -> None:
        """Return once the tracker has closed its run, or does not answer."""
        while not self._thread.done():
            with suppress(TimeoutError):
                self._thread.result(_LOOK_SECONDS)
            if time.monotonic() - self._answered_at > _END_SECONDS:
                self._report("does not answer")
                return

    def _follow(self) -> None:
        try:
            text = self._storage.read_text(self._note)
            self._kept = self._written = Kept.model_validate_json(text) if text else Kept()
            self._written_at = time.monotonic()
            try:
                while not isinstance(given := self.given.get(), _End):
                    self._take(given)
                if self._tracker:
                    self._tracker.finish(given.status)
            finally:
                self._write()
        except Exception as error:  # noqa: BLE001 - a library may fail in any way, and none may stop a training
            self._report(f"failed ({last_line(error)})")

    def _take(self, given: _Step | _Results) -> None:
        """Log what the tracker does not have yet."""
        match given:
            case _Step(step) if step <= self._kept.step:
                if self._tracker is None:
                    self._had.append(given)
            case _Step(step, metrics):
                self._opened().log(step, metrics)
                self._kept = self._kept.model_copy(update={"step": step})
            case _Results(metrics, files) if metrics != self._kept.results:
                self._opened().log(None, metrics)
                for file in files:
                    self._opened().artifact(file)
                self._kept = self._kept.model_copy(update={"results": dict(metrics)})
        self._answered_at = time.monotonic()
        if self._answered_at - self._written_at > _KEEP_SECONDS:
            self._write()

    def _opened(self) -> Tracker:
        """Return the tracker with its run, which is opened for the first thing to log."""
        if self._tracker is None:
            with ExitStack() as stack:
                if self._run.group:  # trials that start together make one parent
                    stack.enter_context(self._storage.lock(f"tracking-{self._run.group}"))
                tracker = self._make(self._name)
                try:
                    key = tracker.start(self._run, self._kept.key)
                except UnknownRun:
                    self._begin_anew()
                    key = tracker.start(self._run, None)
            self._tracker, self._kept = tracker, self._kept.model_copy(update={"key": key})
            self._write()  # at once: another start after a kill would be another run
            had, self._had = self._had, []
            for step in had:
                self._take(step)
        return self._tracker

    def _begin_anew(self) -> None:
        """Forget what a tracker that was replaced had; the first of its runs reports it for all."""
        self._kept = Kept()
        if self._name not in _replaced:
            _replaced.add(self._name)
            what = "knows no run that was logged before: it is another server or store"
            log(problem(f"compute.track: {self._name}", what, "Runs begin anew there with all their steps"))

    def _write(self) -> None:
        if self._kept != self._written:
            self._storage.write_text(self._note, self._kept.model_dump_json())
            self._written, self._written_at = self._kept, time.monotonic()

    def _report(self, what: str) -> None:
        do = "Work goes on without it; the same command logs the rest when it answers"
        log(problem(f"compute.track: {self._name}", f"{self._run.name}: {what}", do))
