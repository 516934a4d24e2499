"""The stages: one module each, all of one shape.

    VERSION     bump it when the meaning of the output changes
    Settings    what it computes: a section; its hashed fields make the id
    Summary     what its manifest keeps of the result
    NEEDS       what its workers take of the cluster; None: it runs in the driver
    UNIT        what its progress counts
    stage       its place in a chain, from the recipe and its inputs
    build       does the work in `work.directory`, and returns the summary

Heavy imports stand inside functions: planning reads every module and must not load torch or ray.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, ParamSpec, Protocol, Self, TypeVar

from sdft_ray.engine import EngineFactory, start_engine
from sdft_ray.errors import StageFailed
from sdft_ray.progress import Progress
from sdft_ray.spec.compute import Compute, Needs
from sdft_ray.store.identity import Hashed, Stage
from sdft_ray.store.record import Record
from sdft_ray.store.storage import Storage

_LOOK_SECONDS = 0.5  # between two looks at whether work is stopped
Validated = Callable[[int, float], None] | None
P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound=Hashed | Mapping[str, Any], covariant=True)


class Summary(Record):
    """What the manifest of a stage keeps of its result."""

    @classmethod
    def of(cls, stage: Stage[Any], storage: Storage) -> Self:
        """Return that of a finished stage."""
        return cls.model_validate(storage.manifest(stage).summary)


class Timed(Summary):
    """That of a stage whose worker may wait for its turn on the cluster."""

    seconds: float | None = None
    """That it took in its worker."""


def timed(work: Callable[P, T]) -> Callable[P, tuple[T, float]]:
    """Return what does the same work, and returns the seconds that it took beside the result."""

    @functools.wraps(work)
    def measured(*args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
        begun = time.monotonic()
        result = work(*args, **kwargs)
        return result, round(time.monotonic() - begun, 2)

    return measured


@dataclasses.dataclass(frozen=True)
class Work(Generic[S]):
    """What a stage gets to do its work with."""

    stage: Stage[S]
    storage: Storage
    compute: Compute
    progress: Progress
    validated: Validated = None
    """Who hears of a training's validation losses while it runs."""
    stopped: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Set when a stage that is built beside this one failed: nobody waits for this one any more."""
    engine: EngineFactory = start_engine
    """What generates."""
    sweep: str | None = None
    """The sweep that this work is part of, as trackers show it."""

    @property
    def settings(self) -> S:
        """The part of the recipe that this stage computes."""
        return self.stage.settings

    @property
    def directory(self) -> Path:
        """The scratch directory that becomes the artifact."""
        return self.storage.scratch(self.stage)

    @property
    def resumable(self) -> Path:
        """A directory for pieces that let this stage go on after a kill."""
        return self.storage.resumable(self.stage)

    def result(self, task: Any, of_actor: bool = False) -> Any:
        """Return what a Ray task makes; end it, and raise StageFailed, where this work is stopped. One of an actor that
        has begun ends with its actor."""
        import ray

        while not ray.wait([task], timeout=_LOOK_SECONDS)[0]:
            if self.stopped.is_set():
                ray.cancel(task, force=not of_actor)
                raise StageFailed(f"{self.stage.name}: stopped, because a stage beside it failed")
        return ray.get(task)

    def input(self, name: str) -> Path:
        """Return the verified directory of an input's artifact."""
        return self.storage.fetch(self.stage.inputs[name])

    def inputs(self, name: str) -> list[Path]:
        """Return the verified directories of inputs of one kind, of which there may be several."""
        return [self.input(key) for key in self.stage.keys(name)]

    def numbered_inputs(self, name: str, count: int) -> dict[int, Path]:
        """Return the verified directories of those inputs name_0, name_1 … up to a count that there are, by number."""
        keys = {i: f"{name}_{i}" for i in range(count)}
        return {i: self.input(key) for i, key in keys.items() if key in self.stage.inputs}

    def handle(self, name: str) -> Callable[[], Path]:
        """Return what gives a worker, on whatever node, the verified directory of an input's artifact there."""
        return self.storage.handle(self.stage.inputs[name])


def bring_tokenizer(storage: Storage, model: Stage[Any]) -> Path:
    """Return the directory of a model, of which this node then has the tokenizer, and weights only if it had them."""
    for pattern in ("*.json", "*.jinja", "*.txt", "tokenizer.model"):
        place = storage.files(model, pattern)
    return place


class StageModule(Protocol):
    """What each module has."""

    @property
    def VERSION(self) -> int: ...
    @property
    def NEEDS(self) -> Needs | None: ...
    @property
    def UNIT(self) -> str: ...
    @property
    def build(self) -> Callable[[Work[Any]], Summary]: ...
