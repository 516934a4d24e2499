"""What is built at the same time: stages that need nothing of each other, where the nodes hold both.

In: the stages that are to be built. Out: those that go on here, and those beside them in a process of its own, since
two runs of Ray Data in one process get in each other's way (docs/footguns.md). Where the nodes hold only one of both,
nothing changes: everything is built in its order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sdft_ray.cluster import RayNode, below_ray, fit_together, in_thread, last_line, on_this_node
from sdft_ray.errors import StageFailed, UserError
from sdft_ray.progress import Progress, duration, log
from sdft_ray.spec.compute import Compute, Needs
from sdft_ray.store.identity import Stage, ancestors
from sdft_ray.store.storage import Storage

# Long stages, and those that may go on beside them. None whose speed is measured, and generation before training: an
# early failure costs less.
BESIDE = {
    "distill": ("score", "loss", "cut", "patch"),
    "train": ("nll", "probes", "retention", "evaluate"),
}


class Pair(NamedTuple):
    """Stages that may be built at once."""

    first: list[Stage[Any]]
    """What they need."""
    here: list[Stage[Any]]
    beside: list[Stage[Any]]


def pairs(todo: Sequence[Stage[Any]]) -> Iterator[Pair]:
    """Yield what may be built at once of the stages that are to be built; all lists are in their order.

    None where finalists are trained before a cut is chosen: then even a cut waits for trainings.
    """
    if any(stage.name == "finals" for stage in todo):
        return
    for long, others in BESIDE.items():
        here = [stage for stage in todo if stage.name == long]
        ids = {stage.id for stage in here}
        beside = [stage for stage in todo if stage.name in others and not ids & _ancestors([stage])]
        needed = _ancestors([*here, *beside]) - ids - {stage.id for stage in beside}
        if here and beside:
            yield Pair([stage for stage in todo if stage.id in needed], here, beside)


def _ancestors(stages: Sequence[Stage[Any]]) -> set[str]:
    """Return the ids of all that stages are made from."""
    return {stage.id for stage in ancestors(stages)}


class Beside(NamedTuple):
    """What the nodes hold beside long stages, and with which it takes no more than they leave."""

    stages: list[Stage[Any]]
    compute: Compute
    at_once: int
    """Evaluations."""


def limit(pair: Pair, compute: Compute, nodes: Sequence[RayNode], needs_of: Callable[[str], Needs | None]) -> Beside:
    """Return what of a pair may go on beside the long stages; needs_of: of a kind of stage.

    A long stage whose processes grow in number takes whatever is free: nothing goes beside it.
    """
    taken = needs_of(pair.here[0].name)
    assert taken
    pool = compute.train.workers if taken.section == "train" else compute.distill.actors

    def holds(needs: Needs | None, times: int = 1) -> bool:
        if needs is None:
            return True
        processes, cpus, gpus = compute.bundles(needs)
        return fit_together(nodes, compute.bundles(taken), (processes * times, cpus, gpus))

    stages: list[Stage[Any]] = []
    outside = {stage.id for stage in pair.beside}
    for stage in pair.beside if pool.min == pool.max else ():
        if holds(needs_of(stage.name)) and not outside & _ancestors([stage]):
            stages.append(stage)
            outside.remove(stage.id)
    places, section = 1, compute.evaluate
    while places < len(stages) * section.actors and holds(Needs("evaluate"), places + 1):
        places += 1
    section = section.model_copy(update={"actors": min(places, section.actors)})
    return Beside(stages, compute.model_copy(update={"evaluate": section}), places // section.actors)


@contextlib.contextmanager
def building(build: Callable[..., Any], beside: Beside, storage: Storage, long: str) -> Iterator[None]:
    """Let `build` build stages in another process on this node, where the recipe's files are, while the block runs.

    An error there is logged at once and raised at the end of the block, which does not depend on it. Where the block
    raises, the process ends, and with it what it had started.
    """
    import ray

    names = ", ".join(dict.fromkeys(stage.name for stage in beside.stages))
    log(f"{names}: beside {long}")
    worker = ray.remote(num_cpus=0, max_calls=1, max_retries=0, scheduling_strategy=on_this_node())(build)
    built = worker.remote(beside.stages, beside.compute, storage, at_once=beside.at_once)
    waiting = in_thread(_wait, built, names)
    try:
        yield
        with Progress(names) as progress:
            progress.enter(f"beside {long}, which is done")
            waiting.result()
    except BaseException:
        ray.cancel(built, force=True)
        raise
    for stage in beside.stages:
        if storage.status(stage) == "done":
            seconds = storage.manifest(stage).provenance.wall_seconds
            log(f"{stage.name}: {duration(seconds)}, {storage.where(stage)}")


def _wait(built: Any, names: str) -> None:
    """Return once a process has built its stages, or has died: then they are built again where it was started."""
    import ray

    try:
        ray.get(built)
    except ray.exceptions.TaskCancelledError:
        return
    except ray.exceptions.RayError as error:
        cause = below_ray(error)
        log(f"{names}: FAILED: {last_line(cause)}")
        if isinstance(cause, UserError | StageFailed):
            raise cause from error
