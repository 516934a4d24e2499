"""The typed form of one compute file: it says where and how something is computed.

In: a YAML file, or nothing (the defaults fit one machine of two cores or more). Out: a frozen `Compute` with every
`auto` settled.
No field here may change a number beyond rounding: such a field belongs to the recipe. None of it is ever hashed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

from sdft_ray.errors import UserError, problem
from sdft_ray.spec.amounts import Count, Gpus, OneGpu, ZeroStage
from sdft_ray.spec.loading import load_section
from sdft_ray.spec.section import Name, Section, require_distinct, require_path
from sdft_ray.spec.throughput import Throughput

Auto = Literal["auto"]
TrackerName = Literal["wandb", "mlflow", "trackio"]
S = TypeVar("S", "Score", "Distill", "Train", "Evaluate")


class Node(Section):
    """The resources of one node."""

    cpus: int = Field(gt=0)
    """CPUs of the node."""
    gpus: float = Field(0, ge=0)
    """GPUs of the node."""


class RayCluster(Section):
    """The Ray cluster that does the work."""

    address: Name = "local"
    """`local` starts one here for the time of the command; `auto` or an address joins a running one."""
    wait_seconds: int = Field(600, ge=0)
    """Seconds to wait for nodes that an autoscaler may still bring, or for others to finish."""
    largest_node: Node | None = None
    """The largest node that an autoscaler can bring; Ray does not know it. Where absent, a stage that fits no running
    node is an error at once."""
    gpu_memory_gb: float | None = Field(None, gt=0)
    """Memory of one GPU in GB, with which `sdft check` decides whether a stage fits."""


class Score(Section):
    """Actors that each measure texts with the base model, for the stages score, loss and patch."""

    actors: int = Field(1, gt=0)
    """Number of actors."""
    cpus: Count | Auto = "auto"
    """CPUs of one actor; `auto` shares this machine's cores among the actors."""
    gpus: OneGpu = 0
    """GPUs of one actor: 1, or a part of one; 0 computes on the CPU."""
    batch_size: int = Field(8, gt=0)
    """Texts of one forward pass."""
    weights: Literal["resident", "streamed"] | Auto = "auto"
    """Weights of the base that an actor holds: all (`resident`), or those of one block at a time, which takes all texts
    of the actor and is read once (`streamed`). `auto` streams where all would take more than four fifths of the memory
    of an actor, which is known of this machine, and of GPUs by ray.gpu_memory_gb."""


class Engine(Section):
    """vLLM options that change speed and memory only; names are vLLM's own unless said otherwise."""

    enforce_eager: bool = True
    """Run without compilation: on two cores compiled code is a twelfth faster and starts a minute later."""
    max_num_seqs: int = Field(128, gt=0)
    """Sequences that are generated at once, at most."""
    max_num_batched_tokens: int | None = Field(None, gt=0)
    """Tokens of one pass of the engine, at most; vLLM decides where absent."""
    max_model_len: int | None = Field(None, gt=0)
    """Tokens of prompt and answer together, at most; the model's context where absent."""
    kv_cache_gib: float = Field(2.0, gt=0)
    """GiB of the KV cache on a CPU; a GPU takes gpu_memory_utilization instead."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Fraction of a GPU's memory that the engine takes."""
    enable_prefix_caching: bool = True
    """Whether prompts with the same beginning share its part of the KV cache."""
    block_size: int | None = Field(None, gt=0)
    """Tokens of one block of the KV cache; vLLM decides where absent."""
    async_scheduling: bool | None = None
    """Whether the next pass is scheduled while one is computed; vLLM decides where absent."""
    cpu_offload_gb: float | None = Field(None, ge=0)
    """GB of weights held in a GPU machine's main memory, for models that a GPU is too small for."""
    kv_offloading_size: float | None = Field(None, gt=0)
    """GiB of main memory that the KV cache of a GPU may spill into."""
    enable_expert_parallel: bool | None = None
    """Whether the experts of a mixture are spread over the GPUs of an actor; vLLM decides where absent."""
    safetensors_load_strategy: Literal["lazy", "eager", "prefetch"] | None = None
    """How weights are read from disk; vLLM decides where absent."""


class Pool(Section):
    """A number of actors or workers that follows the capacity of the cluster; a plain number stands for both ends."""

    min: int = Field(1, gt=0)
    """The fewest with which the stage starts and continues."""
    max: int = Field(gt=0)
    """The most that are started."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}. Lower min")
        return self


class EngineOptions(Engine):
    """What an actor starts its engine with."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    distributed_executor_backend: Literal["ray"] | None = None
    """vLLM decides where absent: one process, or one a GPU of its node."""


def _as_pool(given: Any) -> Any:
    if isinstance(given, Mapping | Pool):
        return given
    if type(given) is int and given > 0:
        return {"min": given, "max": given}
    raise ValueError(f"{json.dumps(given)} is no number of processes. Give 1 or more, or min and max")


OneNumberOrPool = Annotated[Pool, BeforeValidator(_as_pool, json_schema_input_type=Count | Pool)]


class Endpoint(Section):
    """How an endpoint is asked, where `distill.teacher` names one."""

    requests: int = Field(32, gt=0)
    """Requests that it works on at once, shared among the actors."""
    timeout_seconds: float = Field(600, gt=0)
    """Seconds that one answer may take; then it is asked for again."""
    patience_seconds: float = Field(900, ge=0)
    """Seconds without any answer after which the stage stops: a server may be started anew meanwhile."""


_SIZES = ("tensor_parallel_size", "pipeline_parallel_size")


class Distill(Section):
    """Actors that each hold a vLLM engine, or ask an endpoint."""

    actors: OneNumberOrPool = Pool(max=1)
    """Number of actors; {min: 1, max: 16} grows with the capacity of the cluster and shrinks when rows run out."""
    cpus: Count | Auto = "auto"
    """CPUs of one actor on each of its nodes; `auto` shares this machine's cores among the actors."""
    gpus: Gpus = 0
    """GPUs of one actor on each of its nodes; 0 generates on the CPU."""
    nodes: Count = 1
    """Nodes that the engine of one actor is spread over, for a model that the GPUs of one node are too small for."""
    tensor_parallel_size: int = Field(1, gt=0)
    """GPUs that each layer of the model is spread over; it must divide the attention heads. Those of one node are
    fastest: with more each layer waits for the network."""
    pipeline_parallel_size: int = Field(1, gt=0)
    """Groups of GPUs that the blocks of the model are spread over. Both sizes multiplied are nodes x gpus."""
    batch_rows: int = Field(2048, gt=0)
    """Rows handed to an actor at once, fewer where there are too few for all actors. Its engine schedules them itself
    and runs empty only at their end."""
    piece_rows: int = Field(16, gt=0)
    """Finished rows that are made durable together: the most that a kill can cost one actor. Where they take less than
    piece_seconds, it is what that time brings."""
    piece_seconds: float = Field(0.25, ge=0)
    """Seconds between two pieces of one actor, at least: a fast engine writes larger ones instead of more."""
    max_failures: int = Field(10, ge=0)
    """Deaths of one actor, or over one batch, after which the stage fails; a poison row, which kills its engine, is
    set aside after about 5."""
    engine: Engine = Engine()
    endpoint: Endpoint = Endpoint()

    @model_validator(mode="after")
    def _uses_its_gpus(self) -> Self:
        sizes = {name: size for name in _SIZES if (size := getattr(self, name)) > 1}
        needed, given = math.prod(sizes.values()), self.nodes * self.gpus
        what = " x ".join(f"{name} {size}" for name, size in sizes.items()) or "an engine of one GPU"
        if self.nodes > 1 and self.gpus < 1:
            raise ValueError(f"nodes {self.nodes} with {self.gpus:g} gpus on each hold no engine. Raise gpus")
        if needed > max(1, given):
            fewest = math.ceil(needed / self.nodes)
            nodes = needed / self.gpus if self.tensor_parallel_size <= self.gpus else math.inf
            more = f", or nodes to {nodes:g}" if nodes.is_integer() else ""
            raise ValueError(f"{what} is more than the {given:g} gpus of an actor. Raise gpus to {fewest}{more}")
        if given > max(1, needed):
            do = f"Raise tensor_parallel_size or pipeline_parallel_size, or lower gpus{' or nodes' * (self.nodes > 1)}"
            raise ValueError(f"{what} leaves {given - needed:g} of the {given:g} gpus of an actor idle. {do}")
        return self

    def engine_options(self) -> EngineOptions:
        """Return the options of an actor's engine."""
        sizes = {name: getattr(self, name) for name in _SIZES}
        over_nodes: dict[str, Any] = {"distributed_executor_backend": "ray"} if self.nodes > 1 else {}
        return EngineOptions(**dict(self.engine), **sizes, **over_nodes)

    def endpoint_options(self) -> Endpoint:
        """Return how one actor asks an endpoint."""
        return self.endpoint.model_copy(update={"requests": max(1, self.endpoint.requests // self.actors.max)})


def _path_or_content(value: str | dict[str, JsonValue]) -> str | dict[str, JsonValue]:
    return require_path(value) if isinstance(value, str) else value


class Train(Section):
    """Workers of Ray Train, and how DeepSpeed shares memory among them."""

    workers: OneNumberOrPool = Pool(min=2, max=2)
    """Number of workers; {min: 1, max: 8} trains with as many as the cluster holds, and continues from the last
    checkpoint with another number when that changes."""
    cpus: Count | Auto = "auto"
    """CPUs of one worker; `auto` shares this machine's cores among the workers."""
    gpus: OneGpu = 0
    """GPUs of one worker: 1; 0 trains on the CPU."""
    zero_stage: ZeroStage = 2
    """DeepSpeed spreads over the workers: with 1 the optimizer, with 2 also gradients, with 3 also weights."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep in main memory instead of a GPU's: the optimizer (zero_stage 1 to 3), or the weights too (3)."""
    micro_batch: int = Field(8, gt=0)
    """Rows that one worker takes through forward and backward together, packed into one sequence."""
    pass_tokens: int | None = Field(None, gt=0)
    """Tokens of that sequence at most, for memory; at least train.max_tokens. Absent: as many as its rows have."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    deepspeed: Annotated[str | dict[str, JsonValue], AfterValidator(_path_or_content)] | None = None
    """A file with DeepSpeed's JSON, see configs/deepspeed, or its content here; it is passed on unchanged and must not
    set what a recipe decides."""
    checkpoint_every_steps: int = Field(10, gt=0)
    """Optimizer steps between two training checkpoints: the most that a kill can cost."""
    keep_checkpoints: int = Field(2, gt=0)
    """Training checkpoints that are kept; they are deleted when the stage is done."""
    max_failures: int = Field(3, ge=0)
    """Dead workers that are replaced before the stage fails."""

    @model_validator(mode="after")
    def _offloads_what_is_spread(self) -> Self:
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"offload: {self.offload} needs zero_stage {least}, not {self.zero_stage}. Raise zero_stage to {least}"
            )
        return self


class Evaluate(Section):
    """Ray tasks that each evaluate one model on one task; with `evaluate.engine: vllm`, or several actors, actors that
    share the items of all tasks of one model."""

    actors: Count = 1
    """The most actors of one model. It begins with the first that the cluster holds, and more follow as there is room;
    with 1 transformers has none, but a Ray task for each (model, task)."""
    cpus: Count | Auto = 1
    """CPUs of one (model, task) or actor; several run at once where the cluster holds them."""
    gpus: Gpus = 0
    """GPUs of one (model, task) or actor; 0 evaluates on the CPU. An actor's vLLM spreads each layer over its GPUs:
    their number must divide the attention heads."""
    batch_size: int = Field(16, gt=0)
    """Sequences of one forward pass of transformers."""
    shard_items: Count = 512
    """Items handed to an actor at once, fewer where there are too few for all actors: what a kill can cost it. The
    engine batches them itself and runs empty only at their end."""
    engine: Engine = Engine()
    """vLLM options of an actor, where `evaluate.engine` is vllm."""

    def engine_options(self) -> EngineOptions:
        """Return the options of an actor's engine."""
        return EngineOptions(**dict(self.engine), tensor_parallel_size=max(1, int(self.gpus)))


class Needs(NamedTuple):
    """What the workers of a stage take of the cluster."""

    section: str
    """Of the compute file, that says how many there are and what each takes."""
    alone: bool = False
    """Whether there is one, whatever the section says."""


class Compute(Section):
    """One complete compute file."""

    prefix = ("compute",)
    ray: RayCluster = RayCluster()
    score: Score = Score()
    distill: Distill = Distill()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    throughput: Throughput = Throughput()
    track: Annotated[tuple[TrackerName, ...], AfterValidator(require_distinct)] = ()
    """Trackers in which each training is a run, beside TensorBoard's files and metrics.jsonl, which are always written.
    Each needs its library (`pip install 'sdft-ray[mlflow]'`); keys and addresses come from the environment."""

    def needs(self) -> dict[str, tuple[int, int, float]]:
        """Return how many bundles of how many CPUs and GPUs the stages of each section hold at once, at least; a bundle
        is on one node."""
        engines = self.distill.actors.min * self.distill.nodes
        return {
            "score": (self.score.actors, settled(self.score.cpus), self.score.gpus),
            "distill": (engines, settled(self.distill.cpus), self.distill.gpus),
            "train": (self.train.workers.min, settled(self.train.cpus), self.train.gpus),
            "evaluate": (1, settled(self.evaluate.cpus), self.evaluate.gpus),
        }

    def room(self, processes: int, gpus: float) -> float | None:
        """Return the bytes for each of some processes, of its GPUs or this machine; None where that is not known."""
        if gpus:
            return self.ray.gpu_memory_gb * 1e9 * gpus if self.ray.gpu_memory_gb else None
        if self.ray.address != "local":
            return None
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes

    def streams(self, weights: int, alone: bool = False) -> bool:
        """Return whether processes that measure texts hold one block at a time of a model of so many bytes."""
        if self.score.weights != "auto":
            return self.score.weights == "streamed"
        room = self.room(1 if alone else self.score.actors, self.score.gpus)
        return room is not None and weights > 0.8 * room

    def bundles(self, needs: Needs) -> tuple[int, int, float]:
        """Return how many bundles of how many CPUs and GPUs a stage holds at once, at least."""
        count, cpus, gpus = self.needs()[needs.section]
        return 1 if needs.alone else count, cpus, gpus


def cores() -> int:
    """Return how many cores this process may use: the affinity mask, and in a container its CPU quota."""
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(mask, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return mask


def load_compute(path: Path | Mapping[str, Any] | None = None) -> Compute:
    """Return the compute file at `path` (or its content), or the defaults, with every `auto` settled for this machine.

    Raises UserError where a local cluster could never hold a stage: nobody profits from a silent wait.
    """
    compute = Compute() if path is None else load_section(Compute, path)
    train, available = compute.train, cores()
    if isinstance(train.deepspeed, str):  # workers on other nodes do not have the file
        train = train.model_copy(update={"deepspeed": _read_deepspeed(train.deepspeed)})
    sections = {
        "score": _settle(compute.score, compute.score.actors, available),
        "distill": _settle(compute.distill, compute.distill.actors.max, available),
        "train": _settle(train, train.workers.max, available),
        "evaluate": _settle(compute.evaluate, 1, available),
    }
    compute = compute.model_copy(update=sections)
    if compute.ray.address == "local":
        if (nodes := compute.distill.nodes) > 1:
            what = f"{nodes} are more than this machine, the one node of compute.ray.address: local"
            raise UserError(problem("compute.distill.nodes", what, "Give compute.ray.address a running cluster"))
        short = [
            problem(
                f"compute.{name}",
                f"{bundles} x {cpus} CPUs = {bundles * cpus} is more than the {available} cores of this machine",
                f"Lower compute.{name}.{'cpus' if bundles == 1 else 'workers' if name == 'train' else 'actors'}",
            )
            for name, (bundles, cpus, _) in compute.needs().items()
            if bundles * cpus > available
        ]
        if short:
            raise UserError(*short)
    return compute


def _settle(section: S, processes: int, available: int) -> S:
    """Return a section whose `cpus` is a number: where it is auto, processes share those that are available."""
    return section.model_copy(update={"cpus": max(1, available // processes)}) if section.cpus == "auto" else section


def _read_deepspeed(path: str) -> dict[str, JsonValue]:
    where = f"compute.train.deepspeed: {path}"
    try:
        given = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(problem(where, f"is no JSON file that can be read ({error})", "Give another file")) from None
    if not isinstance(given, dict):
        raise UserError(problem(where, "is not a JSON object", "See configs/deepspeed for one"))
    return given


def settled(cpus: int | Auto) -> int:
    """Return a number of CPUs that `load_compute` has settled."""
    assert cpus != "auto"
    return cpus
