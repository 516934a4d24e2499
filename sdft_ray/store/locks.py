"""File locks give the one right to work on something, on one machine or one shared file system."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sdft_ray.progress import log


@contextmanager
def file_lock(root: Path, name: str) -> Iterator[None]:
    """Hold a lock below a root, which dies with its owner; a waiting process logs that it waits."""
    folder = root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        log(f"{name}: another command works on it; waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
