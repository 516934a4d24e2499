"""What is built beside what: stages that need nothing of each other, where the nodes hold both at once.

In: the stages that are open, and the compute file. Out: which of them may run at once, and the means to do it; runs and
sweeps build by these. The compute file decides: what does not fit beside another waits for it, as on a laptop where
each stage takes all cores. The way to the cuts goes beside generation, evaluations of models that are there go beside a
training.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from typing import Any, NamedTuple, Self

from sdft_ray.cluster import below_ray, fit_together, in_thread, last_line, on_this_node, resources_of_nodes
from sdft_ray.errors import StageFailed, UserError
from sdft_ray.progress import Progress, log
from sdft_ray.spec.compute import Compute, Needs
from sdft_ray.stages import distill, evaluate, score
from sdft_ray.store.identity import Stage

Stages = list[Stage[Any]]


class Branches(NamedTuple):
    """Two parts of what is open that need nothing of each other, and what they need."""

    roots: Stages
    """What either needs, in order."""
    cuts: Stages
    generated: Stages


def branches(todo: Sequence[Stage[Any]], compute: Compute) -> Branches | None:
    """Return the way to the cuts and generation where both are open and may run at once; a pool that grows takes what
    there is."""
    pool = compute.distill.actors
    cuts = [stage for stage in todo if stage.name in ("score", "loss", "cut")]
    generated = [stage for stage in todo if isinstance(stage.settings, distill.Settings)]
    if not cuts or not generated or pool.min != pool.max:
        return None
    own = {stage.id for stage in (*cuts, *generated)}
    needed = own_and_inputs([*cuts, *generated])
    return Branches([stage for stage in todo if stage.id in needed - own], cuts, generated)


def own_and_inputs(stages: Iterable[Stage[Any]]) -> set[str]:
    """Return the ids of stages and of all that they are made from."""
    found: set[str] = set()
    left = list(stages)
    while left:
        stage = left.pop()
        if stage.id not in found:
            found.add(stage.id)
            left += stage.inputs.values()
    return found


def are_held_at_once(compute: Compute) -> bool:
    """Return whether the nodes that are there hold scoring beside generation."""
    return fit_together(resources_of_nodes(), *(compute.bundles(stage.NEEDS) for stage in (score, distill)))


@contextlib.contextmanager
def in_process(work: Callable[..., object], *arguments: Any) -> Iterator[None]:
    """Run work beside the body, in a process of its own on this node, where the recipe's files are; wait for it.

    Not in a thread: two runs of Ray Data in one process get in each other's way (docs/footguns.md).
    """
    import ray

    beside = ray.remote(num_cpus=0, max_calls=1, max_retries=0, scheduling_strategy=on_this_node())(work)
    made = beside.remote(*arguments)
    yield
    try:
        ray.get(made)
    except ray.exceptions.RayError as error:
        if isinstance(cause := below_ray(error), (UserError, StageFailed)):
            raise cause from error
        log(f"{last_line(error)}: what it left is built next")


class Threads:
    """Stages that are built in threads of their own; at the first failure all of them end: else they would go on beside
    the next trial."""

    def __init__(self, build: Callable[[Stage[Any], Progress, threading.Event], None]) -> None:
        self._build, self._stopped = build, threading.Event()
        self._running: list[Future[None]] = []
        self.started: set[str] = set()
        """Ids of the stages that were begun."""

    @property
    def running(self) -> bool:
        """Whether some were begun and not waited for."""
        return bool(self._running)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.join()
        finally:
            self._stopped.set()

    def start(self, stages: Sequence[Stage[Any]], at_once: int) -> None:
        """Begin to build stages, so many at once."""
        free = threading.Semaphore(at_once)
        self.started |= {stage.id for stage in stages}

        def work(stage: Stage[Any]) -> None:
            with free:
                self._build(stage, Progress(stage.name), self._stopped)

        self._running += [in_thread(work, stage) for stage in stages]

    def join(self) -> None:
        """Return when all of them are built; raise what the first that fails raises."""
        if not self._running:
            return
        with Progress("evaluate", "tasks") as progress:
            progress.begin(len(self._running))
            for done, future in enumerate(as_completed(self._running), 1):
                future.result()
                progress.update(done)
        self._running = []


def evaluations_beside(needs: Needs, todo: Sequence[Stage[Any]], compute: Compute) -> tuple[Stages, int]:
    """Return the open evaluations that can go beside a stage, and how many at once: those of models that are there, as
    many as the nodes hold beside it."""
    still_open = {stage.id for stage in todo}
    ready = [
        stage
        for stage in todo
        if isinstance(stage.settings, evaluate.HeldOutSettings | evaluate.TaskSettings)
        and not any(each.id in still_open for each in stage.inputs.values())
    ]
    nodes, own = resources_of_nodes(), compute.bundles(needs)
    _, cpus, gpus = compute.bundles(evaluate.NEEDS)
    at_once = 0
    while at_once < len(ready) and fit_together(nodes, own, (at_once + 1, cpus, gpus)):
        at_once += 1
    return (ready if at_once else []), at_once
