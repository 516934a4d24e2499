"""Store and find artifacts: only this module knows the root.

In: stages and their files. Out: finished artifacts under `{root}/{stage}/{slug}-{id}/`. Artifacts, pieces
of work and ledgers are found by their ids: the slug is for people, and another name for a model or a file moves it.
The root is a directory (a local one, or one that every node sees) or an object store. A stage works in a scratch
directory with a stable name; `commit` writes the manifest last of all. In a directory it then moves the whole to its
place in one rename. Of an object store every node has a copy on its own disk, in the same layout: stages work there,
`commit` stores the files and then the manifest, and a node brings each file that it reads once and checks its hash.
Pieces that outlive a stage's scratch (ledger, training checkpoints) have directories of their own, which `publish` and
`bring` keep in step with the store; where the root is a directory they do nothing.
"""

from __future__ import annotations

import functools
import re
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from sdft_ray.errors import UserError, problem
from sdft_ray.store.files import write_atomically
from sdft_ray.store.identity import Stage
from sdft_ray.store.lease import Lease
from sdft_ray.store.listing import Listing, id_in, make_directory, require_here
from sdft_ray.store.local import Directory
from sdft_ray.store.locks import file_lock
from sdft_ray.store.manifest import MANIFEST, Manifest, command_here, write_manifest
from sdft_ray.store.objects import Objects, is_store
from sdft_ray.store.remote import ObjectStore

Status = Literal["done", "partial", "missing"]
STATES: tuple[Status, ...] = get_args(Status)


class Storage:
    """Artifacts under one root: a directory, or an object store."""

    def __init__(self, root: str, command: Sequence[str] | None = None) -> None:
        self._backend = _open(root)
        self.root = self._backend.root
        """The directory on this node: the root itself, or a copy of the object store."""
        self.uri = self._backend.uri
        """The name of the root for people."""
        self._command = tuple(command or command_here())
        self._verified: set[str] = set()
        self._manifests: dict[str, Manifest] = {}
        self._keys: dict[str, str] = {}
        """Keys of stages whose manifests were read, by id."""
        self._listings: dict[str, Listing] | None = None
        self._leases: dict[str, Lease | None] = {}
        self._fetching = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Give a worker storage of the same root and command; it checks hashes itself."""
        return Storage, (self.uri, self._command)

    @contextmanager
    def survey(self) -> Iterator[None]:
        """List each folder once while this process examines many stages and builds nothing.

        The lists end with it: each stage's status is read again under its lock.
        """
        before, self._listings = self._listings, {}
        try:
            yield
        finally:
            self._listings = before

    def place(self, stage: Stage[Any]) -> Path:
        """Return the path on this node of the finished artifact, present or future; for an object store use `files`."""
        return stage.location or self.root / self._key(stage)

    def where(self, stage: Stage[Any]) -> str:
        """Return the address of the finished artifact, present or future, for people."""
        return str(stage.location) if stage.location else f"{self.uri}/{self._key(stage)}"

    def describe(self, path: Path) -> str:
        """Return the address of a piece of work, for people."""
        return f"{self.uri}/{self._name(path)}"

    def status(self, stage: Stage[Any]) -> Status:
        """Return the status of a stage, from manifests and file sizes only.

        Raises UserError where a finished artifact lost or shortened a file: it is never rebuilt silently.
        """
        if stage.location or (not self._backend.shared and stage.id in self._keys):
            return "done"
        key = self._key(stage)
        if manifest := self._backend.finished(key, lambda: self._list(stage.name).sizes):
            if not self._backend.shared:
                self._manifests[key] = manifest
            self._keys[stage.id] = key
            return "done"
        begun = self._scratch(stage).exists() or stage.id in self._list(f"resumable/{stage.name}").names
        return "partial" if begun else "missing"

    def fetch(self, stage: Stage[Any]) -> Path:
        """Return the directory on this node of a finished artifact after checking its hashes: in a directory once a
        process, of an object store when it is brought."""
        with self._fetching:  # evaluations of one model ask for it at the same time
            place = self.files(stage, prove=stage.id not in self._verified)
            self._verified.add(stage.id)
        return place

    def files(self, stage: Stage[Any], pattern: str = "*", prove: bool = False) -> Path:
        """Return the directory on this node with the files of a finished artifact that match a pattern."""
        if stage.location:
            return require_here(stage.location, stage.name)
        return self._fetch(self._key(stage), pattern, prove)

    def _fetch(self, key: str, pattern: str, prove: bool = False) -> Path:
        if self._backend.shared:
            place = require_here(self.root / key)
            if not prove:
                return place
        manifest = self._manifests.get(key) or self._backend.read_manifest(key)
        if manifest is None:
            raise UserError(problem(f"{self.uri}/{key}", "is no finished artifact", "Run the command again"))
        place = self._backend.fetch(key, manifest, pattern, prove)
        self._manifests[key] = manifest
        return place

    def handle(self, stage: Stage[Any]) -> Callable[[], Path]:
        """Return a function that returns the verified directory of an artifact on the node of any worker."""
        if self._backend.shared:
            return functools.partial(require_here, self.fetch(stage))
        return functools.partial(self.fetch, stage)

    def manifest(self, stage: Stage[Any]) -> Manifest:
        """Return the manifest of a finished artifact."""
        key = self._key(stage)
        manifest = self._manifests.get(key) or self._backend.read_manifest(key)
        assert manifest is not None, f"{stage.directory_name} is not finished"
        self._keys[stage.id] = key
        return manifest

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the one right to work on something; a second driver waits, visibly.

        A file lock ends with its owner. So does a lease in an object store, a minute later, or at once for a driver on
        the same node.
        """
        with ExitStack() as stack:
            stack.enter_context(file_lock(self.root, name))
            held: AbstractContextManager[Lease | None] = self._backend.hold(name)
            self._leases[name] = stack.enter_context(held)
            stack.callback(self._leases.pop, name)
            yield

    def scratch(self, stage: Stage[Any]) -> Path:
        """Return the stage's scratch directory, new or as a killed run left it."""
        return make_directory(self._scratch(stage))

    def resumable(self, stage: Stage[Any]) -> Path:
        """Return the directory of pieces from which the stage resumes after a kill; `commit` deletes it."""
        return make_directory(self._resumable(stage))

    def drop_pieces(self, stage: Stage[Any]) -> None:
        """Delete what a command left for resuming a stage that is finished, where it was killed at the very end."""
        if (left := self._resumable(stage)).is_dir():
            self.drop(left)

    def ledger(self, name: str) -> Path:
        """Return the directory of a ledger of generated rows, found by the id at the end of its name; artifacts are
        views of it."""
        return make_directory(self.root / "ledger" / self._name_in("ledger", name))

    def has_ledger(self, identity: str) -> bool:
        """Return whether there is a ledger with an id."""
        return identity in self._list("ledger").names

    def publish(self, *files: Path) -> None:
        """Make pieces of work durable under the root, and visible to other nodes."""
        self._backend.publish(files)

    def bring(self, folder: Path, pattern: str = "*") -> None:
        """Make this node's copy of a directory of work equal to the root's, for names below it that match.

        Files that only this node has are deleted: a killed run left them, and another node may have done them again.
        """
        self._backend.bring(folder, pattern)

    def mirror(self, folder: Path) -> None:
        """Make a directory of work under the root equal to this node's: put new files, then delete missing ones."""
        self._backend.mirror(folder)

    def drop(self, path: Path) -> None:
        """Delete a piece of work, or a directory of them, on this node and under the root."""
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        self._backend.drop(path)

    def for_ray(self, folder: Path) -> dict[str, Any]:
        """Return the arguments by which Ray Train and Tune keep their files in a directory of work."""
        return self._backend.for_ray(folder)

    def commit(self, stage: Stage[Any], summary: Mapping[str, Any], wall_seconds: float) -> Path:
        """Make the scratch directory the finished artifact, and delete the pieces for resuming.

        In a directory that is one rename. In an object store the files come first, and then the manifest.
        """
        scratch, key = self._scratch(stage), self._key(stage)
        place = self.root / key
        for torn in scratch.rglob(".*.tmp"):  # of a write that a kill interrupted
            torn.unlink()
        readable = scratch.stat().st_mode & 0o044  # as the user's umask has it
        for path in scratch.rglob("*"):  # safetensors writes files that only their owner may read
            path.chmod(path.stat().st_mode | readable)
        write_manifest(scratch, stage, summary, wall_seconds, self._command)
        self._backend.store(key, scratch, self._leases.get(f"{stage.name}-{stage.id}"))
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir() and not (place / MANIFEST).is_file():  # of an artifact that was deleted in part
            aside = scratch.with_name(f".deleted-{uuid.uuid4().hex[:8]}")
            place.rename(aside)  # a file that NFS keeps for a reader cannot be deleted, but moved
            shutil.rmtree(aside, ignore_errors=True)
        scratch.rename(place)
        self.drop(self._resumable(stage))
        self._verified.add(stage.id)
        self._keys[stage.id] = key
        return place

    def keep_trace(self, stage: Stage[Any], trace: str) -> str:
        """Write a failure's stack trace and return a sentence with its address; empty where that fails, too."""
        name = f"failures/{stage.name}-{stage.id}.txt"
        try:
            self.write_text(name, trace)
        except OSError:  # a full disk is the likeliest reason for the failure itself
            return ""
        return f" Trace: {self.uri}/{name}."

    def write_text(self, name: str, text: str) -> None:
        """Write a small text below the root, where every node reads it."""
        path = self.root / name
        make_directory(path.parent)
        write_atomically(path, text)
        self.publish(path)

    def read_text(self, name: str) -> str | None:
        """Return the text that `write_text` wrote, or None."""
        data = self._backend.read(name)
        return None if data is None else data.decode()

    def find(self, name: str, pattern: str = "*") -> Path:
        """Return the directory on this node of the artifact of a path, an id, the start of an id or the name of an
        artifact's directory, with its files that match a pattern.

        Raises UserError where nothing or more than one artifact fits.
        """
        if name and (Path(name) / MANIFEST).is_file():
            return Path(name)
        wanted = name.rstrip("/")[-12:] if re.search(r"-[0-9a-f]{12}/?$", name) else name.lower()
        keys = [path.rpartition("/")[0] for path in sorted(self._backend.manifests(), reverse=True)]
        keys_by_id = {  # two directories of one id count as one
            id_in(key): key
            for key in keys
            if key.count("/") == 1 and len(wanted) >= 4 and id_in(key).startswith(wanted)
        }
        if len(keys_by_id) == 1:
            return self._fetch(next(iter(keys_by_id.values())), pattern)
        if keys_by_id:
            names = ", ".join(key.rpartition("/")[2] for key in sorted(keys_by_id.values()))
            raise UserError(problem(name, f"means {len(keys_by_id)} artifacts", f"Give more digits: {names}"))
        raise UserError(
            problem(name or "an empty name", f"is no artifact under {self.uri}", "Run `sdft check RECIPE` to list them")
        )

    def find_model(self, name: str) -> Path:
        """Return the directory of a model: one of the user's own, or an artifact's as `find` does."""
        return Path(name) if name and Path(name).is_dir() else self.find(name)

    def manifests(self, name: str) -> Iterator[Manifest]:
        """Yield the manifest of every finished artifact of a kind of stage.

        Without those that are damaged or of a newer version: an error is for the recipe that they belong to.
        """
        for path in sorted(self._backend.manifests()):
            if not path.startswith(f"{name}/"):
                continue
            try:
                manifest = self._backend.read_manifest(path.rpartition("/")[0])
            except UserError:
                continue
            if manifest:
                yield manifest

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _key(self, stage: Stage[Any]) -> str:
        """Return the path below the root of a stage's artifact, present under any slug, or future."""
        known = self._keys.get(stage.id)
        if known and (not self._backend.shared or (self.root / known).is_dir()):
            return known
        return f"{stage.name}/{self._name_in(stage.name, stage.directory_name)}"

    def _name_in(self, folder: str, name: str) -> str:
        """Return the directory in a folder of the root with the id of `name`; without one, `name`.

        Of several (from when artifacts were found by name) prefer a finished one, then `name`.
        """
        if self._backend.shared and (self.root / folder / name).is_dir():
            return name
        same_id = self._list(folder).names.get(id_in(name), [])
        if len(same_id) < 2:
            return same_id[0] if same_id else name
        unfinished = {other: self._backend.read_manifest(f"{folder}/{other}") is None for other in same_id}
        return min(same_id, key=lambda other: (unfinished[other], other != name, other))

    def _list(self, folder: str) -> Listing:
        """Return the content of a folder of the root; a survey lists it once."""
        if self._listings is None:
            return self._backend.list(folder)
        if folder not in self._listings:
            self._listings[folder] = self._backend.list(folder)
        return self._listings[folder]

    def _scratch(self, stage: Stage[Any]) -> Path:
        folder = self.root / "scratch" / stage.name  # on this node for every backend
        return next(iter(sorted(folder.glob(f"*-{stage.id}"))), folder / stage.directory_name)

    def _resumable(self, stage: Stage[Any]) -> Path:
        folder = f"resumable/{stage.name}"
        return self.root / folder / self._name_in(folder, stage.directory_name)


def _open(root: str) -> Directory | ObjectStore:
    return ObjectStore(root) if is_store(root) else Directory(root)


def probe(root: str) -> None:
    """Write, read and delete a small file under a root, from the node of this process.

    Raises UserError where that fails.
    """
    data, where = uuid.uuid4().bytes, f"{root} from {socket.gethostname()}"
    backend = _open(root)
    try:
        content = backend.probe(f"probes/{uuid.uuid4().hex}", data)
    except OSError as error:
        store = "Check bucket, endpoint, network and credentials"
        do = store if is_store(root) else "Give a directory that every node may write"
        raise UserError(problem(where, error.strerror or str(error), do)) from None
    if content != data:
        raise UserError(problem(where, "does not return what was written", "Give another --root")) from None


@contextmanager
def hold_probe(root: str) -> Iterator[str]:
    """Hold something below a root as the right to an artifact is held, and yield its name.

    Raises UserError where nothing can be held.
    """
    name = f"probes/{uuid.uuid4().hex}"
    if is_store(root):
        objects = Objects(root)
        try:
            objects.create(name, uuid.uuid4().bytes)
        except OSError as error:  # a store that does not know the condition
            what = f"takes no conditional writes ({error.strerror})"
            raise UserError(problem(root, what, "Give a store with conditional writes")) from None
        try:
            yield name
        finally:
            objects.delete([name])
        return
    path = make_directory(Path(root) / "probes") / Path(name).name
    lock = FileLock(path)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        do = "Mount it with locks, or give an s3:// URI"
        raise UserError(problem(root, f"has no file locks ({error})", do)) from None
    try:
        yield name
    finally:
        lock.release()
        path.unlink(missing_ok=True)


def can_take(root: str, name: str) -> bool:
    """Return whether this process gets what `hold_probe` holds, which it must not."""
    if is_store(root):
        return Objects(root).create(name, uuid.uuid4().bytes)
    lock = FileLock(Path(root) / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True
