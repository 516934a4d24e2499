"""Stage `distill`: the unpruned model rewrites the training references; checked rewrites take their place.

In: the base model and the training rows. Out: train.parquet, each row once, with the response to train on, where it
came from and why; README.md, its dataset card. Ray Data drives actors that each hold an engine. What an engine
finishes goes into the ledger in small atomic pieces before anything else happens to it, so no kill costs more than one
piece an actor; the artifact is a view of that ledger. The ledger's identity covers teacher, prompt and sampling, not
which rows were asked for: more rows, more samples, another checker or another filter never generate anything again.
How many rows may fail is a gate: it moves no id, and the finished counts are compared with it.
Rows pass through the driver in batches: its memory does not grow with their number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import time
import traceback
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.core.prompts import CHECKABLE, OPEN, RENDERING_VERSION, rewrite_instruction
from sdft_ray.core.selection import COMPLETE, REASONS, Generation, Rules, select_response
from sdft_ray.data.chat import render_prompt, require_trainable
from sdft_ray.data.checkers import CHECKERS
from sdft_ray.engine import Engine, Request, VllmEngine
from sdft_ray.errors import StageFailed, problem
from sdft_ray.stages import Work
from sdft_ray.stages.distill import card
from sdft_ray.stages.rows import training_batches
from sdft_ray.store import ledger as ledgers
from sdft_ray.store.files import write_atomically
from sdft_ray.store.identity import Stage, short_id
from sdft_ray.store.storage import Storage

VERSION = 3
GATES = ("max_failed_fraction", "max_attempts")
"""Settings of the recipe's `distill` that do not belong to what is computed."""
_FINISHED = "finished.json"  # the summary of a dataset that is whole and that its gate stopped
_SAMPLING = ("temperature", "top_p", "max_new_tokens", "dtype", "seed")
_COUNTS = ("done", "kept", "prompt_tokens", "tokens")
_REQUEST_COLUMNS = ("id", "prompt", "reference", "answer")
_GROUP_ROWS = 64  # of the file of requests: what an actor reads at least
_TELL_SECONDS = 1.0  # between two reports of an actor to the driver
_NARROWING = 16  # rows that more than one engine died on are tried in groups this many times smaller, down to one


def build(work: Work) -> dict[str, Any]:
    """Generate what the ledger lacks, then select and write the dataset.

    A dataset that its gate stopped lies there: a looser gate finishes it at once, the same one asks for what failed
    once more.
    """
    finished = work.resumable / _FINISHED
    if finished.is_file() and (work.directory / "train.parquet").is_file():
        summary = dict(json.loads(finished.read_text()))
        if _failed_fraction(summary) <= _allowed(work.stage):
            return summary
    finished.unlink(missing_ok=True)
    summary = _make_dataset(work)
    if _failed_fraction(summary) > _allowed(work.stage):
        write_atomically(finished, json.dumps(summary))
    require_gates(work.stage, summary)
    return summary


def require_gates(stage: Stage, summary: Mapping[str, Any]) -> None:
    """Raise StageFailed where more rows failed in the engine than the recipe allows."""
    if _failed_fraction(summary) > _allowed(stage):
        what = f"{summary['reasons']['error']} of {summary['rows']} rows failed in the engine"
        what += f", mostly with: {summary['usual_error']}"
        what += f" (got {_failed_fraction(summary):.2%}; expected at most {_allowed(stage):.2%})"
        raise StageFailed(problem("distill.max_failed_fraction", what, "Raise it; what was generated is kept"))


def _failed_fraction(summary: Mapping[str, Any]) -> float:
    return float(summary["reasons"]["error"] / summary["rows"])


def _allowed(stage: Stage) -> float:
    return float(stage.gates["max_failed_fraction"])


def _make_dataset(work: Work) -> dict[str, Any]:
    """Generate what the ledger lacks and write the dataset; return its figures."""
    _require_trainable(work)
    identity = ledger_id(work)
    with work.storage.lock(f"ledger-{identity}"):  # recipes that ask for other rows share it
        ledger = work.storage.ledger(f"{work.stage.inputs['model'].slug}-{identity}")
        work.storage.bring(ledger)
        _tidy(work, ledger)
        # A name of its own: what another node has of an earlier run is not this.
        for old in work.resumable.glob("requests-*"):
            work.storage.drop(old)
        requests = work.resumable / f"requests-{uuid.uuid4().hex[:8]}.parquet"
        with ledgers.open_ledger(ledger) as lines_of:
            rows, missing = _write_requests(work, lines_of, requests)
        work.progress.begin(rows, done=rows - missing)
        if missing:
            work.storage.publish(requests)
            _generate(work, requests, missing, ledger)
            work.storage.bring(ledger, "part-*")
            _tidy(work, ledger)
        with ledgers.open_ledger(ledger) as lines_of:
            summary = _write_dataset(work, lines_of)
    return {**summary, "ledger": ledger.name}


def _require_trainable(work: Work) -> None:
    """Raise UserError where the rewrites could not be trained on: before the first is generated."""
    from transformers import AutoTokenizer

    for pattern in ("*.json", "*.jinja", "*.txt", "tokenizer.model"):  # this node needs no weights
        place = work.storage.files(work.stage.inputs["model"], pattern)
    require_trainable(AutoTokenizer.from_pretrained(place))


def _tidy(work: Work, ledger: Path) -> None:
    """Merge the pieces of a ledger that is whole on this node, here and under the root."""
    for left in ledger.glob(".trying-*"):  # of a run that was stopped: that says nothing about its rows
        left.unlink()
    ledgers.compact(ledger)
    work.storage.mirror(ledger)


def ledger_id(work: Work) -> str:
    """Return the id of the ledger that these rows' generations go into."""
    identity = {
        "model": work.stage.inputs["model"].id,
        "rendering": RENDERING_VERSION,
        "template": _template(work.settings),
        "template_options": work.settings["template_options"],
        **{key: work.settings[key] for key in _SAMPLING},
    }
    return short_id(identity)


def _template(settings: Mapping[str, Any]) -> str:
    """Return the rewriting instruction: the recipe's own, else the one that suits how rows are checked."""
    return settings["template"] or (OPEN if settings["answer"] == "none" else CHECKABLE)


def sampling_seed(row_id: str, seed: int, sample: int = 0) -> int:
    """Return the seed of one sample of a row: it depends on nothing but these and the recipe's seed."""
    name = f"{seed}:{row_id}" + (f":{sample}" if sample else "")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def select_rows(
    rows: Sequence[Mapping[str, Any]],
    generations: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return every row with its selected response, and how many rows there are for each reason.

    rows in = rows out, in the same order: each is trained on, with the first of its samples that passes, or with its
    reference. A function of what is there already: other settings select again and generate nothing.
    """
    rules = Rules(CHECKERS.get(settings["answer"]), settings["filters"], settings["strip_thinking"])
    selected = []
    for row in rows:
        samples = [
            Generation(made["text"], made["finish_reason"], made["prompt_tokens"], made["tokens"])
            for made in generations[row["id"]]
        ]
        chosen = select_response(row, samples, rules)
        generation, made = samples[chosen.sample], generations[row["id"]][chosen.sample]
        selected.append(
            {
                **row,
                **dataclasses.asdict(chosen),
                "generated": generation.text,
                "finish_reason": generation.finish_reason,
                "prompt_tokens": generation.prompt_tokens,
                "generated_tokens": generation.tokens,
                "sampling_seed": made["sampling_seed"],
            }
        )
    counts = Counter(row["reason"] for row in selected)
    assert len(selected) == len(rows) == counts.total(), "every row has exactly one reason"
    return selected, {reason: counts[reason] for reason in REASONS}


def next_draw(
    row: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], first: int = 0
) -> tuple[int, int] | None:
    """Return the sample of a row that is to be drawn next and how often that failed; None where nothing is left.

    A sample is drawn only where none before it passes. `first`: the samples before it are known not to pass.
    """
    for sample in range(first, settings["samples"]):
        mine = [line for line in lines if line["sample"] == sample]
        complete = [line for line in mine if line["finish_reason"] in COMPLETE]
        if not complete:
            return sample, len(mine)
        if select_rows([row], {row["id"]: complete[:1]}, settings)[1]["kept"]:
            return None
    return None


def _write_requests(work: Work, lines_of: Callable[..., ledgers.Lines], path: Path) -> tuple[int, int]:
    """Write the rows that need the engine to a file; return how many rows there are and how many need it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [(name, pa.string()) for name in _REQUEST_COLUMNS]
        + [(name, pa.int32()) for name in ("position", "sample", "failed")]
    )
    rows = missing = 0
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema) as file:
        for batch in training_batches(work.input("rows"), work.settings["rows"]):
            lines = lines_of(row["id"] for row in batch)
            for position, row in enumerate(batch, rows):
                if draw := next_draw(row, lines[row["id"]], work.settings):
                    kept = {name: row[name] for name in _REQUEST_COLUMNS}
                    waiting.append({**kept, "position": position, "sample": draw[0], "failed": draw[1]})
            rows += len(batch)
            while len(waiting) >= _GROUP_ROWS:
                file.write_table(pa.Table.from_pylist(waiting[:_GROUP_ROWS], schema))
                waiting = waiting[_GROUP_ROWS:]
                missing += _GROUP_ROWS
        file.write_table(pa.Table.from_pylist(waiting, schema))
    return rows, missing + len(waiting)


def _read_requests(path: Path, start: int, stop: int) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    first = start // _GROUP_ROWS
    groups = pq.ParquetFile(path).read_row_groups(range(first, (stop - 1) // _GROUP_ROWS + 1))
    found: list[dict[str, Any]] = groups.slice(start - first * _GROUP_ROWS, stop - start).to_pylist()
    return found


def _generate(work: Work, requests: Path, missing: int, ledger: Path) -> None:
    import ray
    from ray.util.annotations import RayDeprecationWarning

    plan, pool = work.compute.distill, work.compute.distill.actors
    size = min(plan.batch_rows, -(-missing // pool.max))
    batches = [(start, min(start + size, missing)) for start in range(0, missing, size)]
    # The number of restarts has no parameter of its own yet (docs/footguns.md).
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
    dataset = ray.data.from_items(
        [{"start": start, "stop": stop} for start, stop in batches], override_num_blocks=len(batches)
    ).map_batches(
        Rewriter,
        fn_constructor_kwargs={
            "engine": VllmEngine,
            "model": work.handle("model"),
            "storage": work.storage,
            "stage": work.stage,
            "settings": dict(work.settings),
            "max_attempts": work.stage.gates["max_attempts"],
            "options": plan.engine.model_dump() | {"tensor_parallel_size": plan.tensor_parallel_size},
            "alone": pool.max == 1,
            "requests": requests.name,
            "ledger": ledger.name,
            "piece_rows": plan.piece_rows,
        },
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=pool.min, max_size=pool.max, max_tasks_in_flight_per_actor=2),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus or None,
        # Ray Data's own default is to try for ever.
        max_restarts=plan.max_failures,
        max_task_retries=plan.max_failures,
    )
    dataset.context.target_max_block_size = 1  # else what a batch yields comes to the driver at the batch's end
    tally = _Tally(work)
    try:
        for piece in dataset.iter_batches(batch_size=None):
            tally.add({name: column.tolist()[0] for name, column in piece.items()})
    except ray.exceptions.RayActorError as error:
        work.storage.bring(ledger, ".trying-*")
        kept = f"What was generated is kept in {work.storage.told(ledger)}"
        raise StageFailed(f"distill: {_died_on(ledger) or error}. {kept}") from error


class _Tally:
    """What all batches have come to, for the progress line; a batch that is tried again counts anew."""

    def __init__(self, work: Work) -> None:
        self.progress, self.done_before = work.progress, work.progress.done
        self.begun = time.monotonic()
        self.batches: dict[int, dict[str, Any]] = {}
        self.heard: dict[str, float] = {}

    def add(self, piece: dict[str, Any]) -> None:
        """Take in how far a batch is."""
        now = time.monotonic()
        self.batches[piece["start"]], self.heard[piece["actor"]] = piece, now
        total = {name: sum(batch[name] for batch in self.batches.values()) for name in _COUNTS}
        into, out = (total[name] / (now - self.begun) for name in ("prompt_tokens", "tokens"))
        actors = sum(now - heard < 60 for heard in self.heard.values())
        self.progress.update(
            self.done_before + total["done"],
            f"{into:.0f} tokens/s in, {out:.0f} out, {total['kept'] / max(1, total['done']):.0%} kept, "
            f"{actors} actor{'s' * (actors != 1)}",
        )


def _died_on(ledger: Path) -> str:
    """Return which rows engines died on and what the last one said; nothing where none died at work."""
    notes = [json.loads(path.read_text()) for path in sorted(ledger.glob(".trying-*"), key=lambda p: p.stat().st_mtime)]
    if not notes:
        return ""
    last = notes[-1]
    times = sum(note["batch"] == last["batch"] for note in notes)
    said = f", saying {last['error']}" if last["error"] else ""
    rows = f"rows {min(last['positions'])} to {max(last['positions'])} of the training rows"
    return f"the engine died {times} times over one batch, the last time on {rows}{said}"


def _write_dataset(work: Work, lines_of: Callable[..., ledgers.Lines]) -> dict[str, Any]:
    """Write train.parquet and its card; return the figures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts: Counter[str] = Counter()
    messages: Counter[str] = Counter()
    generated = tokens = 0
    examples: dict[str, dict[str, Any]] = {}
    schema = card.schema()
    with pq.ParquetWriter(work.directory / "train.parquet", schema) as file:
        for batch in training_batches(work.input("rows"), work.settings["rows"]):
            read = lines_of(row["id"] for row in batch)
            lines = {row_id: _samples(found, work.settings["samples"]) for row_id, found in read.items()}
            selected, found = select_rows(batch, lines, work.settings)
            counts.update(found)
            messages.update(row["generated"] for row in selected if row["reason"] == "error")
            generated += sum(len(made) for made in lines.values())
            tokens += sum(line["tokens"] for made in lines.values() for line in made)
            for row in selected:
                examples.setdefault(row["reason"], row)
            file.write_table(pa.Table.from_pylist([card.record(row) for row in selected], schema))
    rows = counts.total()
    summary = {
        "rows": rows,
        "kept": counts["kept"],
        "acceptance": counts["kept"] / rows,
        "reasons": {reason: counts[reason] for reason in REASONS},
        "usual_error": messages.most_common(1)[0][0] if messages else None,
        "generations": generated,
        "generated_tokens": tokens,
        "mean_generated_tokens": tokens / generated,
    }
    card.write(work.directory, work.stage, summary, examples)
    return summary


def _samples(lines: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Return one line for each of the first `count` samples of a row, in order: what was generated, else an error."""
    best: dict[int, Mapping[str, Any]] = {}
    for line in lines:
        if line["sample"] >= count:  # of a recipe that drew more
            continue
        if line["sample"] not in best or line["finish_reason"] in COMPLETE:
            best[line["sample"]] = line
    return [best[sample] for sample in sorted(best)]


# --- in the actors ----------------------------------------------------------------------------------------------


class Rewriter:
    """An actor with an engine; turns a batch of requests into ledger pieces."""

    def __init__(
        self,
        engine: Callable[..., Engine],
        model: Callable[[], Path],
        storage: Storage,
        stage: Stage,
        settings: dict[str, Any],
        max_attempts: int,
        options: dict[str, Any],
        alone: bool,
        requests: str,
        ledger: str,
        piece_rows: int,
    ) -> None:
        import ray
        from transformers import AutoTokenizer

        directory = str(model())
        self.engine = engine(directory, settings, options, alone)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.settings, self.max_attempts, self.piece_rows = settings, max_attempts, piece_rows
        self.storage, self.ledger = storage, storage.ledger(ledger)
        self.requests = storage.resumable(stage) / requests
        storage.bring(self.requests.parent, requests)
        self.actor = ray.get_runtime_context().get_actor_id()

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield how far the batch is, now and then."""
        import numpy as np

        start, stop = batch["start"].item(), batch["stop"].item()
        for counts in self._work_through(_read_requests(self.requests, start, stop)):
            yield {name: np.array([value]) for name, value in {"start": start, "actor": self.actor, **counts}.items()}

    def _work_through(self, asked: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, int]]:
        """Draw what each row needs, in rounds: the same sample again, or one more, where the last draw failed."""
        rows = {row["id"]: row for row in asked}
        # Pieces are named after their batch, so a batch that Ray hands out again after a kill finds what it wrote.
        batch = hashlib.sha256("".join(rows).encode()).hexdigest()[:12]
        self.storage.bring(self.ledger, f"*-{batch}-*")
        made: dict[str, list[dict[str, Any]]] = {row_id: [] for row_id in rows}
        pieces = list(ledgers.read_batch(self.ledger, batch))
        for line in itertools.chain.from_iterable(pieces):
            made[line["id"]].append(line)
        deaths, guilty = _read_deaths(self.ledger, batch)
        piece: list[dict[str, Any]] = []
        settled: dict[str, bool] = {}
        """For each row that needs no engine any more, whether it keeps a rewrite."""

        def take(request: Request, generation: Generation) -> None:
            identity = {"id": request.id, "sample": request.sample, "sampling_seed": request.sampling_seed}
            line = {**identity, **dataclasses.asdict(generation)}
            made[request.id].append(line)
            piece.append(line)

        def store() -> dict[str, int]:
            if piece:
                self.storage.publish(ledgers.write_piece(self.ledger, batch, piece))
                piece.clear()
            lines = list(itertools.chain.from_iterable(made.values()))
            tokens = {name: sum(line[name] for line in lines) for name in ("prompt_tokens", "tokens")}
            return {"done": len(settled), "kept": sum(settled.values()), **tokens}

        def next_request(row_id: str) -> Request | None:
            draw = None if row_id in guilty else self._next_draw(rows[row_id], made[row_id])
            if draw is not None:
                return self._request(rows[row_id], draw)
            samples = {row_id: _samples(made[row_id], self.settings["samples"])}
            settled[row_id] = bool(select_rows([rows[row_id]], samples, self.settings)[1]["kept"])
            return None

        for row_id in guilty - {row_id for row_id, lines in made.items() if lines}:
            take(
                self._request(rows[row_id], rows[row_id]["sample"]), Generation("the engine died on this row", "error")
            )
        requests = [request for row_id in rows if (request := next_request(row_id))]
        told = time.monotonic()
        for _ in pieces:  # Ray drops as many as it had from this batch before its actor died
            yield store()
        while requests:
            again = []
            for group in _groups(requests, deaths, len(rows)):
                for request, generation in self._generate(batch, group, rows):
                    take(request, generation)
                    if further := next_request(request.id):
                        again.append(further)
                    if len(piece) == self.piece_rows:
                        counts = store()
                        if time.monotonic() - told > _TELL_SECONDS:
                            told = time.monotonic()
                            yield counts
            requests = again
        yield store()

    def _next_draw(self, row: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> int | None:
        """Return the sample that a row needs next; None where it needs none or failed too often."""
        draw = next_draw(row, lines, self.settings, row["sample"])
        if draw is None:
            return None
        sample, failed = draw
        before = row["failed"] if sample == row["sample"] else 0
        # Whatever happened in earlier runs, each run tries once: its cause may have been fixed.
        return sample if not failed or before + failed < self.max_attempts else None

    def _request(self, row: Mapping[str, Any], sample: int) -> Request:
        instruction = rewrite_instruction(row["prompt"], row["reference"], _template(self.settings))
        prompt_ids = render_prompt(self.tokenizer, instruction, self.settings["template_options"])
        return Request(row["id"], sample, prompt_ids, sampling_seed(row["id"], self.settings["seed"], sample))

    def _generate(
        self, batch: str, group: Sequence[Request], rows: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[tuple[Request, Generation]]:
        """Yield what the engine makes of a group, with a note on disk for as long as it is at work on it.

        A note that is still there says that the process died. An engine that raises ends its process too: nothing else
        mends it, and Ray starts a new one.
        """
        note = self.ledger / f".trying-{batch}-{uuid.uuid4().hex[:8]}"
        ids = [request.id for request in group]
        content = {"batch": batch, "ids": ids, "positions": [rows[row_id]["position"] for row_id in ids]}
        write_atomically(note, json.dumps(content | {"error": ""}))
        self.storage.publish(note)
        try:
            yield from self.engine.generate(group)
        except Exception as error:  # noqa: BLE001 - whatever a broken engine raises
            write_atomically(note, json.dumps(content | {"error": f"{type(error).__name__}: {error}"}))
            self.storage.publish(note)
            traceback.print_exc()
            os._exit(1)
        self.storage.drop(note)


def _read_deaths(ledger: Path, batch: str) -> tuple[Counter[str], set[str]]:
    """Return how often a process died at work on each row of a batch, and the rows that it was alone with."""
    notes = [json.loads(path.read_text()) for path in ledger.glob(f".trying-{batch}-*")]
    deaths = Counter(row_id for note in notes for row_id in note["ids"])
    return deaths, {note["ids"][0] for note in notes if len(note["ids"]) == 1}


def _groups(requests: Sequence[Request], deaths: Mapping[str, int], rows: int) -> Iterator[list[Request]]:
    """Yield requests in the groups that an engine gets them in: all at once, long ones first.

    Those that more than one process died on come last and in smaller groups, to find the one that kills.
    """
    ordered = sorted(requests, key=lambda request: (deaths[request.id], -len(request.prompt_ids)))
    for times, members in itertools.groupby(ordered, key=lambda request: deaths[request.id]):
        size = max(1, rows // _NARROWING ** max(0, times - 1))
        each = list(members)
        yield from (each[i : i + size] for i in range(0, len(each), size))
