"""Stage `rows`: decides once which rows exist, in which order, and what each is for.

In: a row source. Out: held_out.parquet, validation.parquet and train.parquet, disjoint by prompt. The order comes
from a hash of seed and content, not from the source's order, and every smaller data size is a prefix of
train.parquet.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sdft_ray.core.selection import final_number
from sdft_ray.errors import UserError, problem
from sdft_ray.recipe import RowSource
from sdft_ray.sources import read_rows
from sdft_ray.stages import Work

VERSION = 1
SPLITS = ("held_out", "validation", "train")


def build(work: Work) -> dict[str, Any]:
    """Write the three splits."""
    source: RowSource = TypeAdapter(RowSource).validate_json(work.stage.where["source"])
    splits, counts = split_rows(read_rows(source), source.answer, source.seed, source.held_out, source.validation)
    write_splits(work.directory, splits)
    return {"rows": {name: len(splits[name]) for name in SPLITS}, **counts}


def write_splits(directory: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    """Write one Parquet file a split: id, prompt, reference, answer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in ("id", "prompt", "reference", "answer")])
    for name in SPLITS:
        pq.write_table(pa.Table.from_pylist(splits[name], schema), directory / f"{name}.parquet")


def split_rows(
    raw: list[dict[str, Any]], checker: str, seed: int, held_out: int, validation: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """Return the rows of each split, with id and final answer, and how many rows were left out and why.

    A row before: {"prompt": "2 + 2?", "reference": "4", "answer": None}. After: the same with `id` (a content hash)
    and answer "4". Left out: rows with a blank prompt or reference, rows whose prompt came before (none may
    stand in two splits), and, where answers are checked, rows whose reference has none.
    """
    seen: dict[str, dict[str, Any]] = {}
    duplicates = unanswered = blank = 0
    for row in raw:
        if not row["prompt"].strip() or not row["reference"].strip():
            blank += 1
            continue
        answer = None
        if checker == "number":
            number = final_number(row["answer"] if row["answer"] is not None else row["reference"])
            if number is None:
                unanswered += 1
                continue
            answer = str(number)
        key = " ".join(row["prompt"].split())
        if key in seen:
            duplicates += 1
            continue
        seen[key] = {**row, "answer": answer, "id": row_id(row["prompt"], row["reference"])}
    rows = sorted(seen.values(), key=lambda row: hashlib.sha256(f"{seed}:{row['id']}".encode()).digest())
    first_train = held_out + validation
    if len(rows) <= first_train:
        what = f"{len(rows)} usable rows (of {len(raw)}) leave none to train on after {held_out} held-out and "
        raise UserError(problem("rows", f"{what}{validation} validation rows", "Give more rows or hold out fewer"))
    splits = {
        "held_out": rows[:held_out],
        "validation": rows[held_out:first_train],
        "train": rows[first_train:],
    }
    return splits, {"read": len(raw), "blank": blank, "duplicate_prompts": duplicates, "without_answer": unanswered}


def row_id(prompt: str, reference: str) -> str:
    """Return the content hash that a row is known by everywhere: 16 hex digits."""
    return hashlib.sha256(f"{prompt}\0{reference}".encode()).hexdigest()[:16]


def read_split(directory: Path, split: str) -> list[dict[str, Any]]:
    """Return the rows of one split of a rows or distilled artifact."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(directory / f"{split}.parquet").to_pylist()
    return rows


def read_training_rows(directory: Path, count: int | None) -> list[dict[str, Any]]:
    """Return the first `count` training rows, all where it is None; raises UserError where there are fewer."""
    rows = read_split(directory, "train")
    if count is not None and count > len(rows):
        what = f"{count} is more than the {len(rows)} training rows there are"
        raise UserError(problem("train.rows", what, "Lower it, or give more rows"))
    return rows[:count]
