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

import contextlib
import json
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdft_ray import stages
from sdft_ray.core.prompts import RENDERING_VERSION
from sdft_ray.core.rows import Row
from sdft_ray.core.selection import REASONS
from sdft_ray.data.chat import require_trainable
from sdft_ray.errors import StageFailed, problem
from sdft_ray.results import DistilledRow, training_batches
from sdft_ray.spec.compute import Needs
from sdft_ray.spec.recipe import Distill
from sdft_ray.spec.sources import RowSource
from sdft_ray.stages import Work
from sdft_ray.stages.distill import card
from sdft_ray.stages.distill.draws import (
    Settings,
    Source,
    best_lines,
    instruction_template,
    instruction_templates,
    select_rows,
)
from sdft_ray.stages.distill.requests import write_requests
from sdft_ray.stages.distill.rewriter import COUNTS, Note, Rewriter
from sdft_ray.store import ledger as ledgers
from sdft_ray.store.files import write_atomically
from sdft_ray.store.identity import Stage, short_id
from sdft_ray.store.record import Record

VERSION, NEEDS, UNIT = 3, Needs("distill"), "rows"
_FINISHED = "finished.json"  # the summary of a dataset that is whole and that its gate stopped
_SAMPLING = ("temperature", "top_p", "max_new_tokens", "dtype", "seed")


class SourceSummary(Record):
    """How many rows of a source keep a rewrite, and why others do not."""

    name: str
    rows: int
    kept: int
    reasons: dict[str, int]
    """Rows for each reason that occurs."""


class Summary(stages.Summary):
    """How many rows keep a rewrite, why others do not, and how much was generated."""

    rows: int
    kept: int
    """Rows whose response is a rewrite."""
    acceptance: float
    """Their share of all rows."""
    reasons: dict[str, int]
    """Rows for each reason, `kept` among them."""
    usual_error: str | None = None
    """What engines said most often where they failed."""
    generations: int
    """Samples that were drawn."""
    generated_tokens: int
    mean_generated_tokens: float
    """A sample."""
    ledger: str = ""
    """Its directory's name; several where sources have templates of their own."""
    by_source: tuple[SourceSummary, ...] = ()
    """Where there are several."""

    @property
    def failed_fraction(self) -> float:
        """Share of rows that failed in the engine."""
        return self.reasons["error"] / self.rows


def stage(
    wanted: Distill, base: Stage, rows: Stage, sources: Mapping[str, RowSource], count: int | None
) -> Stage[Settings]:
    """Return the stage that rewrites the first `count` training rows of one source, or of several that are mixed."""
    each = tuple(
        Source(name=name, answer=source.answer, template=source.template or wanted.template)
        for name, source in sources.items()
    )
    own: dict[str, Any]
    if len(each) == 1:
        own = {"answer": each[0].answer, "template": each[0].template}
    else:
        own = {"answer": None, "template": None, "sources": each}
    settings = Settings(**dict(wanted) | own, rows=count)
    return Stage("distill", rows.slug, VERSION, settings, {"model": base, "rows": rows})


def build(work: Work[Settings]) -> Summary:
    """Generate what the ledger lacks, then select and write the dataset.

    A dataset that its gate stopped lies there: a looser gate finishes it at once, the same one asks for what failed
    once more.
    """
    finished = work.resumable / _FINISHED
    if finished.is_file() and (work.directory / "train.parquet").is_file():
        summary = Summary.from_file(finished)
        if summary.failed_fraction <= work.settings.max_failed_fraction:
            return summary
    finished.unlink(missing_ok=True)
    summary = _make_dataset(work)
    if summary.failed_fraction > work.settings.max_failed_fraction:
        write_atomically(finished, json.dumps(summary.plain()))
    require_gates(work.stage, summary)
    return summary


def require_gates(stage: Stage[Settings], summary: Summary) -> None:
    """Raise StageFailed where more rows failed in the engine than the recipe allows."""
    failed, allowed = summary.failed_fraction, stage.settings.max_failed_fraction
    if failed > allowed:
        what = f"{summary.reasons['error']} of {summary.rows} rows failed in the engine"
        what += f", mostly with: {summary.usual_error} (got {failed:.2%}; expected at most {allowed:.2%})"
        raise StageFailed(problem("distill.max_failed_fraction", what, "Raise it; what was generated is kept"))


def _make_dataset(work: Work[Settings]) -> Summary:
    """Generate what the ledgers lack and write the dataset; return its figures."""
    _require_trainable(work)
    ids = {template: ledger_id(work, template) for template in instruction_templates(work.settings)}
    with contextlib.ExitStack() as locks:
        for identity in sorted(ids.values()):  # recipes that ask for other rows share them
            locks.enter_context(work.storage.lock(f"ledger-{identity}"))
        slug = work.stage.inputs["model"].slug
        ledger_of = {template: work.storage.ledger(f"{slug}-{identity}") for template, identity in ids.items()}
        # A name of its own: what another node has of an earlier run is not this.
        for old in work.resumable.glob("requests-*"):
            work.storage.drop(old)
        asked = [(_ask(work, template, ledger), ledger) for template, ledger in ledger_of.items()]
        missing = sum(requests.missing for requests, _ in asked)
        work.progress.begin(rows := asked[0][0].rows, done=rows - missing)
        for requests, ledger in asked:
            work.progress.enter("starting the engine")
            if requests.missing:
                work.storage.publish(requests.path)
                _generate(work, requests.path, requests.missing, ledger)
                work.storage.bring(ledger, "part-*")
                _tidy(work, ledger)
        return _write_dataset(work, ledger_of)


class _Requests(NamedTuple):
    """The rows that need the engine, of those with one template."""

    path: Path
    rows: int
    """All training rows."""
    missing: int


def _ask(work: Work[Settings], template: str, ledger: Path) -> _Requests:
    """Write the rows with a template that its ledger lacks."""
    work.storage.bring(ledger)
    _tidy(work, ledger)
    path = work.resumable / f"requests-{uuid.uuid4().hex[:8]}.parquet"
    with ledgers.open_ledger(ledger) as lines_of:
        batches = training_batches(work.input("rows"), work.settings.rows, Row)
        return _Requests(path, *write_requests(batches, lines_of, work.settings, path, template))


@contextlib.contextmanager
def _open_ledgers(settings: Settings, ledger_of: Mapping[str, Path]) -> Iterator[Callable[[list[Row]], ledgers.Lines]]:
    """Yield a function from rows to their lines, those of each row from the ledger of its template."""
    with contextlib.ExitStack() as opened:
        look_ups = {
            template: opened.enter_context(ledgers.open_ledger(ledger)) for template, ledger in ledger_of.items()
        }

        def lines_of(rows: list[Row]) -> ledgers.Lines:
            found: ledgers.Lines = {}
            for template, look_up in look_ups.items():
                found |= look_up(row.id for row in rows if instruction_template(settings, row.origin) == template)
            return found

        yield lines_of


def _require_trainable(work: Work[Settings]) -> None:
    """Raise UserError where the rewrites could not be trained on: before the first is generated."""
    from transformers import AutoTokenizer

    for pattern in ("*.json", "*.jinja", "*.txt", "tokenizer.model"):  # this node needs no weights
        place = work.storage.files(work.stage.inputs["model"], pattern)
    require_trainable(AutoTokenizer.from_pretrained(place))


def _tidy(work: Work[Settings], ledger: Path) -> None:
    """Merge the pieces of a ledger that is whole on this node, here and under the root."""
    for left in ledger.glob(".trying-*"):  # of a run that was stopped: that says nothing about its rows
        left.unlink()
    ledgers.compact(ledger)
    work.storage.mirror(ledger)


def ledger_id(work: Work[Settings], template: str) -> str:
    """Return the id of the ledger that the generations of rows with a template go into."""
    identity = {
        "model": work.stage.inputs["model"].id,
        "rendering": RENDERING_VERSION,
        "template": template,
        "template_options": work.settings.template_options,
        **{key: getattr(work.settings, key) for key in _SAMPLING},
    }
    return short_id(identity)


def _generate(work: Work[Settings], requests: Path, missing: int, ledger: Path) -> None:
    import ray
    from ray.util.annotations import RayDeprecationWarning

    plan, pool = work.compute.distill, work.compute.distill.actors
    assert plan.cpus != "auto", "load_compute settles auto"
    size = min(plan.batch_rows, -(-missing // pool.max))
    batches = [(start, min(start + size, missing)) for start in range(0, missing, size)]
    # The number of restarts has no parameter of its own yet (docs/footguns.md).
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
    dataset = ray.data.from_items(
        [{"start": start, "stop": stop} for start, stop in batches], override_num_blocks=len(batches)
    ).map_batches(
        Rewriter,
        fn_constructor_kwargs={
            "engine": work.engine,
            "model": work.handle("model"),
            "storage": work.storage,
            "stage": work.stage,
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
        kept = f"What was generated is kept in {work.storage.describe(ledger)}"
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
        done, kept, *tokens = (sum(batch[name] for batch in self.batches.values()) for name in COUNTS)
        into, out = (count / (now - self.begun) for count in tokens)
        actors = sum(now - heard < 60 for heard in self.heard.values())
        self.progress.update(
            self.done_before + done,
            f"{into:.0f} tokens/s in, {out:.0f} out, {kept / max(1, done):.0%} kept, "
            f"{actors} actor{'s' * (actors != 1)}",
        )


def _died_on(ledger: Path) -> str:
    """Return which rows engines died on and what the last one said; nothing where none died at work."""
    notes = [Note.from_file(path) for path in sorted(ledger.glob(".trying-*"), key=lambda path: path.stat().st_mtime)]
    if not notes:
        return ""
    last = notes[-1]
    times = sum(note.batch == last.batch for note in notes)
    said = f", saying {last.error}" if last.error else ""
    rows = f"rows {min(last.positions)} to {max(last.positions)} of the training rows"
    return f"the engine died {times} times over one batch, the last time on {rows}{said}"


def _write_dataset(work: Work[Settings], ledger_of: Mapping[str, Path]) -> Summary:
    """Write train.parquet and its card; return the figures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts: Counter[tuple[int, str]] = Counter()
    messages: Counter[str] = Counter()
    generated = tokens = 0
    examples: dict[str, DistilledRow] = {}
    schema = card.schema()
    with (
        _open_ledgers(work.settings, ledger_of) as lines_of,
        pq.ParquetWriter(work.directory / "train.parquet", schema) as file,
    ):
        for batch in training_batches(work.input("rows"), work.settings.rows, Row):
            read = lines_of(batch)
            lines = {row_id: best_lines(found, work.settings.samples) for row_id, found in read.items()}
            selected, _ = select_rows(batch, lines, work.settings)
            counts.update((row.origin, row.reason) for row in selected)
            messages.update(row.generated for row in selected if row.reason == "error")
            generated += sum(len(made) for made in lines.values())
            tokens += sum(line.tokens for made in lines.values() for line in made)
            for row in selected:
                examples.setdefault(row.reason, row)
            file.write_table(pa.Table.from_pylist([card.record(row) for row in selected], schema))
    rows = counts.total()
    reasons: dict[str, int] = {
        reason: sum(count for (_, found), count in counts.items() if found == reason) for reason in REASONS
    }
    card.write(work.directory, work.stage, reasons, examples)
    return Summary(
        rows=rows,
        kept=(kept := reasons["kept"]),
        acceptance=kept / rows,
        reasons=reasons,
        usual_error=messages.most_common(1)[0][0] if messages else None,
        generations=generated,
        generated_tokens=tokens,
        mean_generated_tokens=tokens / max(1, generated),
        ledger=", ".join(ledger.name for ledger in ledger_of.values()),
        **({"by_source": _by_source(work.settings.sources, counts)} if work.settings.sources else {}),
    )


def _by_source(sources: Sequence[Source], counts: Counter[tuple[int, str]]) -> tuple[SourceSummary, ...]:
    """Return the figures of each source; counts: rows by source and reason."""
    each = []
    for number, source in enumerate(sources):
        reasons = {reason: count for reason in REASONS if (count := counts[number, reason])}
        kept = reasons.get("kept", 0)
        each.append(SourceSummary(name=source.name, rows=sum(reasons.values()), kept=kept, reasons=reasons))
    return tuple(each)
