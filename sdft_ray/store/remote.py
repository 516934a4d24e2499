"""The backend of a root that is an object store: every node has a partial copy on its own disk, in the same layout.

Stages work in the copy; `publish`, `mirror` and `store` put files into the store, and a node brings each file that it
reads once and compares it with its hash.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from sdft_ray.errors import UserError, problem
from sdft_ray.store import lease
from sdft_ray.store.files import cache_directory, hash_file, inside, stamp, write_atomically
from sdft_ray.store.identity import short_id, slugify
from sdft_ray.store.listing import Listing, by_id, id_in, make_directory
from sdft_ray.store.locks import file_lock
from sdft_ray.store.manifest import (
    ALTERED,
    MANIFEST,
    File,
    Manifest,
    check_sizes,
    damaged,
    parse_manifest,
    read_manifest,
)
from sdft_ray.store.objects import Entry, Objects

_AT_ONCE = 8  # objects transferred at a time


class ObjectStore:
    """Artifacts below a URI, with a copy on this node."""

    shared = False

    def __init__(self, uri: str) -> None:
        self._objects = Objects(uri)
        self.uri = self._objects.uri
        # Deleting it only costs bringing files again.
        self.root = cache_directory() / "roots" / f"{slugify(self.uri)}-{short_id(self.uri)}"

    def list(self, folder: str) -> Listing:
        """Return the objects below a folder, and the directories in it."""
        sizes = {key: entry.bytes for key, entry in self._objects.list(folder).items()}
        return Listing(sizes, by_id({key.removeprefix(f"{folder}/").partition("/")[0] for key in sizes}))

    def manifests(self) -> Iterable[str]:
        """Return the names of all manifests."""
        return (key for key in self._objects.list() if key.endswith(f"/{MANIFEST}"))

    def read(self, name: str) -> bytes | None:
        """Return an object's content, or None where there is none."""
        return self._objects.read(name)

    def read_manifest(self, key: str) -> Manifest | None:
        """Return the manifest of an artifact, or None where it is not finished."""
        text = self._objects.read(f"{key}/{MANIFEST}")
        return None if text is None else parse_manifest(f"{self.uri}/{key}", text)

    def finished(self, key: str, sizes: Callable[[], Mapping[str, int]]) -> Manifest | None:
        """Return the manifest of an artifact, or None where it is not finished; raises UserError where it lost or
        shortened a file. sizes: returns the listing of its folder."""
        listed = sizes()
        manifest = self.read_manifest(key) if f"{key}/{MANIFEST}" in listed else None
        if manifest:
            check_sizes(f"{self.uri}/{key}", manifest, lambda path: listed.get(f"{key}/{path}"))
        return manifest

    def fetch(self, key: str, manifest: Manifest, pattern: str, prove: bool) -> Path:
        """Return the directory on this node with those files of an artifact that match; each is compared with its hash
        when it is brought, and `prove` asks for no more."""
        place = self.root / key
        with file_lock(self.root, "bring-" + id_in(key)):
            # An artifact that was deleted and built again is another one.
            if read_manifest(place) != manifest:
                shutil.rmtree(place, ignore_errors=True)
                manifest.to_file(make_directory(place) / MANIFEST)
            matching = [file for file in manifest.files if fnmatch.fnmatch(file.path, pattern)]
            _for_each(functools.partial(self._bring_proven, key), matching)
        return place

    def _bring_proven(self, key: str, file: File) -> None:
        path = inside(self.root / key, file.path)
        if _bytes_of(path) == file.bytes:
            return
        unproven = path.with_name(f".{path.name}.unproven")
        self._objects.get(f"{key}/{file.path}", unproven)
        if hash_file(unproven) != file.sha256:
            raise damaged(f"{self.uri}/{key}", file.path, ALTERED)
        unproven.rename(path)

    def publish(self, files: Iterable[Path]) -> None:
        """Put pieces of work into the store."""
        _for_each(lambda file: self._objects.put(file, self._name(file)), files)

    def bring(self, folder: Path, pattern: str) -> None:
        """Make this node's copy of a directory of work equal to the store's, for names below it that match."""
        name = self._name(folder)
        with self._copies(name) as copies:
            matching = {key for key in copies.listed if _matches(key, name, pattern)}
            for path in folder.rglob("*"):
                if path.is_file() and _matches(self._name(path), name, pattern) and self._name(path) not in matching:
                    path.unlink()
            lacking = [key for key in matching if not copies.holds(key)]
            _for_each(lambda key: self._objects.get(key, self.root / key), lacking)
            copies.note(lacking)

    def mirror(self, folder: Path) -> None:
        """Make a directory of work in the store equal to this node's: put new files first, then delete missing ones."""
        name = self._name(folder)
        with self._copies(name) as copies:
            local = {self._name(path): path for path in folder.rglob("*") if path.is_file()}
            new = [key for key in local if not copies.holds(key)]
            self.publish(local[key] for key in new)
            self._objects.delete(copies.listed.keys() - local.keys())
            if new:
                copies.listed = self._objects.list(name)
                copies.note(new)

    @contextmanager
    def _copies(self, name: str) -> Iterator[_Copies]:
        """Yield what is known of this node's copy of a directory of work, which no other process changes meanwhile."""
        key = "bring-" + name.replace("/", "-")
        with file_lock(self.root, key):
            copies = _Copies(self.root, self.root / "copies" / f"{key}.json", self._objects.list(name))
            yield copies
            copies.write()

    def drop(self, path: Path) -> None:
        """Delete an object, or all below a directory."""
        self._objects.delete([self._name(path), *self._objects.list(self._name(path))])

    def for_ray(self, folder: Path) -> dict[str, Any]:
        """Return the arguments by which Ray Train and Tune keep their files in a directory of work."""
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        path = self._objects.path(self._name(folder))
        return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(self._objects.filesystem))}

    def hold(self, name: str) -> AbstractContextManager[lease.Lease]:
        """Hold a lease, against other nodes: on this one a file lock already holds the right. It dies with its owner a
        minute later, or at once for another driver on the same node."""
        return lease.hold(self._objects, name, self._node())

    def store(self, key: str, scratch: Path, lease: lease.Lease | None) -> None:
        """Store an artifact's files, then its manifest, if no other command has taken over the work."""
        if lease:
            lease.require()
        files = [path for path in scratch.rglob("*") if path.is_file() and path != scratch / MANIFEST]
        names = {f"{key}/{path.relative_to(scratch).as_posix()}": path for path in files}
        self._objects.delete(self._objects.list(key).keys() - names.keys())  # of an interrupted commit
        _for_each(lambda name: self._objects.put(names[name], name), names)
        if lease:
            lease.require()
        if not self._objects.create(f"{key}/{MANIFEST}", (scratch / MANIFEST).read_bytes()):
            what = "was finished by another command meanwhile"
            raise UserError(problem(f"{self.uri}/{key}", what, "Run the same command again to use it"))
        shutil.rmtree(self.root / key, ignore_errors=True)  # the copy of an artifact that was deleted from the store

    def probe(self, name: str, data: bytes) -> bytes | None:
        """Write, read and delete a small object; return its content as read."""
        self._objects.write(name, data)
        content = self._objects.read(name)
        self._objects.delete([name])
        return content

    def _node(self) -> str:
        """Return a name that is shared by exactly the processes that share file locks: one kernel and one directory."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        machine = boot.read_text().strip() if boot.is_file() else socket.gethostname()
        name = self.root / "node"
        with file_lock(self.root, "node"):
            if not name.is_file():
                write_atomically(name, uuid.uuid4().hex)
            return f"{name.read_text()}-{machine}"

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


class _Copies:
    """The objects of a directory of work, and the files on this node that are copies of them.

    What a file was when it was a copy is kept from one process to the next: by its size alone, one that another node
    wrote again would stay as it was.
    """

    def __init__(self, root: Path, notes: Path, listed: Mapping[str, Entry]) -> None:
        self.listed = listed
        """The objects, by name."""
        self._root, self._notes = root, notes
        self._read = json.loads(notes.read_text()) if notes.is_file() else {}
        self._known = {key: known for key, known in self._read.items() if key in listed}

    def holds(self, key: str) -> bool:
        """Return whether the file of an object holds the same: as it was noted, or by the MD5 of both."""
        entry, path = self.listed.get(key), inside(self._root, key)
        if entry is None or _bytes_of(path) != entry.bytes:
            return False
        if entry.version and self._known.get(key) == [entry.version, *stamp(path)]:
            return True
        if not entry.md5 or hash_file(path, "md5") != entry.md5:
            return False
        self.note([key])
        return True

    def note(self, keys: Iterable[str]) -> None:
        """Remember that files are copies of their objects, as these are listed."""
        self._known |= {key: [self.listed[key].version, *stamp(self._root / key)] for key in keys}

    def write(self) -> None:
        """Keep what is known, where it is new."""
        if self._known != self._read:
            make_directory(self._notes.parent)
            write_atomically(self._notes, json.dumps(self._known))


def _bytes_of(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _matches(key: str, folder: str, pattern: str) -> bool:
    return fnmatch.fnmatch(key.removeprefix(f"{folder}/"), pattern)


def _for_each(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Call `work` on each item, some at a time; raise the first error."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(work, items):
            pass
