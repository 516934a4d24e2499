"""A lease in an object store: the one right to work on something where no file lock reaches.

In: a name. Out: the right, for as long as the holder lives and reaches the store. Each holder makes an object of its
own, numbered one above the newest, by a create that only one wins, and rewrites it now and then. A waiting process
takes over once the newest has not changed for a minute of its own clock, so clocks need not agree. The newest number is
never deleted: a holder that was long asleep and writes to its own, older number does not regain the right.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sdft_ray.errors import StageFailed
from sdft_ray.progress import log
from sdft_ray.store.objects import Objects

BEAT_SECONDS = 10.0
EXPIRE_SECONDS = 60.0  # several beats: one that a busy store refuses ends no lease
_POLL_SECONDS = 1.0


class Lease:
    """A lease that this process holds."""

    def __init__(self, objects: Objects, name: str, node: str, number: int) -> None:
        self.number, self._objects, self._name = number, objects, name
        self._content = {"node": node, "host": socket.gethostname(), "holder": uuid.uuid4().hex}
        self._reached = 0.0
        self._ended = threading.Event()

    def require(self) -> None:
        """Raise StageFailed where another process may have taken over."""
        late = time.monotonic() - self._reached > EXPIRE_SECONDS
        if late or _newest(self._objects, self._name)[0] != self.number:
            what = f"{self._name}: the store could not be reached for a while, and another command may have taken over"
            raise StageFailed(f"{what}. Finished work is kept; run the same command again")

    def take(self) -> bool:
        """Return whether this process now holds the lease; of two that try the same number at most one does."""
        self._reached = time.monotonic()
        return self._objects.create(_key(self._name, self.number), self._bytes(0))

    def keep(self) -> None:
        """Rewrite the lease now and then until `release`; runs in a thread."""
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat, begun = beat + 1, time.monotonic()
            with suppress(OSError):  # `require` raises once it matters
                self._objects.write(_key(self._name, self.number), self._bytes(beat))
                self._reached = begun

    def release(self, keeper: threading.Thread) -> None:
        """Give the lease up, so that the next process need not wait."""
        self._ended.set()
        keeper.join()
        with suppress(OSError):  # then it expires
            self._objects.write(_key(self._name, self.number), json.dumps({"released": True}).encode())

    def _bytes(self, beat: int) -> bytes:
        return json.dumps({**self._content, "beat": beat}).encode()


@contextmanager
def hold(objects: Objects, name: str, node: str) -> Iterator[Lease]:
    """Hold the lease on a name; wait, visibly, while another process holds it.

    `node`: two processes of the same node must hold a file lock of that name before they call this. So
    the holder of a lease of the same node is dead.
    """
    seen, since = b"", time.monotonic()
    logged = False
    while True:
        number, content = _newest(objects, name)
        if content != seen:
            seen, since = content, time.monotonic()
        holder = _parse(content)
        free = not content or holder.get("released") or holder.get("node") == node
        if free or time.monotonic() - since > EXPIRE_SECONDS:
            lease = Lease(objects, name, node, number + 1)
            if lease.take():
                break
            continue
        if not logged:
            host = holder.get("host", "another machine")
            log(f"{name}: another command works on it ({host}), or did until lately; waiting")
            logged = True
        time.sleep(_POLL_SECONDS)
    keeper = threading.Thread(target=lease.keep, daemon=True)
    keeper.start()
    try:
        objects.delete(key for key in objects.list(_folder(name)) if key < _key(name, lease.number))
        yield lease
    finally:
        lease.release(keeper)


def _newest(objects: Objects, name: str) -> tuple[int, bytes]:
    """Return number and content of the newest lease; 0 and nothing where there was none."""
    keys = sorted(objects.list(_folder(name)))
    if not keys:
        return 0, b""
    return int(keys[-1].rpartition("/")[2]), objects.read(keys[-1]) or b"?"


def _parse(content: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        return {}


def _folder(name: str) -> str:
    return f"locks/{name}"


def _key(name: str, number: int) -> str:
    return f"locks/{name}/{number:09d}"
