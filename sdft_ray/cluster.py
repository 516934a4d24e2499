"""The Ray cluster that stages run on: joined or started, quiet, and large enough before anything waits on it.

In: the compute file. Out: an initialised Ray in this process. Ray waits silently and without end; here a need that no
node can meet is an error at once, and nodes that an autoscaler may bring are waited for with a visible line.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple, Self, TypeVar

from sdft_ray import environment
from sdft_ray.errors import StageFailed, UserError, counted, problem
from sdft_ray.progress import Progress, log, quiet_transformers
from sdft_ray.spec.compute import Compute, Needs, cores

A = TypeVar("A")
B = TypeVar("B")
TOKEN = "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"


@contextmanager
def ray_cluster(compute: Compute) -> Iterator[None]:
    """Hold a connection to the cluster; a local cluster is started before and stopped after.

    A connection that a sweep or this worker already holds is used as it is.
    """
    environment.for_ray()
    import ray
    import ray.data
    import ray.train
    from ray.util.annotations import RayDeprecationWarning

    # Numbers of tries and restarts, and groups of actors, have no parameter of their own yet (docs/footguns.md).
    warnings.filterwarnings("ignore", "`ray_remote_args(_fn)?` is deprecated", RayDeprecationWarning)
    if ray.is_initialized():
        yield
        return
    for name in ("ray", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the trace of what it raises, too
    ray.data.DataContext.get_current().enable_progress_bars = False
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    on_end = signal.getsignal(signal.SIGTERM)
    with Progress("ray") as progress, _native_stderr_closed():
        progress.enter("connecting" if compute.ray.address != "local" else "starting")
        _connect(compute, quiet)
    if threading.current_thread() is threading.main_thread():  # elsewhere Ray sets none, and nobody may
        signal.signal(signal.SIGTERM, on_end)  # Ray's prints a stack and aborts
    try:
        yield
    finally:
        ray.shutdown()
        if compute.ray.address == "local":
            environment.forget("RAY_API_SERVER_ADDRESS")


def _connect(compute: Compute, quiet: dict[str, Any]) -> None:
    import ray

    if compute.ray.address == "local":
        # The dashboard stays on, on loopback: Ray Train asks it who is dead.
        host, port = "127.0.0.1", _free_port()
        environment.for_local_ray(f"http://{host}:{port}")
        dashboard: dict[str, Any] = {"include_dashboard": True, "dashboard_host": host, "dashboard_port": port}
        try:
            ray.init(address="local", num_cpus=cores(), **dashboard, **quiet)
        except Exception as error:  # Ray raises a bare one where this machine is too busy to start it
            what = f"Ray did not start on this machine ({str(error).strip().splitlines()[-1]})"
            do = "Run the same command again when it is less busy; what was finished is kept"
            raise StageFailed(problem("compute.ray.address: local", what, do)) from error
        return
    where, address = f"compute.ray.address: {compute.ray.address}", compute.ray.address
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    server, _, number = address.rpartition(":")
    try:
        if server and number.isdecimal() and "://" not in server:
            # Ray itself tries for minutes where nobody listens, and of a wrong token it says only that it failed.
            socket.create_connection((server.strip("[]"), int(number)), 10).close()
            ray._raylet.GcsClient(address=address)  # type: ignore[attr-defined]
        ray.init(address=address, **quiet)
    except ray.exceptions.AuthenticationError:
        what = "this cluster asks for a token, and yours is missing or wrong"
        raise UserError(problem(where, what, f"Set {TOKEN}")) from None
    except (OSError, OverflowError, ray.exceptions.RpcError) as error:
        do = f"Start Ray there; if it asks for a token, set {TOKEN}"
        raise UserError(problem(where, f"no Ray answers there ({error})", do)) from None
    except ValueError as error:  # among others a name without a port, or a dashboard's address
        do = "Give HOST:PORT of its head there, or auto and that in RAY_ADDRESS"
        raise UserError(problem(where, f"is no address of Ray ({str(error).splitlines()[0]})", do)) from None
    except RuntimeError as error:  # another Ray or Python, or this machine is none of its nodes
        do = "Use sdft submit, which runs this on a node of that cluster"
        raise UserError(problem(where, " ".join(str(error).split()), do)) from None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Keep the output of Ray's C++ core off the terminal while it starts; its errors are still raised."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device, not a path of ours
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class RayNode(NamedTuple):
    """A node of the cluster, and what it has, free or not."""

    cpus: float
    gpus: float = 0
    id: str = ""
    host: str = ""
    address: str = ""


def live_nodes() -> list[RayNode]:
    """Return each node that is alive."""
    import ray

    alive = [(node, node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return [
        RayNode(
            has.get("CPU", 0),
            has.get("GPU", 0),
            node["NodeID"],
            node["NodeManagerHostname"],
            node["NodeManagerAddress"],
        )
        for node, has in alive
    ]


def count_places(nodes: Iterable[RayNode], cpus: int, gpus: float) -> int:
    """Return how many processes of so many CPUs and GPUs fit on nodes, each on one node.

    >>> count_places([RayNode(3), RayNode(4, 1)], 2, 0), count_places([RayNode(3), RayNode(4, 1)], 2, 1)
    (3, 1)
    >>> count_places([RayNode(16, 2)], 1, 0.2), count_places([RayNode(16, 2)], 1, 0.6)
    (10, 2)
    """
    return sum(int(min(node.cpus // cpus, _gpu_places(node.gpus, gpus))) for node in nodes)


_GPU = 10_000  # parts of a GPU, as Ray counts; a process of less than one has its parts of one GPU, not of two


def _gpu_parts(gpus: float) -> list[int]:
    """Return the parts of each of a node's GPUs."""
    whole, rest = divmod(round(gpus * _GPU), _GPU)
    return [_GPU] * whole + [rest] * bool(rest)


def _gpu_places(there: float, gpus: float) -> float:
    """Return how many processes of so many GPUs fit on those that are there."""
    if not gpus:
        return math.inf
    return there // gpus if gpus >= 1 else sum(parts // max(1, round(gpus * _GPU)) for parts in _gpu_parts(there))


def _without(parts: Sequence[int], gpus: float) -> list[int] | None:
    """Return the parts of each GPU that a process of so many GPUs leaves; None where it does not fit on them."""
    left, each = sorted(parts), min(_GPU, round(gpus * _GPU))
    for _ in range(math.ceil(gpus)):
        i = next((i for i, free in enumerate(left) if free >= each), None)
        if i is None:
            return None
        left[i] -= each
    return left


def require_capacity(compute: Compute, needs: Needs, stage: str) -> None:
    """Return once the cluster has free what a stage takes of it.

    Raises UserError at once for a need that no node can meet, else after wait_seconds. A placement group waits: it
    counts free resources, and an autoscaler answers its demand with nodes.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    bundles, cpus, gpus = compute.bundles(needs)
    where = f"compute.{needs.section}"
    nodes = live_nodes()
    coming = compute.ray.largest_node
    sizes = [*nodes, *([RayNode(coming.cpus, coming.gpus)] if coming else [])]
    if not any(cpus <= size.cpus and gpus <= size.gpus for size in sizes):
        largest = max(sizes, key=lambda size: (size.gpus, size.cpus) if gpus else (size.cpus, size.gpus))
        what = f"needs {cpus} CPUs and {gpus:g} GPUs on one node; the largest has {largest.cpus:g} and {largest.gpus:g}"
        key = "cpus" if cpus > largest.cpus else "gpus"
        raise UserError(problem(where, f"{what} (compute.ray.largest_node counts)", f"Lower {where}.{key}"))
    group = placement_group([{"CPU": cpus, **({"GPU": gpus} if gpus else {})}] * bundles)
    try:
        if count_places(nodes, cpus, gpus) >= bundles and group.wait(5):
            return
        all_cpus, all_gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
        capacity = f"{all_cpus:g} CPUs and {all_gpus:g} GPUs on {counted(len(nodes), 'node')}"
        what = f"needs {bundles} x ({cpus} CPUs, {gpus:g} GPUs); the cluster has {capacity}"
        log(f"{stage}: {what}; waiting up to {compute.ray.wait_seconds} s for that much to be free")
        if not group.wait(compute.ray.wait_seconds):
            raise UserError(problem(where, what, f"Lower {where}"))
    finally:
        remove_placement_group(group)


def fit_together(nodes: Iterable[RayNode], *needs: tuple[int, int, float]) -> bool:
    """Return whether nodes hold all of several (processes, CPUs and GPUs of each) at once.

    >>> fit_together([RayNode(2)], (1, 1, 0), (1, 1, 0)), fit_together([RayNode(2)], (1, 1, 0), (1, 2, 0))
    (True, False)
    >>> fit_together([RayNode(9, 1)], (2, 1, 0.4), (1, 1, 0.2)), fit_together([RayNode(9, 2)], (3, 1, 0.6))
    (True, False)
    """
    free = [(node.cpus, _gpu_parts(node.gpus)) for node in nodes]
    for cpus, gpus in [(cpus, gpus) for processes, cpus, gpus in needs for _ in range(processes)]:
        for i, (idle, parts) in enumerate(free):
            if idle >= cpus and (left := _without(parts, gpus)) is not None:
                free[i] = idle - cpus, left
                break
        else:
            return False
    return True


def begin_work() -> None:
    """Make transformers quiet in this task or actor, and let torch use the cores that Ray gave it: its process may have
    served one with more before.

    Three busy threads on two cores cost more than the third: each layer waits for the slowest.
    """
    import ray
    import torch

    quiet_transformers()
    if ray.is_initialized() and (context := ray.get_runtime_context()).worker.mode == ray.WORKER_MODE:
        torch.set_num_threads(max(1, int(context.get_assigned_resources().get("CPU", 1))))


def on_this_node() -> Any:
    """Return the scheduling strategy that keeps a task or an actor on the driver's own node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def ticker() -> Any:
    """Return a new actor to which workers report how far they are, and from which the driver reads each report once."""
    import ray

    # Ray puts an actor without needs on any node; on the driver's own node it dies only with the driver.
    return ray.remote(num_cpus=0, scheduling_strategy=on_this_node())(_Ticker).remote()


class _Ticker:
    def __init__(self) -> None:
        self._reports: list[Any] = []

    def report(self, report: Any) -> None:
        self._reports.append(report)

    def read(self) -> list[Any]:
        reports, self._reports = self._reports, []
        return reports


# --- tasks ----------------------------------------------------------------------------------------------------


def in_tasks(
    function: Callable[[A], B], items: Sequence[A], tries: int = 3, cpus: int = 1, gpus: float = 0
) -> Iterator[B]:
    """Yield what a function makes of each item, in order, in tasks of Ray Data of so many CPUs and GPUs each.

    A task whose process dies is tried again, so often; an error of the function itself ends the work.
    """
    import ray.data

    def work(row: dict[str, Any]) -> dict[str, bytes]:
        # Rows of Arrow hold no objects of ours; the bytes go only between this driver and its own tasks, as Ray's do.
        return {"made": pickle.dumps(function(pickle.loads(row["item"])))}

    # Ray Data's own default is to try for ever.
    asked = [{"item": pickle.dumps(item)} for item in items]
    takes: dict[str, Any] = {"num_cpus": cpus, **({"num_gpus": gpus} if gpus else {})}
    dataset = ray.data.from_items(asked, override_num_blocks=len(asked)).map(work, **takes, max_retries=tries)
    dataset.context.execution_options.preserve_order = True
    dataset.context.raise_original_map_exception = True  # else a UserError is lost in the wrapper of Ray's
    for row in dataset.iter_rows():
        yield pickle.loads(row["made"])


# --- threads and errors ---------------------------------------------------------------------------------------


def in_thread(work: Callable[..., None], *arguments: Any) -> Future[None]:
    """Return the future of work in a daemon thread: a process waits at its end for the threads of an executor."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work(*arguments)
            future.set_result(None)
        except BaseException as error:  # noqa: BLE001 - whoever reads the result gets it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Watch:
    """Looks at something every so many seconds, in a thread, while a block runs, and once behind a block without error.

    What goes wrong in it must end nothing: its first error is one line, and it goes on.
    """

    def __init__(self, what: str, seconds: float, look: Callable[[], None]) -> None:
        self._what, self._seconds, self._look = what, seconds, look
        self._ended, self._failed = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:  # else Ray itself may be gone
            self.attempt(self._look)

    def attempt(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do a part of the work whose error must not end the rest."""
        try:
            work(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, what is watched goes on
            if not self._failed:
                log(f"{self._what}: {last_line(error)}; nothing else depends on it, and further errors are not shown")
            self._failed = True

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            self.attempt(self._look)


def below_ray(error: BaseException) -> BaseException:
    """Return the error that a worker raised, without the wrappers that Ray puts around it."""
    while type(error).__name__ in ("SystemException", "UserCodeException") and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__ or error
    return getattr(error, "cause", None) or error


def last_line(error: BaseException) -> str:
    """Return an error's type and the last line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
