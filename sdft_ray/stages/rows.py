"""Stage `rows`: decides once which rows exist, in which order, and what each is for.

In: a row source, and the benchmark tasks that no row may hold items of. Out: held_out.parquet, validation.parquet and
train.parquet, disjoint by prompt, and decontaminated.parquet, which lists what was left out for which task. The order
comes from a hash of seed and content, not from the source's order, and every smaller data size is a prefix of
train.parquet.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from sdft_ray import stages
from sdft_ray.core.decontamination import Overlap, find_overlaps
from sdft_ray.core.rows import Row
from sdft_ray.data.benchmarks import offline_items_file, read_task_texts
from sdft_ray.data.checkers import CHECKERS, read_answer
from sdft_ray.data.files import name_of
from sdft_ray.data.readers import RowsContent, read_rows, rows_content
from sdft_ray.errors import UserError, problem
from sdft_ray.results import SPLITS, Counts, row_schema
from sdft_ray.spec.section import Section
from sdft_ray.spec.sources import FileRows, GymRows, HubRows, RowSource
from sdft_ray.stages import Work
from sdft_ray.store.files import hash_source
from sdft_ray.store.identity import Stage, slugify

VERSION, NEEDS, UNIT = 2, None, "parts"


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
        source=rows_content(source),
        split=split,
        decontaminate=_decontamination(source, preset),
        origin=source.alone,
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


def build(work: Work[Settings]) -> Summary:
    """Write the three splits, and the list of what was left out of them as a benchmark's."""
    source = work.settings.origin
    chosen = work.settings.decontaminate or Decontamination(tasks={}, ngram=1, files={})
    tasks = {task: read_task_texts(task, chosen.files.get(task)) for task in chosen.tasks}
    raw = read_rows(source)
    overlaps = find_overlaps({row.content_id: row.texts for row in raw}, tasks, chosen.ngram)
    clean = leave_out(raw, overlaps)
    lost = len(raw) - len(clean)
    splits, left_out = split_rows(clean, source.answer, source.seed, source.held_out, source.validation, lost)
    write_splits(work.directory, splits)
    write_overlaps(work.directory, overlaps)
    held = Counter(overlap.task for overlap in overlaps)
    return Summary(
        rows=Counts(**{name: len(splits[name]) for name in SPLITS}),
        read=len(raw),
        **left_out._asdict(),
        decontaminated=lost,
        decontaminated_by_task={task: held[task] for task in tasks},
    )


def leave_out(raw: Sequence[Row], overlaps: Sequence[Overlap]) -> list[Row]:
    """Return the rows that share nothing with a task."""
    held = {overlap.row for overlap in overlaps}
    return [row for row in raw if row.content_id not in held]


def write_overlaps(directory: Path, overlaps: Sequence[Overlap]) -> None:
    """Write decontaminated.parquet: one line for each row and task that share words, with these words."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(field.name, pa.string()) for field in dataclasses.fields(Overlap)])
    lines = [dataclasses.asdict(overlap) for overlap in overlaps]
    pq.write_table(pa.Table.from_pylist(lines, schema), directory / "decontaminated.parquet")


def write_splits(directory: Path, splits: Mapping[str, Sequence[Row]]) -> None:
    """Write one Parquet file a split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in SPLITS:
        table = pa.Table.from_pylist([row._asdict() for row in splits[name]], row_schema())
        pq.write_table(table, directory / f"{name}.parquet")


class LeftOut(NamedTuple):
    """How many rows were left out, and why."""

    blank: int
    duplicate_prompts: int
    without_answer: int


def split_rows(
    raw: Sequence[Row], checker: str, seed: int, held_out: int, validation: int, decontaminated: int = 0
) -> tuple[dict[str, list[Row]], LeftOut]:
    """Return the rows of each split, with id and final answer, and how many rows were left out and why.

    A row before: Row("2 + 2?", "4"). After: the same with `id` (a content hash) and answer "4". Left out: rows with a
    blank prompt or reference, rows whose prompt came before (none may stand in two splits), and, where answers are
    checked, rows that have none. `decontaminated` rows are gone already.
    """
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
    left_out = LeftOut(blank, duplicates, unanswered)
    first_train = held_out + validation
    if len(rows) <= first_train:
        of = f"of {len(raw) + decontaminated}{_name_lost(left_out, checker, decontaminated)}"
        what = f"{len(rows)} usable rows ({of}) leave none to train on after {held_out} held-out and "
        do = "Give more rows or hold out fewer"
        if len(rows) + unanswered > first_train:
            do = "Set rows.answer to what the answers are, or rows.fields.answer to the column that holds them"
        raise UserError(problem("rows", f"{what}{validation} validation rows", do))
    splits = {
        "held_out": rows[:held_out],
        "validation": rows[held_out:first_train],
        "train": rows[first_train:],
    }
    return splits, left_out


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
