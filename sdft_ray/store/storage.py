"""Where artifacts lie: the only module that knows the root.

In: stages and the files that they wrote. Out: finished artifacts under `{root}/{stage}/{slug}-{id}/`. Artifacts, pieces
of work and ledgers are found by their ids: the slug is for people, and another name for a model or a file moves it.
The root is a directory (a local one, or one that every node sees) or an object store. A stage works in a scratch
directory with a stable name; `commit` writes the manifest last of all. In a directory it then moves the whole to its
place in one rename. Of an object store every node has a copy on its own disk, in the same layout: stages work there,
`commit` stores the files and then the manifest, and whatever a node reads is brought once and compared with its hash.
Pieces that outlive a stage's scratch (ledger, training checkpoints) have directories of their own, which `publish` and
`bring` keep in step with the store; where the root is a directory there is nothing to do.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from sdft_ray.errors import UserError, problem
from sdft_ray.progress import say
from sdft_ray.store import files, identity, lease
from sdft_ray.store.identity import Stage
from sdft_ray.store.manifest import (
    ALTERED,
    MANIFEST,
    check_files,
    check_sizes,
    command_here,
    damaged,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from sdft_ray.store.objects import Objects, is_store

Status = Literal["done", "partial", "missing"]
_AT_ONCE = 8  # objects on the way at a time


class _Listing(NamedTuple):
    """What the root has in a folder."""

    sizes: dict[str, int]
    """Of an object store the bytes of every object below the folder, by key."""
    names: dict[str, list[str]]
    """The names of the directories in the folder, by the ids that they end in."""


class Storage:
    """Artifacts under one root: a directory, or an object store."""

    def __init__(self, root: str, command: Sequence[str] | None = None) -> None:
        self._objects = Objects(root) if is_store(root) else None
        self.root = _copy_of(self._objects.uri) if self._objects else Path(root).expanduser().resolve()
        """The directory on this node: the root itself, or this node's copy of the object store."""
        self.uri = self._objects.uri if self._objects else str(self.root)
        """What people call the root."""
        self._command = tuple(command or command_here())
        self._verified: set[str] = set()
        self._manifests: dict[str, dict[str, Any]] = {}
        self._keys: dict[str, str] = {}
        """Of stages whose manifests were seen, by id."""
        self._listings: dict[str, _Listing] | None = None
        self._leases: dict[str, lease.Lease] = {}
        self._fetching = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a worker have storage of the same root, for the same command; it checks hashes for itself."""
        return Storage, (self.uri, self._command)

    @contextmanager
    def survey(self) -> Iterator[None]:
        """List each folder once for a look at many stages, during which this process builds nothing.

        Nothing listed outlives it: what is done is decided anew under a stage's lock.
        """
        before, self._listings = self._listings, {}
        try:
            yield
        finally:
            self._listings = before

    def place(self, stage: Stage) -> Path:
        """Return where on this node the finished artifact lies or will lie; of an object store ask `files` for it."""
        return stage.location or self.root / self._key(stage)

    def where(self, stage: Stage) -> str:
        """Return where the finished artifact lies or will lie, for people."""
        return str(stage.location) if stage.location else f"{self.uri}/{self._key(stage)}"

    def told(self, path: Path) -> str:
        """Return where a piece of work lies, for people."""
        return f"{self.uri}/{self._name(path)}"

    def status(self, stage: Stage) -> Status:
        """Return how far a stage is, from manifests and file sizes only.

        Raises UserError where a finished artifact lost or shortened a file: it is never rebuilt silently.
        """
        if stage.location or (self._objects and stage.id in self._keys):
            return "done"
        key = self._key(stage)
        if self._objects:
            sizes = self._list(stage.name).sizes
            manifest = self._read_manifest(key) if f"{key}/{MANIFEST}" in sizes else None
            if manifest:
                check_sizes(f"{self.uri}/{key}", manifest, lambda path: sizes.get(f"{key}/{path}"))
                self._manifests[key] = manifest
        elif manifest := self._read_manifest(key):
            check_files(self.root / key, manifest, hashes=False)
        if manifest:
            self._keys[stage.id] = key
            return "done"
        begun = self._scratch(stage).exists() or stage.id in self._list(f"resumable/{stage.name}").names
        return "partial" if begun else "missing"

    def fetch(self, stage: Stage) -> Path:
        """Return the directory on this node of a finished artifact after checking its hashes: in a directory once a
        process, of an object store when it is brought."""
        with self._fetching:  # evaluations of one model ask for it at the same time
            place = self.files(stage)
            if not self._objects and not stage.location and stage.id not in self._verified:
                check_files(place, self.manifest(stage), hashes=True)
                self._verified.add(stage.id)
        return place

    def files(self, stage: Stage, pattern: str = "*") -> Path:
        """Return the directory on this node where those files of a finished artifact lie that match a pattern."""
        if stage.location and not stage.location.is_dir():
            do = "Give a directory that every node sees, or a model from a hub or package"
            raise UserError(problem("model.path", f"{stage.location} is not on {socket.gethostname()}", do))
        if self._objects and not stage.location:
            return self._bring_artifact(self._key(stage), pattern)
        return self.place(stage)

    def handle(self, stage: Stage) -> Callable[[], Path]:
        """Return what gives any worker the verified directory of an artifact on its own node."""
        if self._objects:
            return functools.partial(self.fetch, stage)
        return functools.partial(Path, self.fetch(stage))

    def manifest(self, stage: Stage) -> dict[str, Any]:
        """Return the manifest of a finished artifact."""
        key = self._key(stage)
        manifest = self._manifests.get(key) or self._read_manifest(key)
        assert manifest is not None, f"{stage.directory_name} is not finished"
        self._keys[stage.id] = key
        return manifest

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the one right to work on something; a second driver waits, visibly.

        A file lock dies with its owner. In an object store a lease does so too, a minute later, or at once for a
        driver on the same node.
        """
        with ExitStack() as held:
            held.enter_context(self._file_lock(name))
            if self._objects:
                self._leases[name] = held.enter_context(lease.hold(self._objects, name, self._node()))
                held.callback(self._leases.pop, name)
            yield

    def scratch(self, stage: Stage) -> Path:
        """Return the stage's scratch directory, made or found as a killed run left it."""
        return _made(self._scratch(stage))

    def resumable(self, stage: Stage) -> Path:
        """Return the directory of pieces that let the stage go on after a kill; it goes when the stage commits."""
        return _made(self._resumable(stage))

    def ledger(self, name: str) -> Path:
        """Return a directory of rows that are generated once and for all, found by the id at the end of its name;
        artifacts are views of it."""
        return _made(self.root / "ledger" / self._called("ledger", name))

    def publish(self, *files: Path) -> None:
        """Make pieces of work durable under the root, where other nodes find them."""
        if objects := self._objects:
            _each(lambda file: objects.put(file, self._name(file)), files)

    def bring(self, folder: Path, pattern: str = "*") -> None:
        """Make this node's copy of a directory of work what the root has, as far as the names below it match.

        What only this node has is of a run that was killed, and may have been done again elsewhere since: it goes.
        """
        if (objects := self._objects) is None:
            return
        name = self._name(folder)
        with self._file_lock("bring-" + name.replace("/", "-")):
            held = {key: size for key, size in objects.list(name).items() if _matches(key, name, pattern)}
            for path in folder.rglob("*"):
                if path.is_file() and _matches(self._name(path), name, pattern) and self._name(path) not in held:
                    path.unlink()
            lacking = [key for key, size in held.items() if _bytes_of(files.inside(self.root, key)) != size]
            _each(lambda key: objects.get(key, self.root / key), lacking)

    def mirror(self, folder: Path) -> None:
        """Make a directory of work under the root what it is on this node: new pieces first, then what is gone goes."""
        if not self._objects:
            return
        held = self._objects.list(self._name(folder))
        here = {self._name(path): path for path in folder.rglob("*") if path.is_file()}
        self.publish(*(path for name, path in here.items() if held.get(name) != path.stat().st_size))
        self._objects.delete(held.keys() - here.keys())

    def drop(self, path: Path) -> None:
        """Delete a piece of work, or a directory of them, here and under the root."""
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if self._objects:
            self._objects.delete([self._name(path), *self._objects.list(self._name(path))])

    def for_ray(self, folder: Path) -> dict[str, Any]:
        """Return how Ray Train and Tune are told to keep their own files in a directory of work."""
        if not self._objects:
            return {"storage_path": str(folder)}
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        path = self._objects.path(self._name(folder))
        return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(self._objects.filesystem))}

    def commit(self, stage: Stage, summary: Mapping[str, Any], wall_seconds: float) -> Path:
        """Make the scratch directory the finished artifact, and drop what only resuming needed.

        In a directory that is one rename. In an object store the files come first, and then the manifest.
        """
        scratch, key = self._scratch(stage), self._key(stage)
        place = self.root / key
        for torn in scratch.rglob(".*.tmp"):  # of a write that a kill cut short
            torn.unlink()
        readable = scratch.stat().st_mode & 0o044  # as the user's umask has it
        for path in scratch.rglob("*"):  # safetensors writes files that only their owner may read
            path.chmod(path.stat().st_mode | readable)
        write_manifest(scratch, stage, summary, wall_seconds, self._command)
        if self._objects:
            self._store(stage, scratch, key)
            shutil.rmtree(place, ignore_errors=True)  # the copy of an artifact that was deleted from the store
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch.rename(place)
        self.drop(self._resumable(stage))
        self._verified.add(stage.id)
        self._keys[stage.id] = key
        return place

    def _store(self, stage: Stage, scratch: Path, key: str) -> None:
        """Store an artifact's files, and its manifest once all of them are there and nobody else is at work on it."""
        assert self._objects
        objects = self._objects
        held = self._leases.get(f"{stage.name}-{stage.id}")
        if held:
            held.require()
        files = [path for path in scratch.rglob("*") if path.is_file() and path != scratch / MANIFEST]
        names = {f"{key}/{path.relative_to(scratch).as_posix()}": path for path in files}
        objects.delete(objects.list(key).keys() - names.keys())  # of a commit that was cut short
        _each(lambda name: objects.put(names[name], name), names)
        if held:
            held.require()
        if not objects.create(f"{key}/{MANIFEST}", (scratch / MANIFEST).read_bytes()):
            what = "was finished by another command meanwhile"
            raise UserError(problem(f"{self.uri}/{key}", what, "Run the same command again to use it"))

    def keep_trace(self, stage: Stage, trace: str) -> str:
        """Write a failure's stack trace and return where it is, as a sentence; nothing where even that fails."""
        path = self.root / "failures" / f"{stage.name}-{stage.id}.txt"
        try:
            self._keep(path, trace)
        except OSError:  # a full disk is the likeliest reason for the failure itself
            return ""
        return f" Trace: {self.told(path)}."

    def keep_failure(self, stage: Stage, reason: str) -> None:
        """Write down why a stage of a sweep could not be built."""
        self._keep(self._failure(stage), reason)

    def failure(self, stage: Stage) -> str | None:
        """Return why a stage could not be built when that was last tried, if it was."""
        return self._kept(self._failure(stage))

    def forget_failure(self, stage: Stage) -> None:
        """Drop the reason: the stage is tried again."""
        self.drop(self._failure(stage))

    def keep_losses_of_stopped(self, sweep: str, stage: Stage, losses: Sequence[tuple[int, float]]) -> None:
        """Write down that a sweep stopped a training, and the validation losses (step, loss) that it had until then."""
        self._keep(self._stopped(sweep, stage), json.dumps(losses))

    def losses_of_stopped(self, sweep: str, stage: Stage) -> list[tuple[int, float]] | None:
        """Return the validation losses of a training that a sweep stopped; None where it did not."""
        kept = self._kept(self._stopped(sweep, stage))
        return None if kept is None else [tuple(pair) for pair in json.loads(kept)]

    def find(self, name: str, pattern: str = "*") -> Path:
        """Return the directory on this node of the artifact that a path, an id or the start of an id means, with those
        of its files that match a pattern.

        Raises UserError where nothing or more than one artifact fits.
        """
        if (Path(name) / MANIFEST).is_file():
            return Path(name)
        if self._objects:
            there: Iterable[str] = self._objects.list()
        else:
            there = (self._name(path) for path in self.root.glob(f"*/*/{MANIFEST}"))
        found = {
            _id_in(key): key  # two directories of one id are as good as one
            for key, _, last in (path.rpartition("/") for path in sorted(there, reverse=True))
            if last == MANIFEST and key.count("/") == 1 and len(name) >= 4 and _id_in(key).startswith(name)
        }
        if len(found) == 1:
            (key,) = found.values()
            return self._bring_artifact(key, pattern) if self._objects else self.root / key
        if found:
            names = ", ".join(key.rpartition("/")[2] for key in sorted(found.values()))
            raise UserError(problem(name, f"means {len(found)} artifacts", f"Give more digits: {names}"))
        raise UserError(problem(name, f"is no artifact under {self.uri}", "See `sdft check RECIPE` for what there is"))

    def _bring_artifact(self, key: str, pattern: str) -> Path:
        """Bring those files of an artifact that match and are not on this node yet, each compared with its hash."""
        assert self._objects
        objects, place = self._objects, self.root / key
        manifest = self._manifests.get(key) or self._read_manifest(key)
        if manifest is None:
            raise UserError(problem(f"{self.uri}/{key}", "is no finished artifact", "Run the command again"))
        with self._file_lock("bring-" + _id_in(key)):
            # An artifact that was deleted and built again is another one.
            if read_manifest(place) != manifest:
                shutil.rmtree(place, ignore_errors=True)
                _made(place)
                files.write_atomically(place / MANIFEST, json.dumps(manifest))

            def bring(entry: Mapping[str, Any]) -> None:
                file, name = files.inside(place, entry["path"]), f"{key}/{entry['path']}"
                if _bytes_of(file) == entry["bytes"]:
                    return
                unproven = file.with_name(f".{file.name}.unproven")
                objects.get(name, unproven)
                if files.hash_file(unproven) != entry["sha256"]:
                    raise damaged(f"{self.uri}/{key}", entry["path"], ALTERED)
                unproven.rename(file)

            _each(bring, [entry for entry in manifest["files"] if fnmatch.fnmatch(entry["path"], pattern)])
        self._manifests[key] = manifest
        return place

    def _read_manifest(self, key: str) -> dict[str, Any] | None:
        if not self._objects:
            return read_manifest(self.root / key)
        text = self._objects.read(f"{key}/{MANIFEST}")
        return None if text is None else parse_manifest(f"{self.uri}/{key}", text)

    @contextmanager
    def _file_lock(self, name: str) -> Iterator[None]:
        lock = FileLock(_made(self.root / "locks") / f"{name}.lock")
        try:
            lock.acquire(timeout=0.5)
        except Timeout:
            say(f"{name}: another command is at work on it; waiting")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _node(self) -> str:
        """Return a name that only processes share which the same file locks bind: one kernel and one directory."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        machine = boot.read_text().strip() if boot.is_file() else socket.gethostname()
        name = self.root / "node"
        with self._file_lock("node"):
            if not name.is_file():
                files.write_atomically(name, uuid.uuid4().hex)
            return f"{name.read_text()}-{machine}"

    def _keep(self, path: Path, text: str) -> None:
        _made(path.parent)
        files.write_atomically(path, text)
        self.publish(path)

    def _kept(self, path: Path) -> str | None:
        if self._objects:
            data = self._objects.read(self._name(path))
            return None if data is None else data.decode()
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _key(self, stage: Stage) -> str:
        """Return where below the root a stage's artifact lies, by whatever name, or will lie."""
        known = self._keys.get(stage.id)
        if known and (self._objects or (self.root / known).is_dir()):
            return known
        return f"{stage.name}/{self._called(stage.name, stage.directory_name)}"

    def _called(self, folder: str, name: str) -> str:
        """Return the name in a folder of the root of the directory whose id is that of a name; else that name.

        Of several (roots have them from when artifacts were found by name) a finished one, and rather that name.
        """
        if not self._objects and (self.root / folder / name).is_dir():
            return name
        same = self._list(folder).names.get(_id_in(name), [])
        if len(same) < 2:
            return same[0] if same else name
        return min(same, key=lambda each: (self._read_manifest(f"{folder}/{each}") is None, each != name, each))

    def _list(self, folder: str) -> _Listing:
        """Return what the root has in a folder; during a survey it is looked at once."""
        if self._listings is not None and folder in self._listings:
            return self._listings[folder]
        if self._objects:
            sizes = self._objects.list(folder)
            there = {key.removeprefix(f"{folder}/").partition("/")[0] for key in sizes}
        else:
            sizes, place = {}, self.root / folder
            there = {path.name for path in place.iterdir()} if place.is_dir() else set()
        names: dict[str, list[str]] = {}
        for name in there:
            names.setdefault(_id_in(name), []).append(name)
        listing = _Listing(sizes, names)
        if self._listings is not None:
            self._listings[folder] = listing
        return listing

    def _scratch(self, stage: Stage) -> Path:
        folder = self.root / "scratch" / stage.name  # on this node, whatever the root is
        return next(iter(sorted(folder.glob(f"*-{stage.id}"))), folder / stage.directory_name)

    def _failure(self, stage: Stage) -> Path:
        return self.root / "failures" / f"{stage.name}-{stage.id}.reason.txt"

    def _stopped(self, sweep: str, stage: Stage) -> Path:
        return self.root / "failures" / sweep / f"{stage.id}.stopped.json"

    def _resumable(self, stage: Stage) -> Path:
        folder = f"resumable/{stage.name}"
        return self.root / folder / self._called(folder, stage.directory_name)


def probe(root: str) -> None:
    """Write, read and delete something small under a root, from whatever node this runs on.

    Raises UserError with one line where the root cannot do that from here.
    """
    name, data = f"probes/{uuid.uuid4().hex}", uuid.uuid4().bytes
    where = f"{root} from {socket.gethostname()}"
    try:
        if is_store(root):
            objects = Objects(root)
            objects.write(name, data)
            found = objects.read(name)
            objects.delete([name])
        else:
            path = Path(root).expanduser().resolve() / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            found = path.read_bytes()
            path.unlink()
    except OSError as error:
        store = "Check bucket, endpoint, network and credentials"
        do = store if is_store(root) else "Give a directory that every node may write"
        raise UserError(problem(where, error.strerror or str(error), do)) from None
    if found != data:
        raise UserError(problem(where, "does not give back what was written", "Use another root")) from None


def _copy_of(uri: str) -> Path:
    """Return the directory of this node's copy of an object store; deleting it costs bringing things again."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "sdft_ray" / "roots" / f"{identity.slugify(uri)}-{identity.short_id(uri)}"


def _id_in(key: str) -> str:
    return key.rpartition("-")[2]


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _bytes_of(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _matches(key: str, folder: str, pattern: str) -> bool:
    return fnmatch.fnmatch(key.removeprefix(f"{folder}/"), pattern)


def _each(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Do something with each item, some at a time; the first error is raised."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(work, items):
            pass
