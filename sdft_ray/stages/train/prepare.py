"""Encode the rows of a training into files that its workers read, on as many processes as it is worth.

In: the rows, in Parquet files of the inputs. Out: shards of token ids where workers find them, and what the driver has
to know of them. Few rows are encoded in this process: others would still be loading their tokenizer when it is done.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdft_ray import environment
from sdft_ray.cluster import in_tasks
from sdft_ray.core.rows import Row
from sdft_ray.results import count_rows, count_training_rows, read_range, read_row
from sdft_ray.spec import training
from sdft_ray.stages import Work, bring_tokenizer
from sdft_ray.stages.train.encoded import FOLDER, EncodedRows, write_shard
from sdft_ray.stages.train.rows import Rewrite, Tally, add, count, encode
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

SHARD_ROWS = 32768
"""Rows that one task encodes; more than this are worth processes of their own."""


class Part(NamedTuple):
    """The rows of a shard: a range of those of an input."""

    shard: int
    key: str
    """Of the input."""
    start: int
    stop: int
    first: int
    """The number of the first one among the rows of all inputs."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What every part is encoded for."""

    storage: Storage
    stage: Stage[Any]
    settings: training.Train
    split: str
    kind: type[Row | Rewrite]

    def encode(self, tokenizer: Any, directory: Path, part: Part) -> Tally:
        """Encode a part of the rows in an input's directory, and write and publish its shard."""
        batches = read_range(directory, self.split, part.start, part.stop, self.kind)
        bare: list[int] = []
        rows = encode(tokenizer, (row for batch in batches for row in batch), self.settings, part.first, bare)
        folder = self.storage.resumable(self.stage) / FOLDER
        self.storage.publish(*write_shard(folder, self.split, part.shard, rows))
        shard = EncodedRows(folder, f"{self.split}-{part.shard:05d}")
        return count(shard, part.stop - part.start, self.settings.max_tokens, len(bare))


def encode_split(work: Work[Any], tokenizer: Any, split: str, shard_rows: int = SHARD_ROWS) -> Tally:
    """Encode the training or the validation rows of all inputs, and return what is to be known of them.

    Raises UserError for a row that the chat template cannot write.
    """
    settings = work.settings.train
    job = Job(work.storage, work.stage, settings, split, Rewrite if _kind(work, split) == "distilled" else Row)
    sizes = _count_inputs(work, split)
    total, done = sum(sizes.values()), Tally(rows=0, rows_too_long=0, rows_left_out=0)
    work.progress.enter(f"encoding {total} rows")
    parts = plan_parts(sizes, shard_rows)
    if total > shard_rows:
        tallies = in_tasks(functools.partial(_encode_part, job), parts, work.compute.train.max_failures)
    else:
        tallies = (job.encode(tokenizer, work.input(part.key), part) for part in parts)
    for tally in tallies:
        done = add(done, tally)
        work.progress.enter(f"encoded {done.rows + done.rows_left_out} of {total} rows")
    return done


def _kind(work: Work[Any], split: str) -> str:
    return "distilled" if split == "train" and training.is_on_rewrites(work.settings.arm) else "rows"


def _count_inputs(work: Work[Any], split: str) -> dict[str, int]:
    """Return how many rows are taken of each input."""
    places = {key: work.input(key) for key in work.stage.keys(_kind(work, split))}
    if split == "train":
        return {key: count_training_rows(place, work.settings.train.rows) for key, place in places.items()}
    return {key: count_rows(place, split) for key, place in places.items()}


def plan_parts(sizes: dict[str, int], shard_rows: int) -> list[Part]:
    """Return the parts that inputs with so many rows are encoded in."""
    parts: list[Part] = []
    before = 0
    for key, size in sizes.items():
        for start in range(0, size, shard_rows):
            stop = min(start + shard_rows, size)
            parts.append(Part(len(parts), key, start, stop, before + start))
        before += size
    return parts


def _encode_part(job: Job, part: Part) -> Tally:
    """Encode a part in a task, on whatever node."""
    environment.go_offline()  # the tokenizer is in a local directory
    model = bring_tokenizer(job.storage, job.stage.model)
    directory = job.storage.files(job.stage.inputs[part.key], f"{job.split}.parquet")
    return job.encode(_load_tokenizer(model), directory, part)


@functools.lru_cache(maxsize=1)  # a process serves many parts
def _load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


class _Named(NamedTuple):
    id: str


def find_ids(work: Work[Any], rows: Sequence[int]) -> list[str]:
    """Return the ids of training rows, which workers know by number."""
    work.storage.bring(work.resumable, f"{FOLDER}/train-*.index.npy")
    encoded = EncodedRows(work.resumable / FOLDER, "train")
    parts = plan_parts(_count_inputs(work, "train"), SHARD_ROWS)
    ids = []
    for number in map(encoded.number_of, rows):
        part = parts[bisect.bisect_right(parts, number, key=lambda part: part.first) - 1]
        place = part.start + number - part.first
        ids.append(read_row(work.input(part.key), "train", place, _Named).id)
    return ids
