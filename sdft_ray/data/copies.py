"""Copies of row files that lie in an object store or behind another address: everything else reads files.

In: an address such as s3://bucket/rows/*.jsonl. Out: the path of its copy in the user's cache directory, with the same
directories and names, so that a directory or a glob means what it means on a disk. A file is copied again only where
the store says that it changed; a copy that breaks off counts for nothing. fsspec reads every kind of address.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from sdft_ray.data.text import first_line
from sdft_ray.errors import UserError, problem
from sdft_ray.store.files import cache_directory, inside
from sdft_ray.store.locks import file_lock
from sdft_ray.store.objects import SCHEMES, is_file, read_address, version_of
from sdft_ray.store.record import Record

_KNOWN = "copies.json"  # beside the copies


class _Known(Record):
    """What is known of copies."""

    start: str
    """The address of what they lie below."""
    files: dict[str, str]
    """For each what the store said of it."""


def is_address(text: str) -> bool:
    """Return whether a path of a recipe names files elsewhere."""
    return read_address(text) is not None


@functools.lru_cache
def local_path(address: str, where: str) -> str:
    """Return the path of the copy of what an address names: a file, a directory, or a directory with a glob.

    The store is asked once a process, so that what is hashed is what is read. Raises UserError where it cannot be read.
    """
    with _explained(address, where):
        filesystem, path = _open(address, where)
        start, pattern = _split(path)
        found = filesystem.glob(path, detail=True) if pattern else _list(filesystem, path)
        files = {name: info for name, info in found.items() if is_file(info)}
        if not files:
            what = f"{address} {'matches no file' if pattern else 'does not exist, or is empty'}"
            raise UserError(problem(where, what, "Check the address"))
        if [*files] == [path]:  # a single file: the last part of its path is what a pattern is to others
            start = path.partition("?")[0].rpartition("/")[0]
            pattern = _name_of_copy(start, path[len(start) + 1 :])
        folder = _folder(address) / re.sub(r"[\s:]", "_", PurePosixPath(start).name or "files")
        with file_lock(_root(), f"copy-{_folder(address).name}"):
            _refresh(filesystem, files, start, folder, address)
    return str(folder / pattern)


def name_addresses(line: str) -> str:
    """Return a message with addresses in place of their copies, whose paths mean nothing to people."""

    def address(match: re.Match[str]) -> str:
        return f"{_Known.from_file(_root() / match[1] / _KNOWN).start}{match[2]}"

    return re.sub(rf"{re.escape(str(_root()))}/([0-9a-f]{{16}})/[^/\s:]+([^\s:]*)", address, line)


def _root() -> Path:
    return cache_directory() / "copies"


def _folder(address: str) -> Path:
    return _root() / hashlib.sha256(address.encode()).hexdigest()[:16]


def _open(address: str, where: str) -> tuple[Any, str]:
    """Return the file system of an address, and its path there."""
    import fsspec

    scheme = address.partition("://")[0]
    try:
        filesystem, path = fsspec.url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        do = f"Do: pip install {SCHEMES[scheme]}" if scheme in SCHEMES else "Install it"
        raise UserError(problem(where, f"{scheme}:// needs a package ({first_line(error)})", do)) from None
    except ValueError as error:
        raise UserError(problem(where, f"{address}: {first_line(error)}", "Check the address")) from None
    return filesystem, str(path)


def _split(path: str) -> tuple[str, str]:
    """Return the directory that a glob starts at, and the rest of it; an empty rest where the path is no glob."""
    parts = path.split("/")
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _list(filesystem: Any, path: str) -> dict[str, Any]:
    """Return the file at a path, or what is below a directory."""
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        return {}
    if is_file(info):
        return {path: info}
    found: dict[str, Any] = filesystem.find(path, detail=True)
    return found


def _refresh(filesystem: Any, files: dict[str, Any], start: str, folder: Path, address: str) -> None:
    """Make the copies of files below a directory equal to what the store has."""
    notes = folder.parent / _KNOWN
    known = _Known.from_file(notes).files if notes.is_file() else {}
    shown = address.partition("://")[0] + "://" + start if not start.startswith("http") else start
    stamps = {
        name.removeprefix(f"{start}/"): version_of(info) or f"{info.get('size')} {filesystem.ukey(name)}"
        for name, info in files.items()
    }
    for name, stamp in stamps.items():
        copy = inside(folder, _name_of_copy(start, name))
        if known.get(name) == stamp and copy.is_file():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.parent / f".{copy.name}.partial"
        filesystem.get_file(f"{start}/{name}", str(partial))
        partial.replace(copy)
    copied = {_name_of_copy(start, name) for name in stamps}
    for copy in folder.rglob("*"):
        if copy.is_file() and copy.relative_to(folder).as_posix() not in copied:
            copy.unlink()
    _Known(start=shown, files=stamps).to_file(notes)


def _name_of_copy(start: str, name: str) -> str:
    """Return the name of a file's copy: without what a web address asks for, as `rows.jsonl?download=true` does."""
    return name.partition("?")[0] if start.startswith("http") else name


@contextlib.contextmanager
def _explained(address: str, where: str) -> Iterator[None]:
    """Turn exceptions of the libraries into a UserError that names the address and the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library of each store has kinds of errors of its own
        if isinstance(error, OSError) and str(error.filename or "").startswith("/"):  # the local disk
            raise
        do = "Check the address and the credentials that the store's library reads"
        raise UserError(problem(where, f"{address} cannot be read ({first_line(error)})", do)) from error
