"""What lies inside artifacts: the files that one stage writes and others read, and their schemas.

In: the directory of a finished artifact. Out: typed content. Each file name stands here once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import Field

from sdft_ray.core.choice import Choice, JointChoice, Tried
from sdft_ray.core.mixture import join_rows
from sdft_ray.core.rows import Row
from sdft_ray.data.readers import read_json
from sdft_ray.errors import UserError, problem
from sdft_ray.store.record import Record

if TYPE_CHECKING:
    import torch

ITEMS, SCORE = "items.jsonl", "score.json"  # of evaluate
PROBES, RETENTION = "probes.jsonl", "retention.jsonl"
DISTANCES, TEXTS = "distances.json", "texts.safetensors"  # of score
CANDIDATES = "losses.json"  # of loss
HISTORY, METRICS = "losses.json", "metrics.jsonl"  # of train
NLL = "nll.json"
DRAFT, SPECULATIVE_CONFIG = "draft.json", "speculative_config.json"
SPEED = "speed.json"


# --- rows -----------------------------------------------------------------------------------------------------

SPLITS = ("held_out", "validation", "train")
HELD_OUT = "held_out"
SPLIT_COLUMNS = ("id", "prompt", "reference", "answer", "conversation", "origin")
_BUFFER_BYTES = 1 << 20  # of a column: else a row group's columns are read whole


class Conversation(NamedTuple):
    """The part of a row that its chat template may not be able to write."""

    conversation: str | None = None


class Counts(Record):
    """How many rows are in each split."""

    held_out: int
    validation: int
    train: int


class Decided(Record):
    """What every artifact of rows keeps in its summary."""

    rows: Counts


def row_schema() -> Any:
    """Return the columns of a split."""
    import pyarrow as pa

    return pa.schema([(name, pa.int32() if name == "origin" else pa.string()) for name in SPLIT_COLUMNS])


class DistilledRow(NamedTuple):
    """A row of a `distill` artifact, with the response to train on and where it came from."""

    id: str
    prompt: str
    reference: str
    answer: str | None
    response: str
    source: str
    reason: str
    sample: int
    """Which of the row's generations was kept; the first where none was."""
    generated: str
    """What the model wrote last, kept or not."""
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    sampling_seed: int | None
    conversation: str | None = None
    origin: int = 0


R = TypeVar("R", bound=NamedTuple)
_BATCH_ROWS = 1024


def read_columns(table: Any, kind: type[R]) -> list[R]:
    """Return the rows of an Arrow table or batch; a column that it lacks has the default of its field."""
    known, defaults = {*table.schema.names}, kind._field_defaults
    columns = [
        table.column(name).to_pylist() if name in known else [defaults[name]] * len(table) for name in kind._fields
    ]
    return [kind._make(values) for values in zip(*columns, strict=True)]


def read_split(directory: Path, split: str, kind: type[R], most: int | None = None) -> list[R]:
    """Return the rows of one split of a rows or distilled artifact, or the first ones of them."""
    stop = count_rows(directory, split) if most is None else most
    return [row for batch in read_range(directory, split, 0, stop, kind) for row in batch]


def read_held_out(directories: Sequence[Path]) -> list[Row]:
    """Return the held-out rows of one or several rows artifacts, those of several evenly mixed."""
    each = [read_split(directory, HELD_OUT, Row) for directory in directories]
    return each[0] if len(each) == 1 else join_rows(each)


def training_batches(directory: Path, count: int | None, kind: type[R], start: int = 0) -> Iterator[list[R]]:
    """Yield the first `count` training rows in order, from `start` on, some at a time; raises UserError where there are
    fewer."""
    yield from read_range(directory, "train", start, count_training_rows(directory, count), kind)


def count_training_rows(directory: Path, count: int | None) -> int:
    """Return how many training rows there are, or `count`; raises UserError where there are fewer."""
    rows = count_rows(directory, "train")
    if count is not None and count > rows:
        raise UserError(problem("train.rows", f"{count} is more than the {rows} training rows", "Lower train.rows"))
    return rows if count is None else count


def count_rows(directory: Path, split: str) -> int:
    """Return how many rows a split has."""
    import pyarrow.parquet as pq

    return int(pq.read_metadata(directory / f"{split}.parquet").num_rows)


def read_row(directory: Path, split: str, place: int, kind: type[R]) -> R:
    """Return the row of a split at a place, from 0."""
    ((row,),) = read_range(directory, split, place, place + 1, kind)
    return row


def read_range(directory: Path, split: str, start: int, stop: int, kind: type[R]) -> Iterator[list[R]]:
    """Yield the rows of a split from `start` up to `stop` in order, some at a time; only the row groups that hold them
    are read."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(directory / f"{split}.parquet", buffer_size=_BUFFER_BYTES) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        groups = [i for i, end in enumerate(ends) if end > start and end - sizes[i] < stop]
        at = ends[groups[0]] - sizes[groups[0]] if groups else 0
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=list(kind._fields)):
            chosen = batch.slice(max(start - at, 0), max(stop - max(at, start), 0))
            at += len(batch)
            if len(chosen):
                yield read_columns(chosen, kind)
            if at >= stop:
                return


# --- measures of blocks ---------------------------------------------------------------------------------------


class Corpus(Record):
    """What a score measured on one corpus."""

    name: str
    positions: str
    """The tokens that distances are averaged over."""
    texts: int
    tokens: int
    shortened: int
    """Texts that were cut to max_tokens."""
    choices: dict[str, dict[int, Choice]]
    """By metric and number of blocks."""


class MeasuredCorpus(Corpus):
    """A corpus with what was measured on it, as the mean over its texts."""

    distances: list[list[float]]
    """d[l][m], (L+1, L+1)."""
    influences: list[float]
    """(L)."""


class Distances(Record):
    """What distances.json holds."""

    blocks: int
    corpora: tuple[MeasuredCorpus, ...]
    choices: dict[str, dict[int, JointChoice]]


class Cut(Record):
    """Which blocks are removed, and how sure that is."""

    removed: tuple[int, ...]
    """0-based, ascending."""
    metric: str
    """What chose them: a metric, or `remove`, which is the recipe itself."""
    cost: float | None = None
    """Mean distance, summed influence, or loss in nats a token; None where nothing was measured."""
    agreement: float | None = None
    """Fraction of bootstrap samples of the texts that choose the same blocks."""
    runner_up: tuple[int, ...] | None = None
    """The next best; None where there is no other."""
    target: float | None = None
    """The most parameters that the model may have, where that decides how many blocks are removed."""


def read_choice(directory: Path) -> Choice:
    """Return which candidate a loss artifact chose."""
    return _Losses.from_file(directory / CANDIDATES).choice


def read_candidates(directory: Path) -> tuple[Tried, ...]:
    """Return the candidates of a loss artifact, the best one first."""
    return _Losses.from_file(directory / CANDIDATES).candidates


class _Losses(Record):
    choice: Choice
    candidates: tuple[Tried, ...] = ()


def read_measured(directory: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what a score artifact holds of each corpus: distances (B, L+1, L+1) and influences (B, L)."""
    from safetensors.torch import load_file

    kept = load_file(directory / TEXTS)
    corpora = range(len(kept) // 2)
    return [kept[f"distances.{i}"] for i in corpora], [kept[f"influences.{i}"] for i in corpora]


# --- training and evaluation ----------------------------------------------------------------------------------


class Step(Record):
    """One optimizer step of a training."""

    step: int
    """From 1."""
    loss: float
    """In nats a trained token."""
    lr: float
    grad_norm: float
    loss_by_source: dict[int, float] | None = None
    """By the number of the recipe's source, where there are several; none of those that have no row in the step."""
    validation_loss: float | None = None
    """After steps that are followed by a validation."""
    validation_loss_by_source: dict[int, float] | None = None
    """Likewise."""

    def metrics(self) -> dict[str, float]:
        """Return its numbers by name."""
        by_source = {name: getattr(self, f"{name}_by_source") or {} for name in ("loss", "validation_loss")}
        values = self.model_dump(exclude={"step", *(f"{name}_by_source" for name in by_source)}, exclude_none=True)
        return values | {
            f"{name}_of_source_{source}": loss for name, each in by_source.items() for source, loss in each.items()
        }


def read_history(directory: Path) -> list[Step]:
    """Return the steps of a training."""
    return [Step.model_validate(step) for step in read_json(directory / HISTORY)]


def validations(history: Iterable[Step]) -> list[tuple[int, float]]:
    """Return step and validation loss of the steps that were followed by a validation."""
    return [(step.step, step.validation_loss) for step in history if step.validation_loss is not None]


class Score(Record):
    """One model's result on one task."""

    metric: str
    value: float
    stderr: float | None
    """Of the mean over items; None where there is one item."""
    n: int
    """Items."""
    chance: float
    """What guessing scores, 0 for generated answers."""
    limited: bool
    """Whether only part of the task was taken."""
    bits_per_byte: float | None = None
    """Of the held-out references."""
    other_metrics: dict[str, float] = Field(default_factory=dict)
    """Of a benchmark task."""


class Item(Record):
    """One item of an evaluation."""

    id: str
    task: str | None = None
    """Of a group of tasks the one that it is of."""
    value: float


AnyItem = TypeVar("AnyItem", bound=Item)


def read_items(directory: Path, kind: type[AnyItem]) -> list[AnyItem]:
    """Return the items of an evaluation in the order of the task, of a kind that has what is kept of each."""
    return [kind.model_validate_json(line) for line in (directory / ITEMS).read_text(encoding="utf-8").splitlines()]


# --- drafts and speeds ----------------------------------------------------------------------------------------


class Drafting(Record):
    """Drafting with some number of tokens."""

    tokens: int
    """At a time."""


class Gain(Record):
    """What drafted tokens bring: core/speculation.py has the formulas."""

    acceptance: float
    """Probability that a token is accepted where all before it were."""
    accepted_share: float
    """Of all drafted tokens."""
    tokens_per_call: float
    """Of the target."""
    expected_speedup: float
    break_even_cost: float


class Counted(Gain, Drafting):
    """What a number of drafted tokens brings, as counted with the largest number."""


class Differing(Record):
    """A prompt whose greedy tokens differ with a draft."""

    prompt: int
    token: int
    """The first one that differs."""
    logits_apart: float | None = None


class Race(Drafting):
    """The speeds of two engines that took turns, and what the second one drafted."""

    target_tokens_per_second: float
    tokens_per_second: float
    speedup: float
    """The median over runs, and the range."""
    speedup_min: float
    speedup_max: float
    drafts: int
    accepted: tuple[int, ...]
    """How often the first, the second, … drafted token was."""
    differing: tuple[Differing, ...] = ()
    """Of greedy text."""


class Measured(Gain, Race):
    """What a number of drafted tokens brings, measured."""


class Drafted(Record):
    """What a draft brings for one kind of text."""

    measured: tuple[Measured, ...]
    counted: tuple[Counted, ...] = ()

    @property
    def best(self) -> Measured:
        """With the number of drafted tokens that gained most."""
        return max(self.measured, key=lambda one: one.speedup)


class Pace(Record):
    """How fast a model is against the base, in tokens per second."""

    base_tokens_per_second: float
    pruned_tokens_per_second: float
    ratio: float
    """The median over runs, and the range."""
    ratio_min: float
    ratio_max: float


class Likelihood(Record):
    """How likely and how long responses are."""

    mean_tokens: float
    nll_per_token: float
    """In nats."""
