"""Where artifacts lie: the only module that knows the root.

In: stages and the files that they wrote. Out: finished artifacts under `{root}/{stage}/{slug}-{id}/`.
A stage works in a scratch directory with a stable name; `commit` writes the manifest there and moves the whole
directory to its place in one rename. So whatever stands in its place is whole, and what a kill leaves in scratch
is gone on with by the next run. Pieces that outlive a stage's scratch (ledger, training checkpoints) have
directories of their own.
"""

from __future__ import annotations

import json
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from sdft_ray import artifacts
from sdft_ray.artifacts import Stage
from sdft_ray.errors import UserError, problem
from sdft_ray.objects import Objects
from sdft_ray.progress import say

Status = Literal["done", "partial", "missing"]


class Storage:
    """Artifacts under one root: a local directory, or one that every node shares."""

    def __init__(self, root: str) -> None:
        if "://" in root:
            raise UserError(problem("--root", f"{root} is not a path", "Give a directory that every node can see"))
        self.root = Path(root).expanduser().resolve()
        self._verified: set[str] = set()
        self._fetching = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a worker have storage of the same root; it checks hashes for itself."""
        return Storage, (str(self.root),)

    def place(self, stage: Stage) -> Path:
        """Return where the finished artifact lies or will lie."""
        return stage.location or self.root / stage.name / stage.directory_name

    def status(self, stage: Stage) -> Status:
        """Return how far a stage is, from manifests and file sizes only.

        Raises UserError where a finished artifact lost or shortened a file: it is never rebuilt silently.
        """
        if stage.location:
            return "done"
        if manifest := artifacts.read_manifest(self.place(stage)):
            artifacts.check_files(self.place(stage), manifest, hashes=False)
            return "done"
        begun = (self._scratch(stage), self._resumable(stage))
        return "partial" if any(path.exists() for path in begun) else "missing"

    def fetch(self, stage: Stage) -> Path:
        """Return the directory of a finished artifact after checking its hashes, once a process."""
        place = self.place(stage)
        with self._fetching:  # evaluations of one model ask for it at the same time
            if not stage.location and stage.id not in self._verified:
                artifacts.check_files(place, self.manifest(stage), hashes=True)
                self._verified.add(stage.id)
        return place

    def manifest(self, stage: Stage) -> dict[str, Any]:
        """Return the manifest of a finished artifact."""
        manifest = artifacts.read_manifest(self.place(stage))
        assert manifest is not None, f"{stage.directory_name} is not finished"
        return manifest

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the one right to work on something; a second driver waits, visibly. The lock dies with its owner."""
        path = self.root / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0.5)
        except Timeout:
            say(f"{name}: another command is at work on it; waiting")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def scratch(self, stage: Stage) -> Path:
        """Return the stage's scratch directory, made or found as a killed run left it."""
        path = self._scratch(stage)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def resumable(self, stage: Stage) -> Path:
        """Return the directory of pieces that let the stage go on after a kill; it goes when the stage commits."""
        path = self._resumable(stage)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def ledger(self, name: str) -> Path:
        """Return a directory of rows that are generated once and for all; artifacts are views of it."""
        path = self.root / "ledger" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, stage: Stage, summary: Mapping[str, Any], wall_seconds: float) -> Path:
        """Make the scratch directory the finished artifact, in one rename, and drop what only resuming needed."""
        scratch, place = self._scratch(stage), self.place(stage)
        for torn in scratch.rglob(".*.tmp"):  # of a write that a kill cut short
            torn.unlink()
        readable = scratch.stat().st_mode & 0o044  # as the user's umask has it
        for path in scratch.rglob("*"):  # safetensors writes files that only their owner may read
            path.chmod(path.stat().st_mode | readable)
        artifacts.write_manifest(scratch, stage, summary, wall_seconds)
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch.rename(place)
        shutil.rmtree(self._resumable(stage), ignore_errors=True)
        self._verified.add(stage.id)
        return place

    def keep_trace(self, stage: Stage, trace: str) -> str:
        """Write a failure's stack trace and return where it is, as a sentence; nothing where even that fails."""
        path = self.root / "failures" / f"{stage.name}-{stage.id}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(trace)
        except OSError:  # a full disk is the likeliest reason for the failure itself
            return ""
        return f" Trace: {path}."

    def keep_failure(self, stage: Stage, reason: str) -> None:
        """Write down why a stage of a sweep could not be built."""
        path = self._failure(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_atomically(path, reason)

    def failure(self, stage: Stage) -> str | None:
        """Return why a stage could not be built when that was last tried, if it was."""
        path = self._failure(stage)
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def forget_failure(self, stage: Stage) -> None:
        """Drop the reason: the stage is tried again."""
        self._failure(stage).unlink(missing_ok=True)

    def keep_losses_of_stopped(self, sweep: str, stage: Stage, losses: Sequence[tuple[int, float]]) -> None:
        """Write down that a sweep stopped a training, and the validation losses (step, loss) that it had until then."""
        path = self._stopped(sweep, stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_atomically(path, json.dumps(losses))

    def losses_of_stopped(self, sweep: str, stage: Stage) -> list[tuple[int, float]] | None:
        """Return the validation losses of a training that a sweep stopped; None where it did not."""
        path = self._stopped(sweep, stage)
        return [tuple(pair) for pair in json.loads(path.read_text())] if path.is_file() else None

    def find(self, name: str) -> Path:
        """Return the artifact directory that a path, an id or the start of an id means.

        Raises UserError where nothing or more than one artifact fits.
        """
        if (Path(name) / artifacts.MANIFEST).is_file():
            return Path(name)
        found = sorted(
            manifest.parent
            for manifest in self.root.glob(f"*/*/{artifacts.MANIFEST}")
            if len(name) >= 4 and manifest.parent.name.rpartition("-")[2].startswith(name)
        )
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(problem(name, f"means {len(found)} artifacts", f"Give more digits: {_names(found)}"))
        raise UserError(problem(name, f"is no artifact under {self.root}", "See `sdft check RECIPE` for what there is"))

    def _scratch(self, stage: Stage) -> Path:
        return self.root / "scratch" / stage.name / stage.directory_name

    def _failure(self, stage: Stage) -> Path:
        return self.root / "failures" / f"{stage.name}-{stage.id}.reason.txt"

    def _stopped(self, sweep: str, stage: Stage) -> Path:
        return self.root / "failures" / sweep / f"{stage.id}.stopped.json"

    def _resumable(self, stage: Stage) -> Path:
        return self.root / "resumable" / stage.name / stage.directory_name


def probe(root: str) -> None:
    """Write, read and delete something small under a root, from whatever node this runs on.

    Raises UserError with one line where the root cannot do that from here.
    """
    name, data = f"probes/{uuid.uuid4().hex}", uuid.uuid4().bytes
    where = f"{root} from {socket.gethostname()}"
    try:
        if "://" in root:
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
        do = store if "://" in root else "Give a directory that every node may write"
        raise UserError(problem(where, error.strerror or str(error), do)) from None
    if found != data:
        raise UserError(problem(where, "does not give back what was written", "Use another root")) from None


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)
