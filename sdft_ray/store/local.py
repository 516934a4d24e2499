"""The backend of a root that is a directory: a local one, or one that every node sees."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdft_ray.errors import UserError, problem
from sdft_ray.store.listing import Listing, by_id
from sdft_ray.store.manifest import MANIFEST, Manifest, check_files, read_manifest


def _resolve(root: str) -> Path:
    """Return a root as an absolute path; raises UserError where no directory can be."""
    try:
        path = Path(root).expanduser().resolve()
        existing = next(place for place in (path, *path.parents) if place.exists())
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, a circle of links, a zero byte
        raise UserError(problem("--root", f"{root!r} is no path ({error})", "Give a directory")) from None
    if not existing.is_dir():
        raise UserError(problem("--root", f"{existing} is a file", "Give a directory"))
    return path


class Directory:
    """Artifacts below a directory, whose files are durable and visible to all nodes; its methods are those of
    `ObjectStore`."""

    shared = True
    """Whether every node sees the same directory."""

    def __init__(self, root: str) -> None:
        self.root = _resolve(root)
        """The directory on this node."""
        self.uri = str(self.root)
        """The name of the root for people."""

    def list(self, folder: str) -> Listing:
        """Return the directories in a folder."""
        place = self.root / folder
        return Listing({}, by_id(path.name for path in place.iterdir()) if place.is_dir() else {})

    def manifests(self) -> Iterable[str]:
        """Return the names of all manifests."""
        return (path.relative_to(self.root).as_posix() for path in self.root.glob(f"*/*/{MANIFEST}"))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None where there is none."""
        path = self.root / name
        return path.read_bytes() if path.is_file() else None

    def read_manifest(self, key: str) -> Manifest | None:
        """Return the manifest of an artifact, or None where it is not finished."""
        return read_manifest(self.root / key)

    def finished(self, key: str, sizes: Callable[[], Mapping[str, int]]) -> Manifest | None:
        """Return the manifest of an artifact, or None where it is not finished; raises UserError where it lost or
        shortened a file. sizes: of no use here."""
        if manifest := read_manifest(self.root / key):
            check_files(self.root / key, manifest, hashes=False)
        return manifest

    def fetch(self, key: str, manifest: Manifest, pattern: str, prove: bool) -> Path:
        """Return an artifact's directory, with hashes compared where `prove` asks for it."""
        if prove:
            check_files(self.root / key, manifest, hashes=True)
        return self.root / key

    def publish(self, files: Iterable[Path]) -> None:
        """Do nothing: pieces of work are durable, and other nodes see them."""

    def bring(self, folder: Path, pattern: str) -> None:
        """Do nothing: this node has the files."""

    def mirror(self, folder: Path) -> None:
        """Do nothing: there is one copy."""

    def drop(self, path: Path) -> None:
        """Do nothing: there is one copy."""

    def for_ray(self, folder: Path) -> dict[str, Any]:
        """Return the path as Ray takes it."""
        return {"storage_path": str(folder)}

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Do nothing: a file lock reaches every node that sees the directory."""
        yield

    def store(self, key: str, scratch: Path, lease: object) -> None:
        """Do nothing: `Storage` moves the scratch directory to its place."""

    def probe(self, name: str, data: bytes) -> bytes | None:
        """Write, read and delete a small file; return its content as read."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        try:
            return path.read_bytes()
        finally:
            path.unlink()
