"""Stage `rows`: decides once which rows exist, in which order, and what each is for.

In: a row source, and the benchmark tasks that no row may hold items of. Out: held_out.parquet, validation.parquet and
train.parquet, disjoint by prompt, and decontaminated.parquet, which lists what was left out for which task. The order
comes from a hash of seed and content, not from the source's order, and every smaller data size is a prefix of
train.parquet. Rows pass through files that each are sorted (runs.py), so no process holds more than some of them. A
large source is read by Ray; `split_rows` says in memory what comes out.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from sdft_ray import stages
from sdft_ray.cluster import on_this_node, ray_cluster
from sdft_ray.core.decontamination import TaskIndex
from sdft_ray.core.rows import Row
from sdft_ray.data.benchmarks import offline_items_file, read_task_texts
from sdft_ray.data.checkers import CHECKERS, read_answer
from sdft_ray.data.files import name_of
from sdft_ray.data.parts import find_parts, raise_mistake
from sdft_ray.data.readers import RowsContent, rows_content
from sdft_ray.errors import UserError, problem
from sdft_ray.results import Counts
from sdft_ray.spec.compute import cores
from sdft_ray.spec.section import Section
from sdft_ray.spec.sources import FileRows, GymRows, HubRows, RowSource
from sdft_ray.stages import Work
from sdft_ray.store.files import hash_source
from sdft_ray.store.identity import Stage, slugify

if TYPE_CHECKING:
    from sdft_ray.stages.rows import passes

VERSION, NEEDS, UNIT = 2, None, "parts"
_MAX_FAILURES = 3  # deaths of a process that reads


class Split(Section):
    """How rows are read and shared out."""

    limit: int | None
    held_out: int
    validation: int
    seed: int
    answer: str


class Decontamination(Section):
    """The tasks whose items no row may hold."""

    unhashed = ("files",)
    tasks: dict[str, str]
    """What stands for the items of each: the hash of their file, or the preset that says where they are."""
    ngram: int
    files: dict[str, str]
    """Where the file of a task is, where it has one."""


_NONE = Decontamination(tasks={}, ngram=1, files={})


class Settings(Section):
    """Which rows there are, and what each is for."""

    unhashed, optional = ("origin",), ("decontaminate",)
    source: RowsContent
    split: Split
    decontaminate: Decontamination | None = None
    origin: RowSource
    """Where the rows are read."""


class Summary(stages.Summary):
    """How many rows there are, and how many were left out and why."""

    rows: Counts
    read: int
    blank: int
    """Without prompt or reference."""
    duplicate_prompts: int
    without_answer: int
    decontaminated: int = 0
    """Rows that hold items of a benchmark."""
    decontaminated_by_task: dict[str, int] = Field(default_factory=dict)


def stage(source: RowSource, preset: str) -> Stage[Settings]:
    """Return the stage of a recipe's rows, whose benchmarks are those of an evaluation preset."""
    name = _name(source)
    split = Split(**{name: getattr(source, name) for name in Split.model_fields})
    settings = Settings(
        source=rows_content(source), split=split, decontaminate=_decontamination(source, preset), origin=source.alone
    )
    return Stage("rows", slugify(name), VERSION, settings)


def _name(source: RowSource) -> str:
    match source:
        case GymRows():
            return source.gym
        case HubRows():
            return source.repo
        case FileRows():
            return name_of(source.path)


def _decontamination(source: RowSource, preset: str) -> Decontamination | None:
    if not source.decontaminate:
        return None
    files = {task: offline_items_file(task) for task in source.decontaminate if preset == "offline"}
    # What a hub's task holds is the harness's to say, as in evaluations.
    tasks = {task: hash_source(files[task]) if task in files else preset for task in source.decontaminate}
    return Decontamination(tasks=tasks, ngram=source.ngram, files={task: str(file) for task, file in files.items()})


class Sizes(NamedTuple):
    """Sizes in bytes; none moves a result."""

    large: int = 64 << 20
    """Of a source that several processes read: starting Ray takes as long as reading half of it."""
    part: int = 64 << 20
    """Of what a process reads at once of a source."""
    run: int = 32 << 20
    """Of the rows that are sorted and written at once."""
    range: int = 16 << 20
    """Of the rows that are put in order at once."""


def build(work: Work[Settings], sizes: Sizes = Sizes()) -> Summary:  # noqa: B008 - it is immutable
    """Write the three splits, and the list of what was left out of them as a benchmark's.

    The runs take as much disk as the source. Those of a killed run are made again.
    """
    for left in work.resumable.glob("runs-*"):
        work.storage.drop(left)
    # A name of its own: workers of a killed run may still write. So may those of this one after a mistake, into what is
    # being deleted: what is left of that is no reason to hide the mistake.
    with tempfile.TemporaryDirectory("", "runs-", work.resumable.absolute(), ignore_cleanup_errors=True) as runs:
        return _build(work, Path(runs), sizes)


def _build(work: Work[Settings], folder: Path, sizes: Sizes) -> Summary:
    from sdft_ray.stages.rows import passes

    split = work.settings.split
    counts = _read(work, folder, sizes)
    work.progress.enter("dropping duplicates")
    lost = passes.find_lost(folder, counts)
    left_out = LeftOut(counts.blank, counts.duplicates + lost, counts.without_answer)
    usable = counts.kept - lost
    _require_enough(usable, split, left_out, counts.decontaminated)
    work.progress.enter("writing")
    train = usable - split.held_out - split.validation
    rows = Counts(held_out=split.held_out, validation=split.validation, train=train)
    passes.write_splits(work.directory, passes.rows_in_order(folder, counts, sizes.range), rows.model_dump())
    held = passes.write_overlaps(work.directory, passes.overlaps_in_order(folder))
    return Summary(
        rows=rows,
        read=counts.read,
        **left_out._asdict(),
        decontaminated=counts.decontaminated,
        decontaminated_by_task={task: held[task] for task in (work.settings.decontaminate or _NONE).tasks},
    )


def _read(work: Work[Settings], folder: Path, sizes: Sizes) -> passes.Counts:
    """Read the source into runs; raises UserError for its first mistake."""
    from sdft_ray.stages.rows import passes

    source, chosen = work.settings.origin, work.settings.decontaminate or _NONE
    parts = find_parts(source, sizes.part)
    texts = {task: read_task_texts(task, chosen.files.get(task)) for task in chosen.tasks}
    index = TaskIndex(texts, chosen.ngram) if texts else None
    reader = passes.Reader(source, parts, index, folder, sizes.run)
    is_large = len(parts) > 1 and sum(piece.size for part in parts for piece in part) >= sizes.large
    work.progress.begin(len(parts))
    total = passes.Counts()
    with contextlib.ExitStack() as stack:
        if is_large:
            stack.enter_context(ray_cluster(work.compute))
        read = _read_with_ray(reader) if is_large else map(reader.read, range(len(parts)))
        for number, counts in enumerate(read):
            if counts.mistake:
                raise_mistake(parts[number], source, counts.mistake)
            total = passes.Counts(*map(operator.add, total, counts))
            work.progress.update(number + 1)
    return total


def _read_with_ray(reader: passes.Reader) -> Iterator[passes.Counts]:
    """Yield the counts of every part in order; a process for each core of this node reads them.

    They stay on the driver's node, which alone is sure to have the source and the folder of runs. They take no CPUs of
    Ray's: on the node of the driver there may be none, or others' actors may hold them for hours.
    """
    import ray

    from sdft_ray.stages.rows import passes

    # Workers run in other directories.
    parts = [tuple(piece._replace(path=piece.path.absolute()) for piece in part) for part in reader.parts]
    dataset = ray.data.from_items(
        [{"part": number} for number in range(len(parts))], override_num_blocks=len(parts)
    ).map_batches(
        passes.Reader,
        fn_constructor_kwargs={**vars(reader), "parts": parts},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(cores(), len(parts))),
        num_cpus=0,
        scheduling_strategy=on_this_node(),
        max_restarts=_MAX_FAILURES,
        max_task_retries=_MAX_FAILURES,
    )
    dataset.context.execution_options.preserve_order = True  # the first mistake is that of the first part
    for counts in dataset.iter_rows():
        yield passes.Counts(**counts)


class Splits(NamedTuple):
    """Rows by what they are for."""

    held_out: list[Row]
    validation: list[Row]
    train: list[Row]


def write_splits(directory: Path, splits: Splits) -> None:
    """Write one Parquet file a split, of rows in memory."""
    from sdft_ray.stages.rows import passes

    counts = {name: len(rows) for name, rows in splits._asdict().items()}
    passes.write_splits(directory, map(passes.to_batch, splits), counts)


# --- the same in memory ---------------------------------------------------------------------------------------


class LeftOut(NamedTuple):
    """How many rows were left out, and why."""

    blank: int
    duplicate_prompts: int
    without_answer: int


def split_rows(
    raw: Sequence[Row], checker: str, seed: int, held_out: int, validation: int, decontaminated: int = 0
) -> tuple[Splits, LeftOut]:
    """Return the rows of each split, with id and final answer, and how many rows were left out and why.

    A row before: Row("2 + 2?", "4"). After: the same with `id` (a content hash) and answer "4". Left out: rows with a
    blank prompt or reference, rows whose prompt came before (none may stand in two splits), and, where answers are
    checked, rows that have none. `decontaminated` rows are gone already.
    """
    rows, left_out = order_rows(raw, checker, seed)
    split = Split(limit=None, held_out=held_out, validation=validation, seed=seed, answer=checker)
    _require_enough(len(rows), split, left_out, decontaminated)
    return cut_rows(rows, held_out, validation), left_out


def order_rows(raw: Sequence[Row], checker: str, seed: int) -> tuple[list[Row], LeftOut]:
    """Return the rows that are usable in their order, with id and final answer, and how many were left out and why."""
    seen: dict[str, Row] = {}
    blank = duplicates = unanswered = 0
    for row in raw:
        if row.is_blank:
            blank += 1
            continue
        answer = None
        if checker != "none":
            answer = read_answer(checker, row.reference, row.answer)
            if answer is None:
                unanswered += 1
                continue
        if (key := row.key) in seen:
            duplicates += 1
            continue
        seen[key] = row._replace(answer=answer, id=row.content_id)
    rows = sorted(seen.values(), key=lambda row: hashlib.sha256(f"{seed}:{row.id}".encode()).digest())
    return rows, LeftOut(blank, duplicates, unanswered)


def cut_rows(rows: Sequence[Row], held_out: int, validation: int) -> Splits:
    """Return ordered rows by their split: the first ones, the next ones, and the others."""
    first_train = held_out + validation
    return Splits(*map(list, (rows[:held_out], rows[held_out:first_train], rows[first_train:])))


def _require_enough(usable: int, split: Split, left_out: LeftOut, decontaminated: int) -> None:
    """Raise UserError where no row is left to train on."""
    first_train = split.held_out + split.validation
    if usable > first_train:
        return
    of = f"of {usable + sum(left_out) + decontaminated}{_name_lost(left_out, split.answer, decontaminated)}"
    what = f"{usable} usable rows ({of}) leave none to train on after {split.held_out} held-out and "
    do = "Give more rows or hold out fewer"
    if usable + left_out.without_answer > first_train:
        do = "Set rows.answer to what the answers are, or rows.fields.answer to the column that holds them"
    raise UserError(problem("rows", f"{what}{split.validation} validation rows", do))


def _name_lost(left_out: LeftOut, checker: str, decontaminated: int) -> str:
    """Return why rows are not usable, for an error that counts those which are."""
    kind = CHECKERS[checker].kind if checker in CHECKERS else "answers"
    lost = {
        f"answers were no {kind}": left_out.without_answer,
        "rows had a blank prompt or response": left_out.blank,
        "prompts came before": left_out.duplicate_prompts,
        "rows held items of a benchmark": decontaminated,
    }
    return "".join(f"; {count} {reason}" for reason, count in lost.items() if count)
