"""An actor with an engine: it turns requests into pieces of the ledger.

In: the places of a batch in the file of requests. Out: pieces of the ledger, and how far the batch is. An actor may die
at any line: what it had written is found by the next one that gets the batch, and a row that kills its engine is found
by notes that dead processes leave.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdft_ray.core.selection import Generation
from sdft_ray.engine import EngineFactory, Request
from sdft_ray.errors import StageFailed, UserError
from sdft_ray.models.generation import sampling_seed
from sdft_ray.spec.compute import Endpoint, EngineOptions
from sdft_ray.stages.distill.draws import Settings, best_lines, keeps, next_draw, rules_of
from sdft_ray.stages.distill.instructions import prompts_of
from sdft_ray.stages.distill.placement import bring_to_nodes
from sdft_ray.stages.distill.requests import Asked, Requests
from sdft_ray.store import ledger as ledgers
from sdft_ray.store.identity import Stage
from sdft_ray.store.record import Record
from sdft_ray.store.storage import Storage

_REPORT_SECONDS = 1.0  # between two reports of an actor to the driver
_NARROWING = 16  # rows that more than one engine died on are tried in groups this many times smaller, down to one


class Note(Record):
    """What a process is at work on; one that is left says that it died."""

    batch: str
    ids: tuple[str, ...]
    """Of the rows."""
    positions: tuple[int, ...]
    """Theirs among the training rows."""
    error: str
    """What the engine said, if it did."""


class Counts(NamedTuple):
    """How far a batch is."""

    done: int
    """Rows that need no engine any more."""
    kept: int
    """Those of them that keep a rewrite."""
    prompt_tokens: int
    tokens: int


class Rewriter:
    """An actor with an engine; turns a batch of requests into ledger pieces."""

    def __init__(
        self,
        engine: EngineFactory,
        model: Callable[[], Path],
        storage: Storage,
        stage: Stage[Settings],
        options: EngineOptions | Endpoint,
        alone: bool,
        requests: Requests,
        ledger: str,
        piece: tuple[int, float],
    ) -> None:
        import ray
        from transformers import AutoTokenizer

        over_nodes = isinstance(options, EngineOptions) and options.distributed_executor_backend
        self.refusal: UserError | StageFailed | None = None
        try:
            directory = str(bring_to_nodes(model) if over_nodes else model())
            self.engine = engine(directory, stage.settings, options, alone)
        except ray.exceptions.RayActorError:  # of the engine on another node: raised, it would end the stage
            traceback.print_exc()
            os._exit(1)
        except (UserError, StageFailed) as error:  # raised here, it would come as the trace of a dead actor
            self.refusal = error
            return
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.settings, self.requests = stage.settings, requests
        self.piece_rows, self.piece_seconds = piece
        self.storage, self.ledger = storage, storage.ledger(ledger)
        self.actor = ray.get_runtime_context().get_actor_id()

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield how far the batch is, now and then."""
        import numpy as np

        if self.refusal:
            raise self.refusal
        start, stop = batch["start"].item(), batch["stop"].item()
        some = _Batch(self.requests.read(start, stop), self.settings)
        try:
            for counts in self._work_through(some):
                report = {"start": start, "actor": self.actor, **counts._asdict()}
                yield {name: np.array([value]) for name, value in report.items()}
        except (UserError, StageFailed):  # an endpoint that cannot be used: what it gave before is kept
            self._store(some)
            raise

    def _work_through(self, batch: _Batch) -> Iterator[Counts]:
        """Draw what each row needs, in rounds: the same sample again, or one more, where the last draw failed."""
        self.storage.bring(self.ledger, f"*-{batch.name}-*")
        pieces = list(ledgers.read_batch(self.ledger, batch.name))
        batch.find(itertools.chain.from_iterable(pieces))
        deaths, poison = _read_deaths(self.ledger, batch.name)
        dead = [(row_id, batch.rows[row_id].sample) for row_id in batch.without_lines(poison)]
        for request in self._requests(batch, dead):
            batch.take(request, Generation("the engine died on this row", "error"))
        draws = [(row_id, batch.next_sample(row_id, row_id in poison)) for row_id in batch.rows]
        reported = stored = time.monotonic()
        yield batch.counts()  # the engine has started
        for _ in pieces:  # Ray drops as many as it had from this batch before its actor died
            yield self._store(batch)
        while requests := self._requests(batch, draws):
            draws = []
            for group in _groups(requests, deaths, len(batch.rows)):
                for request, generation in self._generate(batch, group):
                    batch.take(request, generation)
                    draws.append((request.id, batch.next_sample(request.id)))
                    now = time.monotonic()
                    if len(batch.piece) < self.piece_rows or now - stored < self.piece_seconds:
                        continue
                    counts, stored = self._store(batch), now
                    if now - reported > _REPORT_SECONDS:
                        reported = now
                        yield counts
        counts = self._store(batch)
        self._merge(batch)
        yield counts

    def _store(self, batch: _Batch) -> Counts:
        """Make durable what the engine has finished, and return how far the batch is."""
        if batch.piece:
            self.storage.publish(ledgers.write_piece(self.ledger, batch.name, batch.piece))
            batch.piece.clear()
        return batch.counts()

    def _merge(self, batch: _Batch) -> None:
        """Make one piece of those of a finished batch: else millions of rows leave more files than a folder bears."""
        merged, pieces = ledgers.merge_batch(self.ledger, batch.name)
        if merged:
            self.storage.publish(merged)
        for piece in pieces:
            self.storage.drop(piece)

    def _requests(self, batch: _Batch, draws: Sequence[tuple[str, int | None]]) -> list[Request]:
        """Return the requests of those rows of which a sample is to be drawn."""
        wanted = [(row_id, sample) for row_id, sample in draws if sample is not None]
        prompts = prompts_of(self.tokenizer, [batch.rows[row_id].row for row_id, _ in wanted], self.settings)
        seeded = self.settings.seeds == "row"
        return [
            Request(row_id, sample, ids, sampling_seed(row_id, self.settings.seed, sample) if seeded else None)
            for (row_id, sample), ids in zip(wanted, prompts, strict=True)
        ]

    def _generate(self, batch: _Batch, group: Sequence[Request]) -> Iterator[tuple[Request, Generation]]:
        """Yield what the engine makes of a group, with a note on disk for as long as it is at work on it.

        A note that is still there says that the process died. An engine that raises ends its process too: nothing else
        repairs it, and Ray starts a new one.
        """
        note = self.ledger / f".trying-{batch.name}-{uuid.uuid4().hex[:8]}"
        ids = [request.id for request in group]
        places = tuple(batch.rows[row_id].position for row_id in ids)
        content = Note(batch=batch.name, ids=tuple(ids), positions=places, error="")
        content.to_file(note)
        self.storage.publish(note)
        try:
            yield from self.engine.generate(group)
        except (UserError, StageFailed):  # no process has died, and another one would meet the same
            self.storage.drop(note)
            raise
        except Exception as error:  # noqa: BLE001 - whatever a broken engine raises
            failed = content.model_copy(update={"error": f"{type(error).__name__}: {error}"})
            failed.to_file(note)
            self.storage.publish(note)
            traceback.print_exc()
            os._exit(1)
        self.storage.drop(note)


class _Batch:
    """The rows of one batch, and what was generated of them."""

    def __init__(self, requests: Sequence[Asked], settings: Settings) -> None:
        self.rows = {asked.row.id: asked for asked in requests}
        # Pieces are named after their batch, so a batch that Ray hands out again after a kill finds what it wrote.
        self.name = hashlib.sha256("".join(self.rows).encode()).hexdigest()[:12]
        self.piece: list[ledgers.Line] = []
        """Lines that are not durable yet."""
        self._settings = settings
        self._rules = rules_of(settings, (asked.row for asked in requests))
        self._lines: ledgers.Lines = {row_id: [] for row_id in self.rows}
        self._settled: dict[str, bool] = {}
        """For each row that needs no engine any more, whether it keeps a rewrite."""
        self._tokens_in = self._tokens_out = 0

    def find(self, lines: Iterable[ledgers.Line]) -> None:
        """Take in lines that the ledger holds."""
        for line in lines:
            self._lines[line.id].append(line)
            self._tokens_in += line.prompt_tokens
            self._tokens_out += line.tokens

    def take(self, request: Request, generation: Generation) -> None:
        """Take in what an engine made of a request."""
        line = ledgers.Line(request.id, request.sample, sampling_seed=request.sampling_seed, **vars(generation))
        self.find([line])
        self.piece.append(line)

    def without_lines(self, row_ids: set[str]) -> set[str]:
        """Return those of some rows of which there is nothing yet."""
        return {row_id for row_id in row_ids if not self._lines[row_id]}

    def next_sample(self, row_id: str, poison: bool = False) -> int | None:
        """Return the sample that a row needs next; None where it needs none, failed too often or kills engines."""
        asked, lines, samples = self.rows[row_id], self._lines[row_id], self._settings.samples
        rules = self._rules[asked.row.origin]
        draw = None if poison else next_draw(asked.row, lines, samples, rules, asked.sample)
        if draw is not None:
            sample, failed = draw
            before = asked.failed if sample == asked.sample else 0
            # Whatever happened in earlier runs, each run tries once: its cause may have been fixed.
            if not failed or before + failed < self._settings.max_attempts:
                return sample
        self._settled[row_id] = keeps(asked.row, best_lines(lines, samples), rules)
        return None

    def counts(self) -> Counts:
        """Return how far the batch is."""
        return Counts(len(self._settled), sum(self._settled.values()), self._tokens_in, self._tokens_out)


def _read_deaths(ledger: Path, batch: str) -> tuple[Counter[str], set[str]]:
    """Return how often a process died at work on each row of a batch, and the rows that it was alone with."""
    notes = [Note.from_file(path) for path in ledger.glob(f".trying-{batch}-*")]
    deaths = Counter(row_id for note in notes for row_id in note.ids)
    return deaths, {note.ids[0] for note in notes if len(note.ids) == 1}


def _groups(requests: Sequence[Request], deaths: Mapping[str, int], rows: int) -> Iterator[list[Request]]:
    """Yield requests in the groups that an engine gets them in: all at once, long ones first.

    Those that more than one process died on come last and in smaller groups, to find the one that kills.
    """
    ordered = sorted(requests, key=lambda request: (deaths[request.id], -len(request.prompt_ids)))
    for times, members in itertools.groupby(ordered, key=lambda request: deaths[request.id]):
        size = max(1, rows // _NARROWING ** max(0, times - 1))
        each = list(members)
        yield from (each[i : i + size] for i in range(0, len(each), size))
