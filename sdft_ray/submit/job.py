"""A recipe or sweep as a job of a running Ray cluster.

In: a recipe or sweep file, a compute file, the address of the cluster's dashboard. Out: a job that runs the chain
there, and its exit code. The job carries this package and the local files that the recipe names: rows, texts, a small
model. Large files belong under the root, which every node sees: Ray uploads a job whole and keeps it in the head's
memory. The job is a zip file of ours: of a directory Ray would skip all that a `.gitignore` names, weights included.
"""

from __future__ import annotations

import asyncio
import logging
import ntpath
import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

from sdft_ray import environment
from sdft_ray.cluster import TOKEN
from sdft_ray.data.copies import is_address
from sdft_ray.data.files import matching_files, split_glob
from sdft_ray.data.text import first_line
from sdft_ray.errors import StageFailed, UserError, problem
from sdft_ray.progress import log
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.loading import dump_yaml, is_sweep, load_recipe, load_section, read_yaml
from sdft_ray.spec.sweep import Sweep
from sdft_ray.store.files import source_files
from sdft_ray.store.objects import is_store

MAX_MB = 90  # Ray's dashboard takes uploads of up to 100 MiB
_PATHS = ("path", "text", "tokenizer", "deepspeed")  # keys of recipes and compute files whose values are local paths
_FREE = ("options", "template_options")  # keys below which a user's own keys stand


def pack(recipe: Path, compute: Path | None, root: str, until: str | None, archive: Path) -> str:
    """Write all files of a job into the zip file `archive`, which becomes its directory; return its shell command.

    Raises UserError for mistakes in the files, for files too large for a job, and for a root that nodes cannot share.
    """
    require_shared(root)
    name = f"{recipe.stem}.yaml"
    command = ["sweep", name] if is_sweep(recipe) else ["run", name]
    if is_sweep(recipe):
        if until:
            raise UserError(problem("--until", "is for recipes", "Leave out --until"))
        inner = [recipe.parent / path for path in load_section(Sweep, recipe).recipe]
        data = read_yaml(recipe) | {"recipe": [f"recipes/{i}/{path.name}" for i, path in enumerate(inner)]}
    else:
        load_recipe(recipe)
        data, inner = read_yaml(recipe), []
    files = {name: data, "compute/compute.yaml": on_cluster(compute)}
    for place, path in zip(data.get("recipe", []), inner, strict=True):
        load_recipe(path)
        files[place] = read_yaml(path)
    shipped: dict[Path, str] = {}
    texts = {place: dump_yaml(with_shipped(values, "", root, shipped)) for place, values in files.items()}
    _require_small(shipped, root)
    _write(archive, texts, {**_package(), **shipped})
    stop = ["--until", until] if until else []
    return shlex.join(
        ["python", "-m", "sdft_ray.cli", *command, "--compute", "compute/compute.yaml", "--root", root, *stop]
    )


def _package() -> dict[Path, str]:
    """Return the files of this package with their places in the job."""
    here = Path(__file__).parents[1]
    files = [file for file in source_files(here) if file.suffix != ".pyc"]
    return {file: file.relative_to(here.parent).as_posix() for file in files}


def _write(archive: Path, texts: Mapping[str, str], shipped: Mapping[Path, str]) -> None:
    """Write texts, files and directories to their places in a zip file.

    Equal contents make equal bytes: Ray names an upload by its hash, and does not upload the same twice.
    """
    with ZipFile(archive, "w") as packed:
        for place, text in texts.items():
            packed.writestr(_entry(place), text)
        for source, place in shipped.items():
            start, pattern = split_glob(source)
            end = Path(place.removesuffix(pattern))
            for file in _files(source):
                packed.writestr(_entry((end / file.relative_to(start)).as_posix()), file.read_bytes())


def _entry(place: str) -> ZipInfo:
    if ntpath.splitdrive(place)[0] or "\\" in place:
        raise UserError(problem(place, "has a name that Ray does not unpack", "Rename it without : and \\"))
    entry = ZipInfo(place)
    entry.external_attr = 0o644 << 16
    return entry


def require_shared(root: str) -> None:
    """Raise UserError for a root that means another place on every machine."""
    if not is_store(root) and not Path(root).is_absolute():
        what = f"{root} is relative, and a job has no directory of its own that lasts"
        raise UserError(problem("--root", what, "Give an absolute path that every node sees, or an s3:// URI"))


def on_cluster(compute: Path | None) -> dict[str, Any]:
    """Return a checked compute file as plain data, for a job that joins the cluster it runs on."""
    if compute:
        load_section(Compute, compute)
    data = read_yaml(compute) if compute else {}
    return {**data, "ray": {**(data.get("ray") or {}), "address": "auto"}}


def with_shipped(value: Any, key: str, root: str, shipped: dict[Path, str]) -> Any:
    """Return plain data in which each local path is the one it will have in the job; note those in `shipped`.

    A file keeps its name, which becomes part of artifacts' names. Paths under the root stay as they are, and so does
    an absolute path that is missing here: it is on the nodes, or the job reports that it is missing.
    """
    if key in _FREE:
        return value
    if isinstance(value, Mapping):
        inner = {name: key if name == "values" else str(name).rpartition(".")[2] for name in value}
        return {name: with_shipped(part, inner[name], root, shipped) for name, part in value.items()}
    if isinstance(value, list):
        return [with_shipped(part, key, root, shipped) for part in value]
    if key not in _PATHS or not isinstance(value, str) or value == "boolq" or is_address(value):
        return value
    path = Path(os.path.abspath(Path(value).expanduser()))  # noqa: PTH100 - a link keeps its name
    start, pattern = split_glob(path)
    if pattern and _files(path):
        if not is_store(root) and start.is_relative_to(root):
            return value
        return shipped.setdefault(path, f"files/{len(shipped)}/{start.name}/{pattern}")
    if not path.exists():
        if Path(value).is_absolute():
            return value
        raise UserError(problem(key, f"{value} does not exist", "Check the path: it is relative to where you are"))
    if not is_store(root) and path.is_relative_to(root):
        return value
    return shipped.setdefault(path, f"files/{len(shipped)}/{path.name}")


def _require_small(shipped: Mapping[Path, str], root: str) -> None:
    sizes = {path: size_mb(path) for path in shipped}
    if sum(sizes.values()) > MAX_MB:
        largest = max(sizes, key=lambda path: sizes[path])
        what = f"{sizes[largest]:.0f} MB; a job carries at most {MAX_MB} MB in all"
        do = f"Put it under {root} and give that path"
        if is_store(root):
            do = "Put it on a path that every node sees"
        raise UserError(problem(str(largest), what, do))


def size_mb(path: Path) -> float:
    """Return the size of a file, or of the files of a directory or glob that count."""
    return sum(file.stat().st_size for file in _files(path)) / 1e6


def _files(path: Path) -> list[Path]:
    """Return the files of a job that a path names: one, those of a directory, or those that a glob matches."""
    start, pattern = split_glob(path)
    return matching_files(start, pattern) if pattern else source_files(path)


def submit(address: str, archive: Path, command: str, name: str) -> tuple[Any, str]:
    """Start a packed job on the cluster whose dashboard is at `address`; return a client and the job's id."""
    client = connect(address)
    place = {"working_dir": str(archive)}
    try:
        return client, client.submit_job(entrypoint=command, runtime_env=place, metadata={"recipe": name})
    except RuntimeError as error:
        raise UserError(problem(address, f"refuses the job ({first_line(error)})", "Fix this")) from None
    except OSError as error:  # of requests, in the upload
        lost = f"submit: the connection to {address} is lost ({first_line(error)})"
        raise StageFailed(f"{lost}. If `ray job list --address {address}` does not have it, submit again.") from None


def connect(address: str) -> Any:
    """Return a client of the job API; raises UserError where no dashboard answers or the token is wrong."""
    # Ray prefers these to an address that it is given.
    environment.forget("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if "@" in address:  # it is not repeated: it holds a secret
        what = "the address holds credentials, which would end up in logs"
        raise UserError(problem("--address", what, f"Leave them out and set {TOKEN}"))
    if not address.startswith(("http://", "https://")):
        what = f"{address} is not the address of a dashboard"
        raise UserError(problem("--address", what, "Give for example http://127.0.0.1:8265"))
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        what = "this cluster asks for a token, and yours is missing or wrong"
        raise UserError(problem(address, what, f"Set {TOKEN}")) from None
    except (ConnectionError, RuntimeError, requests.RequestException) as error:
        do = "Check --address"
        raise UserError(problem(address, f"no Ray dashboard answers ({first_line(error)})", do)) from None


def follow(client: Any, job: str, address: str) -> int:
    """Print a job's log until it ends, and return its exit code."""
    import aiohttp

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    logs = f"ray job logs --follow --address {address} {job}"
    try:
        asyncio.run(tail())
        while not (info := client.get_job_info(job)).status.is_terminal():
            time.sleep(0.5)
    except KeyboardInterrupt:
        log(f"The job goes on. Follow it: {logs}; stop it: ray job stop --address {address} {job}")
        raise
    except (OSError, RuntimeError, aiohttp.ClientError) as error:
        lost = f"submit: the connection to {address} is lost ({first_line(error)})"
        raise StageFailed(f"{lost}. Follow the job: {logs}.") from None
    if info.driver_exit_code is None:
        if info.status == "SUCCEEDED":
            return 0
        raise StageFailed(
            f"submit: job {job} {info.status.lower()}: {first_line(info.message)}. Submit again to go on."
        )
    return info.driver_exit_code if info.driver_exit_code >= 0 else 128 - info.driver_exit_code
