"""Engines over several nodes: each in a placement group of its own, which goes when its actor has ended.

In: the plan. Out: where Ray Data is to start each actor; and in an actor, its model on every node of its group.
vLLM's executor for Ray starts a process a GPU in the group of the actor that it runs in, and takes bundles of one GPU
only. Ray Data knows no groups of actors (ray-project/ray#64035): a callback makes one for each actor, nobody takes it
away, and its GPUs would stay taken until the command ends. So actors get names, and a group goes with its name. An
actor that Ray restarts keeps both.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sdft_ray.cluster import Watch
from sdft_ray.errors import StageFailed, problem
from sdft_ray.progress import log
from sdft_ray.spec.compute import Distill, settled
from sdft_ray.store.record import Record

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

_LOOK_SECONDS = 1.0  # between two looks at which actors have ended
_WAIT_SECONDS = 60.0  # for a group that is placed anew; then again


def bundles(plan: Distill) -> list[dict[str, float]]:
    """Return the bundles of one engine, one a GPU; the first of each node's also has its CPUs.

    >>> bundles(Distill(cpus=4, gpus=2, nodes=2, pipeline_parallel_size=4))
    [{'CPU': 4, 'GPU': 1.0}, {'GPU': 1.0}, {'CPU': 4, 'GPU': 1.0}, {'GPU': 1.0}]
    """
    node: list[dict[str, float]] = [{"CPU": settled(plan.cpus), "GPU": 1.0}, *[{"GPU": 1.0}] * (int(plan.gpus) - 1)]
    return node * plan.nodes


class Groups:
    """The placement groups of the engines of a stage; inside `with` those whose actors have ended are removed, and at
    its end all."""

    def __init__(self, plan: Distill) -> None:
        self._plan = plan
        self._groups: dict[str, PlacementGroup] = {}
        """By the name of their actor, in the order of their making."""
        self._begun: set[str] = set()
        """Names of actors that were seen."""
        self._placed: set[str] = set()
        self._watch = Watch("distill: the placement groups of its engines", _LOOK_SECONDS, self._look)

    def begin(self) -> dict[str, Any]:
        """Return Ray's options of a new actor, which is to be started before this is called again."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        name = f"engine-{uuid.uuid4().hex[:12]}"
        group = placement_group(bundles(self._plan), strategy="PACK", name=name)
        self._groups[name] = group
        # In the first bundle, which has the CPUs; what vLLM starts goes into the others.
        strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
        return {"name": name, "scheduling_strategy": strategy}

    def __enter__(self) -> Self:
        self._watch.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._watch.__exit__(kind, *error)
        for name in [*self._groups]:
            self._watch.attempt(self._remove, name)

    def _look(self) -> None:
        from ray.util import list_named_actors

        known = [*self._groups]  # before the names are asked for: the actor of all but the last one has been started
        there = {*list_named_actors()}
        for name in known:
            if name in there:
                self._begun.add(name)
                self._report_place(name)
            elif name in self._begun or name != known[-1]:
                self._remove(name)

    def _remove(self, name: str) -> None:
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._groups.pop(name))

    def _report_place(self, name: str) -> None:
        """Log one line where a layer has been spread over nodes that would fit one: their GPUs were not all free."""
        size = self._plan.tensor_parallel_size
        if name in self._placed or not (places := _places(self._groups[name])):
            return
        self._placed.add(name)
        counts = sorted(Counter(places.values()).values(), reverse=True)
        if self._plan.gpus % size == 0 and any(count % size for count in counts):
            gpus = " + ".join(map(str, counts))
            what = f"an engine got {gpus} GPUs of {len(counts)} nodes, so each layer waits for the network between them"
            log(problem("compute.distill.nodes", what, "Free whole nodes"))


class _Placed(Record):
    """What Ray says of a group."""

    state: str
    bundles_to_node_id: dict[int, str]


def _places(group: PlacementGroup) -> dict[int, str]:
    """Return the node of each bundle of a group; none where some have no place yet."""
    from ray.util import placement_group_table

    placed = _Placed.model_validate(placement_group_table(group))
    return placed.bundles_to_node_id if placed.state == "CREATED" else {}


def bring_to_nodes(model: Callable[[], Path]) -> Path:
    """Return the directory of a model, once it lies on every node of this actor's placement group.

    model: what gives it on whatever node. Raises StageFailed where it is another directory there: vLLM gives all its
    processes one path.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    assert group, "its actor was started in one"
    while not (places := _places(group)):  # a node has died: what it had of the group gets another place
        group.wait(_WAIT_SECONDS)
    bring: Any = ray.remote(num_cpus=0)(_bring)
    one_a_node = {node: bundle for bundle, node in places.items()}
    strategies = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in one_a_node.values()]
    here = model()
    for there in ray.get([bring.options(scheduling_strategy=each).remote(model) for each in strategies]):
        if there != here:
            what = f"nodes keep the model in different directories ({here} and {there})"
            raise StageFailed(problem("compute.distill.nodes", what, "Set XDG_CACHE_HOME alike on all nodes"))
    return here


def _bring(model: Callable[[], Path]) -> Path:
    return model()
