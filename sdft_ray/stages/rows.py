"""Stage `rows`: decides once which rows exist, in which order, and what each is for.

In: a row source, and the benchmark tasks that no row may hold items of. Out: held_out.parquet, validation.parquet and
train.parquet, disjoint by prompt, and decontaminated.parquet, which lists what was left out for which task. The order
comes from a hash of seed and content, not from the source's order, and every smaller data size is a prefix of
train.parquet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sdft_ray.core.decontamination import Overlap, find_overlaps
from sdft_ray.data.benchmarks import read_task_texts
from sdft_ray.data.checkers import CHECKERS, read_answer
from sdft_ray.data.readers import read_rows
from sdft_ray.errors import UserError, problem
from sdft_ray.spec.recipe import RowSource
from sdft_ray.stages import Work
from sdft_ray.store.identity import Stage

VERSION = 2
SPLITS = ("held_out", "validation", "train")


def build(work: Work) -> dict[str, Any]:
    """Write the three splits, and the list of what was left out of them as a benchmark's."""
    source, chosen = source_of(work.stage), work.settings.get("decontaminate", {"tasks": (), "ngram": 1})
    tasks = {task: read_task_texts(task, work.stage.where.get(f"task {task}")) for task in chosen["tasks"]}
    raw = read_rows(source)
    overlaps = find_overlaps({row_id(*_content(row)): _content(row) for row in raw}, tasks, chosen["ngram"])
    clean = leave_out(raw, overlaps)
    lost = len(raw) - len(clean)
    splits, counts = split_rows(clean, source.answer, source.seed, source.held_out, source.validation, lost)
    write_splits(work.directory, splits)
    write_overlaps(work.directory, overlaps)
    held = Counter(overlap.task for overlap in overlaps)
    return {
        "rows": {name: len(splits[name]) for name in SPLITS},
        **counts,
        "read": len(raw),
        "decontaminated": lost,
        "decontaminated_by_task": {task: held[task] for task in tasks},
    }


def source_of(stage: Stage) -> RowSource:
    """Return the source of a rows stage: what is hashed of it, and where its file lies now."""
    content = {key: value for key, value in stage.settings["source"].items() if key not in ("sha256", "version")}
    place = {key: value for key, value in stage.where.items() if key == "path"}
    source: RowSource = TypeAdapter(RowSource).validate_json(
        json.dumps({**content, **place, **stage.settings["split"]})
    )
    return source


def leave_out(raw: Sequence[dict[str, Any]], overlaps: Sequence[Overlap]) -> list[dict[str, Any]]:
    """Return the rows that share nothing with a task."""
    held = {overlap.row for overlap in overlaps}
    return [row for row in raw if row_id(*_content(row)) not in held]


def write_overlaps(directory: Path, overlaps: Sequence[Overlap]) -> None:
    """Write decontaminated.parquet: one line for each row and task that share words, with these words."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(field.name, pa.string()) for field in dataclasses.fields(Overlap)])
    lines = [dataclasses.asdict(overlap) for overlap in overlaps]
    pq.write_table(pa.Table.from_pylist(lines, schema), directory / "decontaminated.parquet")


def write_splits(directory: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    """Write one Parquet file a split: id, prompt, reference, answer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in ("id", "prompt", "reference", "answer")])
    for name in SPLITS:
        pq.write_table(pa.Table.from_pylist(splits[name], schema), directory / f"{name}.parquet")


def split_rows(
    raw: list[dict[str, Any]], checker: str, seed: int, held_out: int, validation: int, decontaminated: int = 0
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """Return the rows of each split, with id and final answer, and how many rows were left out and why.

    A row before: {"prompt": "2 + 2?", "reference": "4", "answer": None}. After: the same with `id` (a content hash)
    and answer "4". Left out: rows with a blank prompt or reference, rows whose prompt came before (none may
    stand in two splits), and, where answers are checked, rows that have none. `decontaminated` rows are gone already.
    """
    seen: dict[str, dict[str, Any]] = {}
    counts = {"read": len(raw), "blank": 0, "duplicate_prompts": 0, "without_answer": 0}
    for row in raw:
        if not row["prompt"].strip() or not row["reference"].strip():
            counts["blank"] += 1
            continue
        answer = None
        if checker != "none":
            answer = read_answer(checker, row["reference"], row["answer"])
            if answer is None:
                counts["without_answer"] += 1
                continue
        key = " ".join(row["prompt"].split())
        if key in seen:
            counts["duplicate_prompts"] += 1
            continue
        seen[key] = {**row, "answer": answer, "id": row_id(row["prompt"], row["reference"])}
    rows = sorted(seen.values(), key=lambda row: hashlib.sha256(f"{seed}:{row['id']}".encode()).digest())
    first_train = held_out + validation
    if len(rows) <= first_train:
        of = f"of {len(raw) + decontaminated}{_name_lost(counts, checker, decontaminated)}"
        what = f"{len(rows)} usable rows ({of}) leave none to train on after {held_out} held-out and "
        do = "Give more rows or hold out fewer"
        if len(rows) + counts["without_answer"] > first_train:
            do = "Set rows.answer to what the answers are, or rows.fields.answer to the column that holds them"
        raise UserError(problem("rows", f"{what}{validation} validation rows", do))
    splits = {
        "held_out": rows[:held_out],
        "validation": rows[held_out:first_train],
        "train": rows[first_train:],
    }
    return splits, counts


def _name_lost(counts: Mapping[str, int], checker: str, decontaminated: int) -> str:
    """Return why rows are not usable, for an error that counts those which are."""
    kind = CHECKERS[checker].kind if checker in CHECKERS else "answers"
    lost = {
        f"answers were no {kind}": counts["without_answer"],
        "rows had a blank prompt or response": counts["blank"],
        "prompts came before": counts["duplicate_prompts"],
        "rows held items of a benchmark": decontaminated,
    }
    return "".join(f"; {count} {reason}" for reason, count in lost.items() if count)


def row_id(prompt: str, reference: str) -> str:
    """Return the content hash that a row is known by everywhere: 16 hex digits."""
    return hashlib.sha256(f"{prompt}\0{reference}".encode()).hexdigest()[:16]


def _content(row: dict[str, Any]) -> tuple[str, str]:
    return row["prompt"], row["reference"]


def read_split(directory: Path, split: str) -> list[dict[str, Any]]:
    """Return the rows of one split of a rows or distilled artifact."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(directory / f"{split}.parquet").to_pylist()
    return rows


def read_training_rows(directory: Path, count: int | None) -> list[dict[str, Any]]:
    """Return the first `count` training rows, all where it is None; raises UserError where there are fewer."""
    return [row for batch in training_batches(directory, count) for row in batch]


def training_batches(directory: Path, count: int | None) -> Iterator[list[dict[str, Any]]]:
    """Yield the first `count` training rows in order, some at a time; raises UserError where there are fewer."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(directory / "train.parquet")
    left = file.metadata.num_rows if count is None else count
    if left > file.metadata.num_rows:
        what = f"{count} is more than the {file.metadata.num_rows} training rows there are"
        raise UserError(problem("train.rows", what, "Lower it, or give more rows"))
    for batch in file.iter_batches(1024):
        yield batch.slice(0, left).to_pylist()
        left -= min(left, len(batch))
        if not left:
            return
