"""Hash files on disk, and write them so that a crash leaves no partial file.

In: paths. Out: content hashes, remembered so that a file is read once.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from sdft_ray.errors import StageFailed, UserError, problem
from sdft_ray.store.identity import canonical_json


def cache_directory() -> Path:
    """Return the directory of what may be deleted at any time and is made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdft_ray"


def hash_file(path: Path, kind: str = "sha256") -> str:
    """Return a hash of a file's bytes, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def hash_source(path: Path, without: Sequence[str] = ()) -> str:
    """Return the content hash of a user's own file or directory.

    Files whose names match a pattern of `without`, in any case, do not count.
    """
    if path.is_file():
        return hash_files([path])[0]
    files = [
        file
        for file in source_files(path)
        if not any(fnmatch.fnmatch(file.name.lower(), pattern) for pattern in without)
    ]
    hashes = dict(zip((file.relative_to(path).as_posix() for file in files), hash_files(files), strict=True))
    return hashlib.sha256(canonical_json(hashes).encode()).hexdigest()


def hash_files(files: Sequence[Path]) -> list[str]:
    """Return the sha256 of each of a user's own files, remembered by path, size and mtime.

    The memory lies in the user's cache directory: a hint only, harmless to delete.
    """
    memory = cache_directory() / "hashes.json"
    try:
        remembered = dict(json.loads(memory.read_text()))
    except (OSError, ValueError, TypeError):
        remembered = {}
    hashes, fresh = [], False
    for file in files:
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in remembered:
            remembered[key], fresh = hash_file(file), True
        hashes.append(remembered[key])
    if fresh:
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(memory, json.dumps(remembered))
        except OSError:
            pass  # a read-only home only costs the time of hashing again
    return hashes


def source_files(path: Path) -> list[Path]:
    """Return the files of a user's own file or directory, sorted, without hidden ones such as `.git`."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))


_hashed: dict[tuple[str, int, int], str] = {}


def remember_hash(path: Path, sha256: str) -> None:
    """Remember the hash of a file that this process wrote: `list_files` reads it again only after a change."""
    _hashed[stamp(path)] = sha256


def hash_once(path: Path) -> str:
    """Return the sha256 of a file, from memory where this process hashed it as it wrote it."""
    return _hashed.get(stamp(path)) or hash_file(path)


def stamp(path: Path) -> tuple[str, int, int]:
    """Return what tells a file from another one, and from itself once it was written again."""
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def inside(directory: Path, name: str) -> Path:
    """Return the path of a name below a directory; raises UserError for a name that leads out of it."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise UserError(problem(str(directory), f"names a file outside of it: {name!r}", "Delete it"))
    return directory / name


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader or a crash sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def require_space(folder: Path, needed: int) -> None:
    """Raise StageFailed where a disk has less space left than so many bytes."""
    if (free := shutil.disk_usage(folder).free) < needed:
        what = f"has {free / 1e6:.1f} MB left, and the weights take {needed / 1e6:.1f} MB"
        raise StageFailed(problem(str(folder), what, "Make space there, and do it again"))


def _hidden(path: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(below).parts)
