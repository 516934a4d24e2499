"""Tasks of one model, whose items are answered by a pool of actors.

In: tasks, one or two at a time. Out: their scores and items. This process has the harness, and no model: it makes all
requests of a task, shards of them are answered by the pool, and the harness makes the score. So numbers do not depend
on who answered what. The answers of a shard are kept under the root as soon as they are there: whatever dies, they are
not asked for again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, NamedTuple

from sdft_ray.core.rows import Row
from sdft_ray.core.shares import shares
from sdft_ray.models.generation import Draw, Written
from sdft_ray.results import Item, Score
from sdft_ray.stages.evaluate.harness import Loaded
from sdft_ray.stages.evaluate.pool import Answerer, Asked, Pool
from sdft_ray.stages.evaluate.settings import Settings
from sdft_ray.store.files import write_atomically
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

TASKS_AT_ONCE = 2  # of a model: while the last shards of one are answered, the requests of the next are made


class Sizes(NamedTuple):
    """How a task's items are divided."""

    actors: int
    """At most."""
    items: int
    """Of one shard, at most."""


class Evaluator:
    """An actor without resources, which takes a model through tasks; its pool ends with it."""

    def __init__(
        self, outline: Callable[[], Path], load: Callable[[], Loaded], takes: dict[str, Any], sizes: Sizes
    ) -> None:
        import ray

        self._outline, self._sizes = outline, sizes
        self._pool = Pool(lambda: ray.remote(Answerer).options(**takes).remote(load), sizes.actors)
        self._turn = threading.Lock()  # the harness sets seeds of the whole process, and so on

    def evaluate(
        self,
        run: Callable[..., tuple[Score, Sequence[Item]]],
        stage: Stage[Settings],
        storage: Storage,
        rows: list[Row],
    ) -> tuple[Score, Sequence[Item]]:
        """Return what `run` makes of a model, settings and held-out rows: the score and the items of one task."""
        self._pool.begun.wait()  # until then the harness would only take memory
        with self._turn:
            answers = _Answers(self._pool, self._turn, storage, stage, self._sizes)
            return run(lambda: load_sharded(str(self._outline()), answers), stage.settings, rows)


def load_sharded(model: str, ask: Ask) -> Loaded:
    """Return a model that is somewhere else; model: a directory with its config and tokenizer."""
    from sdft_ray.stages.evaluate.by_engine import OutlineLM

    class ShardedLM(OutlineLM):
        """The harness's model, where others answer."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return [(likelihood, greedy) for likelihood, greedy in ask_of_harness("loglikelihood", requests)]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return ask_of_harness("loglikelihood_rolling", requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return ask_of_harness("generate_until", requests)

    def ask_of_harness(kind: str, requests: Sequence[Any]) -> list[Any]:
        items = [(each.task_name, each.doc_id) for each in requests]
        return ask(Asked(kind, [each.args for each in requests]), items)

    def answer(prompts: Sequence[list[int]], max_new_tokens: int, draws: Sequence[Draw] | None = None) -> list[Written]:
        ways: Sequence[Draw | None] = draws or [None] * len(prompts)
        asked = Asked("answer", [(ids, max_new_tokens, way) for ids, way in zip(prompts, ways, strict=True)])
        return [Written(*each) for each in ask(asked, range(len(prompts)))]

    def score(requests: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        return [(x, greedy) for x, greedy in ask(Asked("score", requests), range(len(requests)))]

    lm = ShardedLM(model)
    return Loaded(lm, lm.tokenizer, answer, score)


Ask = Callable[[Asked, Sequence[Hashable]], list[Any]]
"""Returns the answer to each request, of which those of one item stand together; the item of each is named."""


class _Answers:
    """Asks a pool for what is not kept yet of a stage, and keeps it."""

    def __init__(
        self, pool: Pool, turn: threading.Lock, storage: Storage, stage: Stage[Settings], sizes: Sizes
    ) -> None:
        self._pool, self._turn, self._sizes = pool, turn, sizes
        self._storage, self._folder = storage, storage.resumable(stage)

    def __call__(self, asked: Asked, items: Sequence[Hashable]) -> list[Any]:
        with self._others_turn():
            digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
            self._storage.bring(self._folder, f"{digest}-*")
            answers: dict[int, list[Any]] = {}  # by the place of the first
            for path in self._folder.glob(f"{digest}-*.json"):
                answers[int(path.stem.rpartition("-")[2])] = json.loads(path.read_text(encoding="utf-8"))
            kind, requests = asked
            open_ = {
                self._pool.ask(Asked(kind, requests[start:stop])): (start, stop)
                for start, stop in self._cut(items, {start: start + len(some) for start, some in answers.items()})
            }
            for future in as_completed(open_):
                start, stop = open_[future]
                answers[start] = future.result()
                assert len(answers[start]) == stop - start, f"{len(answers[start])} answers to {stop - start} requests"
                path = self._folder / f"{digest}-{start}.json"
                write_atomically(path, json.dumps(answers[start]))
                self._storage.publish(path)
            return [answer for _, some in sorted(answers.items()) for answer in some]

    def _cut(self, items: Sequence[Hashable], known: dict[int, int]) -> Iterator[tuple[int, int]]:
        """Yield ranges of requests that are not known, by their first and with their end; none divides an item."""
        bounds = [0, *itertools.accumulate(len([*same]) for _, same in itertools.groupby(items))]
        gaps = zip([0, *sorted(known.values())], [*sorted(known), len(items)], strict=True)
        for begin, end in gaps:
            of_gap = [bound for bound in bounds if begin <= bound <= end]
            for some in shares(len(of_gap) - 1, self._sizes.actors, self._sizes.items):
                yield of_gap[some.start], of_gap[some.stop]

    @contextlib.contextmanager
    def _others_turn(self) -> Iterator[None]:
        """Let another task of this process use the harness meanwhile."""
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()
