"""What `Storage` asks of the place where artifacts lie: one interface, for a directory and for an object store.

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
    """What the root has in a folder."""

    sizes: dict[str, int]
    """Of an object store the bytes of every object below the folder, by name."""
    names: dict[str, list[str]]
    """The names of the directories in the folder, by the ids that they end in."""


def id_in(name: str) -> str:
    """Return the id that a directory's name ends in."""
    return name.rpartition("-")[2]


def by_id(names: Iterable[str]) -> dict[str, list[str]]:
    """Return names by the ids that they end in."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(id_in(name), []).append(name)
    return found


def made(path: Path) -> Path:
    """Return a directory, which is made where it is missing."""
    path.mkdir(parents=True, exist_ok=True)
    return path


class Backend(Protocol):
    """A place for artifacts."""

    uri: str
    """What people call the root."""
    root: Path
    """The directory on this node."""
    shared: bool
    """Whether every node sees the same directory: then nothing is brought or published."""

    def list(self, folder: str) -> Listing:
        """Return what is in a folder."""
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
        """Make pieces of work durable, where other nodes find them."""
        ...

    def bring(self, folder: Path, pattern: str) -> None:
        """Make this node's copy of a directory of work what the root has, as far as the names below it match."""
        ...

    def mirror(self, folder: Path) -> None:
        """Make a directory of work what it is on this node."""
        ...

    def drop(self, path: Path) -> None:
        """Delete what lies under a path of this node, or below it, from the root."""
        ...

    def for_ray(self, folder: Path) -> dict[str, Any]:
        """Return how Ray Train and Tune are told to keep their own files in a directory of work."""
        ...

    def hold(self, name: str) -> AbstractContextManager[Lease | None]:
        """Hold the one right to work on something, against other nodes; a file lock holds it on this one already."""
        ...

    def store(self, key: str, scratch: Path, lease: Lease | None) -> None:
        """Store an artifact's files, and its manifest once all of them are there."""
        ...

    def probe(self, name: str, data: bytes) -> bytes | None:
        """Write, read and delete something small; return what was read."""
        ...
