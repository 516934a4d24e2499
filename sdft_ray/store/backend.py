"""The interface of `Storage` to the place of artifacts: a directory or an object store.

Names are paths below the root, with slashes. Every node has a directory, `root`: the place itself, or a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sdft_ray.store.lease import Lease
from sdft_ray.store.manifest import Manifest


class Listing(NamedTuple):
    """The content of a folder of the root."""

    sizes: dict[str, int]
    """The bytes of every object below the folder, by name; empty for a directory."""
    names: dict[str, list[str]]
    """The names of the directories in the folder, by the ids at their ends."""


def id_in(name: str) -> str:
    """Return the id at the end of a directory's name."""
    return name.rpartition("-")[2]


def by_id(names: Iterable[str]) -> dict[str, list[str]]:
    """Return names by the ids at their ends."""
    names_by_id: dict[str, list[str]] = {}
    for name in names:
        names_by_id.setdefault(id_in(name), []).append(name)
    return names_by_id


def make_directory(path: Path) -> Path:
    """Make a directory where it is missing, and return it."""
    path.mkdir(parents=True, exist_ok=True)
    return path


class Backend(Protocol):
    """A place for artifacts."""

    uri: str
    """The name of the root for people."""
    root: Path
    """The directory on this node."""
    shared: bool
    """Whether every node sees the same directory: then `bring` and `publish` do nothing."""

    def list(self, folder: str) -> Listing:
        """Return the content of a folder."""
        ...

    def manifests(self) -> Iterable[str]:
        """Return the names of all manifests."""
        ...

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None where there is none."""
        ...

    def read_manifest(self, key: str) -> Manifest | None:
        """Return the manifest of an artifact, or None where it is not finished."""
        ...

    def finished(self, key: str, sizes: Callable[[], Mapping[str, int]]) -> Manifest | None:
        """Return the manifest of an artifact that is finished; raises UserError where it lost or shortened a file.

        sizes: returns the listing of its folder.
        """
        ...

    def fetch(self, key: str, manifest: Manifest, pattern: str, prove: bool) -> Path:
        """Return the directory on this node with those files of an artifact that match; hashes are compared where
        files are brought, and where `prove` asks for it."""
        ...

    def publish(self, files: Iterable[Path]) -> None:
        """Make pieces of work durable, and visible to other nodes."""
        ...

    def bring(self, folder: Path, pattern: str) -> None:
        """Make this node's copy of a directory of work equal to the root's, for names below it that match."""
        ...

    def mirror(self, folder: Path) -> None:
        """Make the root's copy of a directory of work equal to this node's."""
        ...

    def drop(self, path: Path) -> None:
        """Delete the root's copy of a path of this node, and everything below it."""
        ...

    def for_ray(self, folder: Path) -> dict[str, Any]:
        """Return the arguments by which Ray Train and Tune keep their files in a directory of work."""
        ...

    def hold(self, name: str) -> AbstractContextManager[Lease | None]:
        """Hold the one right to work on something, against other nodes; on this node a file lock already holds it."""
        ...

    def store(self, key: str, scratch: Path, lease: Lease | None) -> None:
        """Store an artifact's files, and its manifest once all of them are there."""
        ...

    def probe(self, name: str, data: bytes) -> bytes | None:
        """Write, read and delete a small file; return its content as read."""
        ...
