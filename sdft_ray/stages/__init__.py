"""The Ray shell: one module a stage, all of one shape.

Each has a VERSION (bump it when the meaning of its output changes) and a `build(work)` that reads its inputs'
artifacts, writes files into `work.directory` and returns the manifest's summary, plain JSON. Heavy imports stand
inside functions: planning reads every VERSION and must not load torch or ray.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdft_ray.errors import StageFailed
from sdft_ray.progress import Progress
from sdft_ray.spec.compute import Compute
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

_LOOK_SECONDS = 0.5  # between two looks at whether work is stopped
Validated = Callable[[int, float], None] | None


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage gets to do its work with."""

    stage: Stage
    storage: Storage
    compute: Compute
    progress: Progress
    validated: Validated = None
    """Who hears of a training's validation losses while it runs."""
    stopped: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Set when a stage that is built beside this one failed: nobody waits for this one any more."""

    @property
    def settings(self) -> Mapping[str, Any]:
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

    def result(self, task: Any) -> Any:
        """Return what a Ray task makes; end it, and raise StageFailed, where this work is stopped."""
        import ray

        while not ray.wait([task], timeout=_LOOK_SECONDS)[0]:
            if self.stopped.is_set():
                ray.cancel(task, force=True)
                raise StageFailed(f"{self.stage.name}: stopped, because a stage beside it failed")
        return ray.get(task)

    def input(self, name: str) -> Path:
        """Return the verified directory of an input's artifact."""
        return self.storage.fetch(self.stage.inputs[name])

    def handle(self, name: str) -> Callable[[], Path]:
        """Return what gives a worker, on whatever node, the verified directory of an input's artifact there."""
        return self.storage.handle(self.stage.inputs[name])
