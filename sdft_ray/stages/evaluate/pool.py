"""Actors with one model, and one queue of what is asked of them.

In: requests. Out: a future of their answers for each shard of them. The first actor that the cluster holds begins;
further ones follow as it has room, up to a number, and leave when nothing waits for long. A dead actor costs the shard
that it was at: another one answers it. Nothing here knows a task, so tests put a fake where the model would be.
"""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from sdft_ray.cluster import below_ray, last_line
from sdft_ray.errors import StageFailed
from sdft_ray.stages.evaluate.harness import Loaded

DEATHS = 3  # over one shard, after which its task fails; as Ray has it for tasks
_LOOK_SECONDS = 0.2  # between two looks at whether something waits
_IDLE_SECONDS = 30.0  # after which an actor makes room; vLLM takes about as long to start


class Asked(NamedTuple):
    """What is asked of a model."""

    kind: str
    """A kind of request of the harness, or a field of `Loaded`."""
    requests: Sequence[tuple[Any, ...]]
    """The arguments of each."""


class _Request(NamedTuple):
    """What the harness's models read of one of its requests."""

    args: tuple[Any, ...]


@dataclasses.dataclass
class _Shard:
    asked: Asked
    answers: Future[list[Any]]
    deaths: int = 0


class Pool:
    """Actors that `start` returns, as many as there is room for and at most so many."""

    def __init__(self, start: Callable[[], Any], most: int) -> None:
        self.begun = threading.Event()
        """Set once the first actor is there, or has died."""
        self._start = start
        self._waiting: queue.SimpleQueue[_Shard] = queue.SimpleQueue()
        for number in range(most):
            threading.Thread(target=self._serve, args=[number == 0], daemon=True).start()

    def ask(self, asked: Asked) -> Future[list[Any]]:
        """Return the answers to come, one for each request."""
        shard = _Shard(asked, Future())
        self._waiting.put(shard)
        return shard.answers

    def _serve(self, stays: bool) -> None:
        """Answer shards by one actor after another; stays: also while none waits."""
        import ray

        while True:
            while not stays and self._waiting.empty():
                time.sleep(_LOOK_SECONDS)
            actor = self._start()
            try:
                if self._has_room(actor, stays):
                    self._use(actor, stays)
            except ray.exceptions.RayError as error:  # before it was handed a shard: blame one, or it would never end
                self._lose(self._waiting.get(), error)
            finally:
                ray.kill(actor)

    def _has_room(self, actor: Any, stays: bool) -> bool:
        """Wait for an actor's place on the cluster; return False where nothing waits for it any more."""
        import ray

        there = actor.ready.remote()
        try:
            while not ray.wait([there], timeout=_LOOK_SECONDS)[0]:
                if not stays and self._waiting.empty():
                    return False
            ray.get(there)
        finally:
            self.begun.set()
        return True

    def _use(self, actor: Any, stays: bool) -> None:
        """Let an actor answer shards until it dies or nothing waits for long."""
        import ray

        while True:
            try:
                shard = self._waiting.get(timeout=None if stays else _IDLE_SECONDS)
            except queue.Empty:
                return
            try:
                answers = ray.get(actor.answer.remote(shard.asked))
            except ray.exceptions.RayTaskError as error:  # of the model or the request: another actor does no better
                shard.answers.set_exception(below_ray(error))
            except ray.exceptions.RayError as error:
                self._lose(shard, error)
                return
            else:
                shard.answers.set_result(answers)

    def _lose(self, shard: _Shard, error: Exception) -> None:
        """Hand a shard on whose actor has died."""
        shard.deaths += 1
        if shard.deaths <= DEATHS:
            self._waiting.put(shard)
            return
        what = f"evaluate: processes with the model died {shard.deaths} times over {len(shard.asked.requests)} requests"
        shard.answers.set_exception(StageFailed(f"{what}, the last time with: {last_line(error)}"))


class Answerer:
    """An actor with a model, which is loaded when it is first asked."""

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._load = load

    @functools.cached_property
    def _loaded(self) -> Loaded:
        return self._load()

    def ready(self) -> None:
        """Do nothing, as soon as there is room for this actor."""

    def answer(self, asked: Asked) -> list[Any]:
        """Return an answer to each request."""
        kind, requests = asked
        match kind:
            case "answer":
                prompts, mosts, draws = zip(*requests, strict=True)
                (most,) = {*mosts}
                return self._loaded.answer(prompts, most, None if None in draws else draws)
            case "score":
                return self._loaded.score(requests)
        return list(getattr(self._loaded.lm, kind)([_Request(arguments) for arguments in requests]))
