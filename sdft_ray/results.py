"""What lies inside artifacts: the files that one stage writes and others read, and their schemas.

In: the directory of a finished artifact. Out: typed content. Each file name stands here once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from sdft_ray.data.readers import read_json
from sdft_ray.errors import UserError, problem

if TYPE_CHECKING:
    import torch

ITEMS, SCORE = "items.jsonl", "score.json"  # of evaluate
DISTANCES, TEXTS = "distances.json", "texts.safetensors"  # of score
CANDIDATES = "losses.json"  # of loss
HISTORY = "losses.json"  # of train
NLL = "nll.json"
DRAFT, SPECULATIVE_CONFIG = "draft.json", "speculative_config.json"
SPEED = "speed.json"

# --- rows -----------------------------------------------------------------------------------------------------

SPLITS = ("held_out", "validation", "train")
HELD_OUT = "held_out"


class Row(TypedDict):
    """A row of a `rows` artifact."""

    id: str
    prompt: str
    reference: str
    answer: str | None


class DistilledRow(Row):
    """A row of a `distill` artifact, with the response to train on and where it came from."""

    response: str
    source: str
    reason: str
    sample: int
    generated: str
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    sampling_seed: int


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


# --- measures of blocks ---------------------------------------------------------------------------------------


def read_measured(directory: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what a score artifact holds of each corpus: distances (B, L+1, L+1) and influences (B, L)."""
    from safetensors.torch import load_file

    kept = load_file(directory / TEXTS)
    corpora = range(len(kept) // 2)
    return [kept[f"distances.{i}"] for i in corpora], [kept[f"influences.{i}"] for i in corpora]


# --- training and evaluation ----------------------------------------------------------------------------------


class Step(TypedDict):
    """One optimizer step of a training."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    validation_loss: NotRequired[float]


def read_history(directory: Path) -> list[Step]:
    """Return the steps of a training."""
    history: list[Step] = read_json(directory / HISTORY)
    return history


class Item(TypedDict):
    """One item of an evaluation."""

    id: str
    value: float


def read_items(directory: Path) -> list[Item]:
    """Return the items of an evaluation: each with its id and its value, in the order of the task."""
    return [json.loads(line) for line in (directory / ITEMS).read_text(encoding="utf-8").splitlines()]
