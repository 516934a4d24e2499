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

import functools
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from sdft_ray.errors import UserError, problem
from sdft_ray.store.backend import Backend, Listing, id_in, made
from sdft_ray.store.files import write_atomically
from sdft_ray.store.identity import Stage
from sdft_ray.store.lease import Lease
from sdft_ray.store.local import Directory
from sdft_ray.store.locks import file_lock
from sdft_ray.store.manifest import MANIFEST, Manifest, command_here, write_manifest
from sdft_ray.store.objects import is_store
from sdft_ray.store.remote import ObjectStore

Status = Literal["done", "partial", "missing"]


class Storage:
    """Artifacts under one root: a directory, or an object store."""

    def __init__(self, root: str, command: Sequence[str] | None = None) -> None:
        self._backend: Backend = ObjectStore(root) if is_store(root) else Directory(root)
        self.root = self._backend.root
        """The directory on this node: the root itself, or this node's copy of the object store."""
        self.uri = self._backend.uri
        """What people call the root."""
        self._command = tuple(command or command_here())
        self._verified: set[str] = set()
        self._manifests: dict[str, Manifest] = {}
        self._keys: dict[str, str] = {}
        """Of stages whose manifests were seen, by id."""
        self._listings: dict[str, Listing] | None = None
        self._leases: dict[str, Lease | None] = {}
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

    def place(self, stage: Stage[Any]) -> Path:
        """Return where on this node the finished artifact lies or will lie; of an object store ask `files` for it."""
        return stage.location or self.root / self._key(stage)

    def where(self, stage: Stage[Any]) -> str:
        """Return where the finished artifact lies or will lie, for people."""
        return str(stage.location) if stage.location else f"{self.uri}/{self._key(stage)}"

    def told(self, path: Path) -> str:
        """Return where a piece of work lies, for people."""
        return f"{self.uri}/{self._name(path)}"

    def status(self, stage: Stage[Any]) -> Status:
        """Return how far a stage is, from manifests and file sizes only.

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
        """Return the directory on this node where those files of a finished artifact lie that match a pattern."""
        if stage.location:
            if not stage.location.is_dir():
                do = "Give a directory that every node sees, or a model from a hub or package"
                raise UserError(problem("model.path", f"{stage.location} is not on {socket.gethostname()}", do))
            return stage.location
        return self._fetch(self._key(stage), pattern, prove)

    def _fetch(self, key: str, pattern: str, prove: bool = False) -> Path:
        if self._backend.shared and not prove:
            return self.root / key
        manifest = self._manifests.get(key) or self._backend.read_manifest(key)
        if manifest is None:
            raise UserError(problem(f"{self.uri}/{key}", "is no finished artifact", "Run the command again"))
        place = self._backend.fetch(key, manifest, pattern, prove)
        self._manifests[key] = manifest
        return place

    def handle(self, stage: Stage[Any]) -> Callable[[], Path]:
        """Return what gives any worker the verified directory of an artifact on its own node."""
        if self._backend.shared:
            return functools.partial(Path, self.fetch(stage))
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

        A file lock dies with its owner. In an object store a lease does so too, a minute later, or at once for a
        driver on the same node.
        """
        with ExitStack() as stack:
            stack.enter_context(file_lock(self.root, name))
            self._leases[name] = stack.enter_context(self._backend.hold(name))
            stack.callback(self._leases.pop, name)
            yield

    def scratch(self, stage: Stage[Any]) -> Path:
        """Return the stage's scratch directory, made or found as a killed run left it."""
        return made(self._scratch(stage))

    def resumable(self, stage: Stage[Any]) -> Path:
        """Return the directory of pieces that let the stage go on after a kill; it goes when the stage commits."""
        return made(self._resumable(stage))

    def ledger(self, name: str) -> Path:
        """Return a directory of rows that are generated once and for all, found by the id at the end of its name;
        artifacts are views of it."""
        return made(self.root / "ledger" / self._called("ledger", name))

    def publish(self, *files: Path) -> None:
        """Make pieces of work durable under the root, where other nodes find them."""
        self._backend.publish(files)

    def bring(self, folder: Path, pattern: str = "*") -> None:
        """Make this node's copy of a directory of work what the root has, as far as the names below it match.

        What only this node has is of a run that was killed, and may have been done again elsewhere since: it goes.
        """
        self._backend.bring(folder, pattern)

    def mirror(self, folder: Path) -> None:
        """Make a directory of work under the root what it is on this node: new pieces first, then what is gone goes."""
        self._backend.mirror(folder)

    def drop(self, path: Path) -> None:
        """Delete a piece of work, or a directory of them, here and under the root."""
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        self._backend.drop(path)

    def for_ray(self, folder: Path) -> dict[str, Any]:
        """Return how Ray Train and Tune are told to keep their own files in a directory of work."""
        return self._backend.for_ray(folder)

    def commit(self, stage: Stage[Any], summary: Mapping[str, Any], wall_seconds: float) -> Path:
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
        self._backend.store(key, scratch, self._leases.get(f"{stage.name}-{stage.id}"))
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch.rename(place)
        self.drop(self._resumable(stage))
        self._verified.add(stage.id)
        self._keys[stage.id] = key
        return place

    def keep_trace(self, stage: Stage[Any], trace: str) -> str:
        """Write a failure's stack trace and return where it is, as a sentence; nothing where even that fails."""
        name = f"failures/{stage.name}-{stage.id}.txt"
        try:
            self.keep(name, trace)
        except OSError:  # a full disk is the likeliest reason for the failure itself
            return ""
        return f" Trace: {self.uri}/{name}."

    def keep(self, name: str, text: str) -> None:
        """Write a small text below the root, where every node reads it."""
        path = self.root / name
        made(path.parent)
        write_atomically(path, text)
        self.publish(path)

    def kept(self, name: str) -> str | None:
        """Return a text that was kept, or None."""
        data = self._backend.read(name)
        return None if data is None else data.decode()

    def find(self, name: str, pattern: str = "*") -> Path:
        """Return the directory on this node of the artifact that a path, an id or the start of an id means, with those
        of its files that match a pattern.

        Raises UserError where nothing or more than one artifact fits.
        """
        if (Path(name) / MANIFEST).is_file():
            return Path(name)
        keys = [path.rpartition("/")[0] for path in sorted(self._backend.manifests(), reverse=True)]
        found = {  # two directories of one id are as good as one
            id_in(key): key for key in keys if key.count("/") == 1 and len(name) >= 4 and id_in(key).startswith(name)
        }
        if len(found) == 1:
            return self._fetch(next(iter(found.values())), pattern)
        if found:
            names = ", ".join(key.rpartition("/")[2] for key in sorted(found.values()))
            raise UserError(problem(name, f"means {len(found)} artifacts", f"Give more digits: {names}"))
        raise UserError(problem(name, f"is no artifact under {self.uri}", "See `sdft check RECIPE` for what there is"))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _key(self, stage: Stage[Any]) -> str:
        """Return where below the root a stage's artifact lies, by whatever name, or will lie."""
        known = self._keys.get(stage.id)
        if known and (not self._backend.shared or (self.root / known).is_dir()):
            return known
        return f"{stage.name}/{self._called(stage.name, stage.directory_name)}"

    def _called(self, folder: str, name: str) -> str:
        """Return the name in a folder of the root of the directory whose id is that of a name; else that name.

        Of several (roots have them from when artifacts were found by name) a finished one, and rather that name.
        """
        if self._backend.shared and (self.root / folder / name).is_dir():
            return name
        same = self._list(folder).names.get(id_in(name), [])
        if len(same) < 2:
            return same[0] if same else name
        return min(same, key=lambda each: (self._backend.read_manifest(f"{folder}/{each}") is None, each != name, each))

    def _list(self, folder: str) -> Listing:
        """Return what the root has in a folder; during a survey it is looked at once."""
        if self._listings is None:
            return self._backend.list(folder)
        if folder not in self._listings:
            self._listings[folder] = self._backend.list(folder)
        return self._listings[folder]

    def _scratch(self, stage: Stage[Any]) -> Path:
        folder = self.root / "scratch" / stage.name  # on this node, whatever the root is
        return next(iter(sorted(folder.glob(f"*-{stage.id}"))), folder / stage.directory_name)

    def _resumable(self, stage: Stage[Any]) -> Path:
        folder = f"resumable/{stage.name}"
        return self.root / folder / self._called(folder, stage.directory_name)


def probe(root: str) -> None:
    """Write, read and delete something small under a root, from whatever node this runs on.

    Raises UserError with one line where the root cannot do that from here.
    """
    data, where = uuid.uuid4().bytes, f"{root} from {socket.gethostname()}"
    backend: Backend = ObjectStore(root) if is_store(root) else Directory(root)
    try:
        found = backend.probe(f"probes/{uuid.uuid4().hex}", data)
    except OSError as error:
        store = "Check bucket, endpoint, network and credentials"
        do = store if is_store(root) else "Give a directory that every node may write"
        raise UserError(problem(where, error.strerror or str(error), do)) from None
    if found != data:
        raise UserError(problem(where, "does not give back what was written", "Use another root")) from None
