"""Stage `distill`: the unpruned model, or another one, rewrites the training references; checked rewrites take their
place.

In: the model and the training rows. Out: train.parquet, each row once, with the response to train on, where it
came from and why; README.md, its dataset card. Ray Data drives actors that each hold an engine. What an engine
finishes goes into the ledger in small atomic pieces before anything else happens to it, so no kill costs more than one
piece an actor; the artifact is a view of that ledger. The ledger's identity covers teacher, prompt and sampling, not
which rows were asked for: more rows, more samples, another checker or another filter never generate anything again.
How many rows may fail is a gate: it moves no id, and the finished counts are compared with it.
Rows are read, joined with the ledger and selected in ranges, by tasks where there are many: neither the memory of the
driver nor that of any other process grows with their number.
"""

from __future__ import annotations

import contextlib
import functools
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray import stages
from sdft_ray.core.prompts import RENDERING_VERSION
from sdft_ray.core.selection import REASONS
from sdft_ray.core.shares import shares
from sdft_ray.errors import StageFailed, problem
from sdft_ray.results import count_training_rows, training_batches
from sdft_ray.spec.compute import Needs, settled
from sdft_ray.spec.recipe import Distill
from sdft_ray.spec.sources import RowSource, ServedModel
from sdft_ray.stages import Work
from sdft_ray.stages.distill.dataset import Figures, count_reasons, write_dataset
from sdft_ray.stages.distill.dealing import Dealt, RowId, deal
from sdft_ray.stages.distill.draws import Settings, Source, instruction_templates
from sdft_ray.stages.distill.placement import Groups
from sdft_ray.stages.distill.requests import Requests, write_requests
from sdft_ray.stages.distill.rewriter import Counts, Note, Rewriter
from sdft_ray.stages.distill.spread import Folder, Range, ranges_of
from sdft_ray.stages.distill.teaching import require_able, teacher_files, teacher_handle, teacher_name
from sdft_ray.store import ledger as ledgers
from sdft_ray.store.identity import Stage, short_id, slugify
from sdft_ray.store.record import Record
from sdft_ray.store.storage import Storage

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

    @property
    def acceptance(self) -> float | None:
        """The share that keeps a rewrite of what could be rewritten; None where nothing could."""
        asked = sum(count for reason, count in self.reasons.items() if reason not in ("plain", "tool_call"))
        return self.kept / asked if asked else None


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
    asked: int | None = None
    """Rows that the engine was asked for by the command that finished it; the others were in the ledger."""
    generated_tokens: int
    mean_generated_tokens: float
    """A sample."""
    teacher: str | None = None
    """The model that rewrites, where it is not the base: then this is no self-distillation."""
    ledger: str = ""
    """Its directory's name; several where sources have templates of their own."""
    by_source: tuple[SourceSummary, ...] = ()
    """Where there are several."""

    @property
    def failed(self) -> int:
        """Rows that failed in the engine."""
        return self.reasons["error"]

    @property
    def failed_fraction(self) -> float:
        return self.failed / self.rows


def stage(
    wanted: Distill,
    base: Stage,
    rows: Stage,
    sources: Mapping[str, RowSource],
    count: int | None,
    teacher: Stage | None = None,
) -> Stage[Settings]:
    """Return the stage that rewrites the first `count` training rows of one source, or of several that are mixed.

    teacher: another model than the base, or the tokenizer of one that is served elsewhere.
    """
    each = tuple(
        Source(
            name=name,
            answer=source.answer,
            template=source.template or wanted.template,
            filters=None if source.filters == wanted.filters else source.filters,
        )
        for name, source in sources.items()
    )
    own: dict[str, Any]
    if len(each) == 1:
        own = {"answer": each[0].answer, "template": each[0].template, "filters": each[0].filters or wanted.filters}
    else:
        own = {"answer": None, "template": None, "sources": each}
    if not isinstance(wanted.teacher, ServedModel):
        own |= {"teacher": None}  # it is an input, whose content counts and not its path
    settings = Settings(**dict(wanted) | own, rows=count)
    inputs = {"model": base, "rows": rows} | ({"teacher": teacher} if teacher else {})
    return Stage("distill", rows.slug, VERSION, settings, inputs)


def build(work: Work[Settings]) -> Summary:
    """Generate what the ledger lacks, then select and write the dataset.

    A dataset that its gate stopped lies there: a looser gate finishes it at once, the same one asks for what failed
    once more.
    """
    finished = work.resumable / _FINISHED
    if finished.is_file() and (work.directory / "train.parquet").is_file():
        summary = Summary.from_file(finished)
        if summary.failed_fraction <= work.settings.max_failed_fraction:
            return summary.model_copy(update={"asked": 0})
    finished.unlink(missing_ok=True)
    summary = _make_dataset(work)
    if summary.failed_fraction > work.settings.max_failed_fraction:
        summary.to_file(finished)
    require_gates(work.stage, summary)
    return summary


def require_gates(stage: Stage[Settings], summary: Summary) -> None:
    """Raise StageFailed where more rows failed in the engine than the recipe allows."""
    failed, allowed = summary.failed_fraction, stage.settings.max_failed_fraction
    if failed > allowed:
        what = f"{summary.failed} of {summary.rows} rows failed in the engine"
        what += f", mostly with: {summary.usual_error} (got {failed:.2%}; expected at most {allowed:.2%})"
        raise StageFailed(problem("distill.max_failed_fraction", what, "Raise it; what was generated is kept"))


def _make_dataset(work: Work[Settings]) -> Summary:
    """Generate what the ledgers lack and write the dataset; return its figures."""
    require_able(work)
    ids = {template: ledger_id(work.stage, template) for template in instruction_templates(work.settings)}
    with contextlib.ExitStack() as locks:
        for identity in sorted(ids.values()):  # recipes that ask for other rows share them
            locks.enter_context(work.storage.lock(f"ledger-{identity}"))
        slug = slugify(teacher_name(work.stage) or work.stage.model.slug)
        ledgers_of = {template: work.storage.ledger(f"{slug}-{identity}") for template, identity in ids.items()}
        for old in work.resumable.iterdir():
            work.storage.drop(old)
        ranges = ranges_of(count_training_rows(work.input("rows"), work.settings.rows))
        work.progress.enter("reading the rows")
        dealt, asked = {}, {}
        for template, ledger in ledgers_of.items():
            work.storage.bring(ledger)
            _tidy(work, ledger)
            dealt[template] = own = _deal(work, ledger, ranges)
            # Names of their own: what another node has of an earlier run is not this.
            folder = _folder(work, "requests")
            asked[template] = write_requests(folder, work.handle("rows"), ranges, own, work.settings, template)
        rows, missing = ranges[-1].stop, sum(requests.missing for requests in asked.values())
        work.progress.begin(rows, done=rows - missing)
        for template, ledger in ledgers_of.items():
            if not asked[template].missing:
                continue
            work.progress.enter("starting the engine")
            _generate(work, asked[template], ledger)
            work.progress.enter("selecting")
            work.storage.bring(ledger, "part-*")
            _tidy(work, ledger)
            dealt[template].folder.drop()
            dealt[template] = _deal(work, ledger, ranges)
        figures = write_dataset(work, _folder(work, "dataset"), ranges, dealt)
        return _summarise(figures, work.stage, [ledger.name for ledger in ledgers_of.values()], missing)


def _deal(work: Work[Settings], ledger: Path, ranges: Sequence[Range]) -> Dealt:
    ids = functools.partial(_read_ids, work.handle("rows"), ranges[-1].stop)
    return deal(_folder(work, "lines"), ledger, ranges, ids)


def _read_ids(rows: Callable[[], Path], count: int) -> Iterable[list[RowId]]:
    return training_batches(rows(), count, RowId)


def _folder(work: Work[Settings], name: str) -> Folder:
    return Folder(work.storage, work.stage, f"{name}-{uuid.uuid4().hex[:8]}")


def _summarise(figures: Figures, stage: Stage[Settings], ledgers: Sequence[str], asked: int) -> Summary:
    reasons, sources, teacher = count_reasons(figures), stage.settings.sources or (), teacher_name(stage)
    rows, kept = sum(reasons.values()), reasons["kept"]
    return Summary(
        rows=rows,
        kept=kept,
        acceptance=kept / rows,
        reasons=reasons,
        usual_error=figures.errors.most_common(1)[0][0] if figures.errors else None,
        generations=figures.generations,
        asked=asked,
        generated_tokens=figures.tokens,
        mean_generated_tokens=figures.tokens / max(1, figures.generations),
        ledger=", ".join(ledgers),
        **({"teacher": teacher} if teacher else {}),
        **({"by_source": _by_source(figures, sources)} if sources else {}),
    )


def _by_source(figures: Figures, sources: Sequence[Source]) -> tuple[SourceSummary, ...]:
    """Return the figures of each source."""
    each = []
    for number, source in enumerate(sources):
        reasons: dict[str, int] = {reason: count for reason in REASONS if (count := figures.reasons[number, reason])}
        kept = reasons.get("kept", 0)
        each.append(SourceSummary(name=source.name, rows=sum(reasons.values()), kept=kept, reasons=reasons))
    return tuple(each)


def _tidy(work: Work[Settings], ledger: Path) -> None:
    """Merge the pieces of a ledger that is whole on this node, here and under the root."""
    for left in ledger.glob(".trying-*"):  # of a run that was stopped: that says nothing about its rows
        left.unlink()
    ledgers.compact(ledger)
    work.storage.mirror(ledger)


def has_generated(stage: Stage[Settings], storage: Storage) -> bool:
    """Return whether a ledger of the stage was begun."""
    return any(storage.has_ledger(ledger_id(stage, template)) for template in instruction_templates(stage.settings))


def ledger_id(stage: Stage[Settings], template: str) -> str:
    """Return the id of the ledger that the generations of rows with a template go into."""
    settings = stage.settings
    identity = {
        "model": teacher_files(stage).id,
        "rendering": RENDERING_VERSION,
        "template": template,
        "template_options": settings.template_options,
        **{key: getattr(settings, key) for key in _SAMPLING},
    }
    if isinstance(settings.teacher, ServedModel):
        identity |= {"teacher": settings.teacher.hashed()}
    if settings.seeds != "row":
        identity |= {"seeds": settings.seeds}
    if settings.lookup:
        identity |= {"lookup": settings.lookup.hashed()}
    return short_id(identity)


def _generate(work: Work[Settings], requests: Requests, ledger: Path) -> None:
    import ray

    plan, served = work.compute.distill, isinstance(work.settings.teacher, ServedModel)
    with contextlib.ExitStack() as stack:
        takes: dict[str, Any] = {"num_gpus": None if served else plan.gpus or None}
        if plan.nodes > 1 and not served:
            takes = {"ray_remote_args_fn": stack.enter_context(Groups(plan)).begin}
        dataset = _rewritten(work, requests, ledger, takes)
        tally = _Tally(work)
        try:
            for piece in dataset.iter_batches(batch_size=None):
                tally.add(**{name: column.tolist()[0] for name, column in piece.items()})
        except ray.exceptions.RayActorError as error:
            if error.actor_init_failed:  # no row is to blame, and its last line says why the engine did not start
                raise
            work.storage.bring(ledger, ".trying-*")
            kept = f"What was generated is kept in {work.storage.describe(ledger)}"
            raise StageFailed(f"distill: {_died_on(ledger) or error}. {kept}") from error


def _rewritten(work: Work[Settings], requests: Requests, ledger: Path, takes: Mapping[str, Any]) -> Any:
    """Return the dataset of how far batches are, which actors work through; takes: Ray's options of an actor."""
    import ray

    plan, pool = work.compute.distill, work.compute.distill.actors
    served = isinstance(work.settings.teacher, ServedModel)
    batches = [*shares(requests.missing, pool.max, plan.batch_rows)]
    dataset = ray.data.from_items(
        [{"start": some.start, "stop": some.stop} for some in batches], override_num_blocks=len(batches)
    ).map_batches(
        Rewriter,
        fn_constructor_kwargs={
            "engine": work.engine,
            "model": teacher_handle(work),
            "storage": work.storage,
            "stage": work.stage,
            "options": plan.endpoint_options() if served else plan.engine_options(),
            "alone": pool.max == 1,
            "requests": requests,
            "ledger": ledger.name,
            "piece": (plan.piece_rows, plan.piece_seconds),
        },
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=pool.min,
            max_size=pool.max,
            # A second batch would wait for its actor while others are idle. But a pool grows only where one waits.
            max_tasks_in_flight_per_actor=1 if pool.min == pool.max else 2,
        ),
        num_cpus=settled(plan.cpus),
        # Ray Data's own default is to try for ever.
        max_restarts=plan.max_failures,
        max_task_retries=plan.max_failures,
        **takes,
    )
    dataset.context.raise_original_map_exception = True  # what an endpoint ends with, in its own words
    dataset.context.target_max_block_size = 1  # else what a batch yields comes to the driver at the batch's end
    dataset.context.issue_detectors_config.detectors = []  # one asks for an actor's options, and starts none
    return dataset


class _Tally:
    """What all batches have come to, for the progress line; a batch that is tried again counts anew."""

    def __init__(self, work: Work) -> None:
        self.progress, self.done_before = work.progress, work.progress.done
        self.begun = time.monotonic()
        self.batches: dict[int, Counts] = {}
        self.heard: dict[str, float] = {}

    def add(self, start: int, actor: str, **counts: int) -> None:
        """Take in how far the batch is that begins at a row."""
        now = time.monotonic()
        self.batches[start], self.heard[actor] = Counts(**counts), now
        done, kept, *tokens = map(sum, zip(*self.batches.values(), strict=True))
        if not done:
            self.progress.enter("generating")
            return
        into, out = (count / (now - self.begun) for count in tokens)
        actors = sum(now - heard < 60 for heard in self.heard.values())
        self.progress.update(
            self.done_before + done,
            f"{into:.0f} tokens/s in, {out:.0f} out, {kept / done:.0%} kept, {actors} actor{'s' * (actors != 1)}",
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
