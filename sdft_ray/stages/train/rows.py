"""Training rows: from text to token ids, on disk, and addressed by number.

In: rows with responses. Out: rows as token ids, a file that workers read, and the counts of what was too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdft_ray.core.rows import Exchange, TrainingRow
from sdft_ray.data.chat import encode_rows
from sdft_ray.data.readers import read_json
from sdft_ray.errors import UserError, problem
from sdft_ray.spec import training
from sdft_ray.stages import Summary


class Counts(Summary):
    """How many rows are left, and how many were too long: all that a gate reads of a training."""

    rows: int
    rows_too_long: int
    rows_left_out: int
    """Of those: without a token to train."""


class Reference(NamedTuple):
    """A row that is trained on with its reference."""

    id: str
    prompt: str
    reference: str
    conversation: str | None = None


class Rewrite(NamedTuple):
    """A row that is trained on with the response that was selected."""

    id: str
    prompt: str
    response: str
    conversation: str | None = None


def encode(
    tokenizer: Any, raw: Sequence[Reference | Rewrite], settings: training.Train, watched: bool = False
) -> tuple[list[TrainingRow], list[str], Counts]:
    """Return rows as token ids, their ids, and how many were too long; `watched` rows are not trained on.

    Raises UserError where none is left with a token to train.
    """
    limit, fate = settings.max_tokens, settings.too_long
    rows, ids, too_long, left_out = [], [], 0, 0
    encoded = encode_rows(tokenizer, [Exchange(*line[1:]) for line in raw])
    for line, row in zip(raw, encoded, strict=True):
        if len(row.ids) > limit:
            too_long += 1
            if fate == "leave_out" or row.trained_from >= limit:
                left_out += 1
                continue
            row = TrainingRow(row.ids[:limit], row.trained_from)  # without its end of turn: none is taught there
        rows.append(row)
        ids.append(line.id)
    if not watched and not rows:
        what = f"{too_long} of {len(raw)} rows are longer than {limit} tokens"
        if fate == "truncate":
            what += ", and none of them has a token with loss within those"
        raise UserError(problem("train.max_tokens", what, "Raise it"))
    return rows, ids, Counts(rows=len(rows), rows_too_long=too_long, rows_left_out=left_out)


def require_vocabulary(base: Path, tokenizer: Any, rows: Sequence[TrainingRow]) -> None:
    """Raise UserError where rows hold tokens that the model has no embedding for."""
    known = read_json(base / "config.json")["vocab_size"]
    largest = max(max(row.ids) for row in rows)
    if largest >= known:
        token = tokenizer.convert_ids_to_tokens(largest)
        what = f"the tokenizer has {len(tokenizer)} tokens and the rows hold {token} ({largest})"
        raise UserError(problem(str(base), f"{what}; the model knows {known}", "Give model and tokenizer of one kind"))


def marked_example(tokenizer: Any, row: TrainingRow) -> tuple[str, str]:
    """Return one row decoded, split where the loss begins: the proof of the mask that a person can read."""
    return tokenizer.decode(row.ids[: row.trained_from]), tokenizer.decode(row.ids[row.trained_from :])


def shorten(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:60]} … {text[-60:]}")


def write_rows(path: Path, rows: Sequence[TrainingRow]) -> None:
    """Write encoded rows where workers find them by number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "ids": pa.array([row.ids for row in rows], pa.list_(pa.int32())),
            "trained_from": pa.array([row.trained_from for row in rows], pa.int32()),
        }
    )
    pq.write_table(table, path)


class EncodedRows(Sequence[TrainingRow]):
    """What `write_rows` wrote, addressed by number; a row becomes Python numbers only when it is asked for."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        table = pq.read_table(path).combine_chunks()
        ids = table["ids"].chunk(0) if len(table) else None
        self._starts = [0] if ids is None else ids.offsets.to_pylist()
        self._ids = None if ids is None else ids.values.to_numpy()
        self._trained_from = table["trained_from"].to_pylist()

    def __len__(self) -> int:
        return len(self._trained_from)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if self._ids is None or not 0 <= i < len(self):
            raise IndexError(i)
        return TrainingRow(self._ids[self._starts[i] : self._starts[i + 1]].tolist(), self._trained_from[i])


def proof_rows(rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    """Return the ends of two rows, with loss on few tokens: their logits must be the same before and after writing.

    So few, because a CPU without bfloat16 computes 10 GFLOP/s: each token of an 8B model takes seconds there.
    """
    ends = [row.ids[-32:] for row in rows[:2]]
    return [TrainingRow(ids, max(1, len(ids) - 4)) for ids in ends]
