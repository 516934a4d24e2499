"""Training rows: from text to token ids, and the counts of what was too long.

In: rows with responses. Out: rows as token ids, one after another, and what a driver has to know of all of them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from sdft_ray.core.rows import Exchange, Row, TrainingRow
from sdft_ray.data.chat import encode_rows
from sdft_ray.errors import UserError, problem
from sdft_ray.models.directory import load_config
from sdft_ray.spec import training
from sdft_ray.stages import Summary
from sdft_ray.stages.train.encoded import EncodedRow, EncodedRows

_PROOFS = 2  # rows whose logits must be the same before and after writing


class Counts(Summary):
    """How many rows are left, and how many were too long: all that a gate reads of a training."""

    rows: int
    rows_too_long: int
    rows_left_out: int
    """Without a token to train: of those that were too long, and plain texts of one token, which nothing predicts."""


class Tally(Counts):
    """What a driver has to know of encoded rows, which it never holds."""

    tokens: int = 0
    trained_tokens: int = 0
    largest_id: int = -1
    rows_by_source: dict[int, int] = Field(default_factory=dict)
    """By the number of the recipe's source."""
    first_rows: dict[int, TrainingRow] = Field(default_factory=dict)
    """The first ones, by their number among all rows that were read."""


class Rewrite(NamedTuple):
    """A row that is trained on with the response that was selected."""

    id: str
    prompt: str
    response: str
    conversation: str | None = None
    origin: int = 0

    @property
    def exchange(self) -> Exchange:
        """What is given, and what is trained on."""
        return Exchange(self.prompt, self.response, self.conversation)


def encode(
    tokenizer: Any,
    raw: Iterable[Row | Rewrite],
    settings: training.Train,
    first: int = 0,
    bare: list[int] | None = None,
) -> Iterator[EncodedRow]:
    """Yield rows as token ids, without those that are too long; `first` is the number of the first one that is read.

    Plain texts of one token are left out, and their numbers added to `bare`: nothing predicts their only token.
    Raises UserError for the first row that the chat template cannot write.
    """
    limit, fate = settings.max_tokens, settings.too_long
    lines, written = itertools.tee(raw)  # they are a batch apart
    encoded = encode_rows(tokenizer, (line.exchange for line in written))
    for number, (line, row) in enumerate(zip(lines, encoded, strict=True), first):
        whole = len(row.ids)
        if row.trained_from >= whole:
            if bare is not None:
                bare.append(number)
            continue
        if whole > limit:
            if fate == "leave_out" or row.trained_from >= limit:
                continue
            row = TrainingRow(row.ids[:limit], row.trained_from)  # without its end of turn: none is taught there
        yield EncodedRow(row, number, line.origin, whole)


def count(shard: EncodedRows, read: int, limit: int, bare: int = 0) -> Tally:
    """Return what a driver has to know of one shard, for which so many rows were read; `limit` is of tokens, `bare` of
    the rows had one token only."""
    left_out = read - len(shard)
    return Tally(
        rows=len(shard),
        rows_too_long=left_out - bare + int((shard.column("whole") > limit).sum()),
        rows_left_out=left_out,
        tokens=int(shard.column("stop").max(initial=0)),
        trained_tokens=shard.trained_tokens,
        largest_id=shard.largest_id(),
        rows_by_source=Counter(shard.column("origin").tolist()),
        first_rows={shard.number_of(i): shard[i] for i in range(min(_PROOFS, len(shard)))},
    )


def add(one: Tally, other: Tally) -> Tally:
    """Return what a driver has to know of two shards together."""
    first = sorted({**one.first_rows, **other.first_rows}.items(), key=lambda item: item[0])
    return Tally(
        rows=one.rows + other.rows,
        rows_too_long=one.rows_too_long + other.rows_too_long,
        rows_left_out=one.rows_left_out + other.rows_left_out,
        tokens=one.tokens + other.tokens,
        trained_tokens=one.trained_tokens + other.trained_tokens,
        largest_id=max(one.largest_id, other.largest_id),
        rows_by_source=Counter(one.rows_by_source) + Counter(other.rows_by_source),
        first_rows=dict(first[:_PROOFS]),
    )


def require_some(counts: Counts, settings: training.Train) -> None:
    """Raise UserError where no row is left with a token to train."""
    if not counts.rows and not counts.rows_too_long:
        what = f"all {counts.rows_left_out} are plain texts of one token, which nothing predicts"
        raise UserError(problem("rows", what, "Give longer texts"))
    if not counts.rows:
        what = f"{counts.rows_too_long} of {counts.rows_left_out} rows are longer than {settings.max_tokens} tokens"
        if settings.too_long == "truncate":
            what += ", and none of them has a token with loss within those"
        raise UserError(problem("train.max_tokens", what, "Raise it"))


def require_vocabulary(base: Path, tokenizer: Any, largest: int) -> None:
    """Raise UserError where `largest`, the largest id of a token in the rows, is none that the model has an embedding
    for."""
    known = load_config(base).vocab_size
    if largest >= known:
        token = tokenizer.convert_ids_to_tokens(largest)
        what = f"the tokenizer has {len(tokenizer)} tokens and the rows hold {token} ({largest})"
        raise UserError(problem(str(base), f"{what}; the model knows {known}", "Give model and tokenizer of one kind"))


def marked_example(tokenizer: Any, row: TrainingRow) -> tuple[str, str]:
    """Return one row decoded, split where the loss begins: the proof of the mask that a person can read."""
    return tokenizer.decode(row.ids[: row.trained_from]), tokenizer.decode(row.ids[row.trained_from :])


def shorten(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:60]} … {text[-60:]}")


def proof_rows(rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    """Return the ends of two rows, with loss on few tokens: their logits must be the same before and after writing.

    So few, because a CPU without bfloat16 computes 10 GFLOP/s: each token of an 8B model takes seconds there.
    """
    ends = [row.ids[-32:] for row in rows[:_PROOFS]]
    return [TrainingRow(ids, max(1, len(ids) - 4)) for ids in ends]
