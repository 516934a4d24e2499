"""Stage `targets`: the base's likeliest tokens at every trained token of the rewrites, for the arm `logits`.

In: the base and its rewrites. Out: files of token ids and log-probabilities, in the order in which `train` encodes the
rows. Tasks take a shard each, and a shard that is there is not computed again. The teacher reads a row as the student
does: without the reference.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray import stages
from sdft_ray.cluster import in_tasks
from sdft_ray.data.chat import require_trainable
from sdft_ray.errors import UserError, problem
from sdft_ray.spec import training
from sdft_ray.spec.compute import Needs, settled
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.stages.train.encoded import FOLDER, EncodedRows
from sdft_ray.stages.train.likeliest import sum_probabilities, write_likeliest
from sdft_ray.stages.train.prepare import encode_split
from sdft_ray.stages.train.teacher import Teacher
from sdft_ray.store.identity import Stage, numbered
from sdft_ray.store.storage import Storage

if TYPE_CHECKING:
    from sdft_ray.core.soft_targets import Likeliest

VERSION, NEEDS, UNIT = 1, Needs("score"), "shards"
NAME = "train"
_PASS_TOKENS = 1024  # of one forward pass, or one longer row: the same on every machine


class Settings(Section):
    """What is stored of the base's distributions. Of `train` only what decides on rows and precision is set."""

    soft: training.Soft
    train: training.Train
    arm: str = "logits"


class Summary(stages.Summary):
    """What was stored."""

    rows: int
    tokens: int
    likeliest: int
    covered: float
    """Mean probability of the stored tokens together."""


def stage(
    settings: training.Train, soft: training.Soft, base: Stage[Any], data: Sequence[Mapping[str, Stage[Any]]]
) -> Stage[Settings]:
    """Return the stage for one or several data together."""
    decides = {name: getattr(settings, name) for name in ("rows", "max_tokens", "too_long", "dtype")}
    inputs = {numbered(kind, i): own[kind] for i, own in enumerate(data) for kind in ("rows", "distilled")}
    own = Settings(soft=soft, train=training.Train(**decides))
    return Stage("targets", data[0]["distilled"].slug, VERSION, own, {"model": base, **inputs})


@dataclasses.dataclass(frozen=True)
class Job:
    """What the likeliest tokens of every shard are found for."""

    storage: Storage
    stage: Stage[Settings]
    device: str

    @property
    def folder(self) -> Path:
        """Where shards lie until all are there."""
        return self.storage.resumable(self.stage) / "likeliest"

    def find(self, shard: str) -> str:
        """Find those of one shard of encoded rows, write and publish them; return its name."""
        encoded = self.storage.resumable(self.stage) / FOLDER
        self.storage.bring(encoded, f"{shard}.*")
        settings = self.stage.settings
        teacher = _load_teacher(self.storage.handle(self.stage.model)(), settings.train.dtype, self.device)
        rows, vocabulary = EncodedRows(encoded, shard), teacher.model.config.vocab_size
        found = _find(teacher, rows, settings.soft)
        shape = rows.trained_tokens, settings.soft.likeliest or 0
        self.storage.publish(*write_likeliest(self.folder, shard, found, shape, vocabulary))
        return shard


def build(work: Work[Settings]) -> Summary:
    """Encode the rows, and find the likeliest tokens of each shard."""
    from transformers import AutoTokenizer

    base = work.input("model")
    tokenizer = AutoTokenizer.from_pretrained(base)
    require_trainable(tokenizer)
    work.storage.drop(work.resumable / FOLDER)
    tally = encode_split(work, tokenizer, NAME)
    plan = work.compute.score
    job = Job(work.storage, work.stage, "cuda" if plan.gpus else "cpu")
    work.storage.bring(job.folder, "*.npy")
    shards = [file.name.removesuffix(".index.npy") for file in sorted((work.resumable / FOLDER).glob("*.index.npy"))]
    todo = [shard for shard in shards if not (job.folder / f"{shard}.log_probs.npy").is_file()]
    work.progress.begin(len(shards), len(shards) - len(todo))
    work.progress.enter(f"the base reads {tally.tokens} tokens")
    for done, _ in enumerate(
        in_tasks(job.find, todo, cpus=settled(plan.cpus), gpus=plan.gpus), len(shards) - len(todo) + 1
    ):
        work.progress.update(done)
    work.storage.bring(job.folder, "*.npy")
    for file in sorted(job.folder.glob("*.npy")):
        file.rename(work.directory / file.name)
    covered = sum(sum_probabilities(file) for file in work.directory.glob("*.log_probs.npy"))
    likeliest = work.settings.soft.likeliest
    assert likeliest is not None, "an arm without a number of likeliest tokens has no such stage"
    return Summary(
        rows=tally.rows, tokens=tally.trained_tokens, likeliest=likeliest, covered=covered / tally.trained_tokens
    )


def require_known(likeliest: int, vocabulary: int) -> None:
    """Raise UserError for more tokens than a model has."""
    if likeliest > vocabulary:
        what = f"{likeliest} is more than the {vocabulary} tokens of the model's vocabulary"
        raise UserError(problem("arms.logits.likeliest", what, f"Lower it to {vocabulary} or less"))


@functools.lru_cache(maxsize=1)  # a process serves many shards
def _load_teacher(base: Path, dtype: str, device: str) -> Teacher:
    return Teacher(base, dtype, device)


def _find(teacher: Teacher, rows: EncodedRows, soft: training.Soft) -> Iterator[Likeliest]:
    from sdft_ray.core.packing import in_passes, pack_rows
    from sdft_ray.core.rowwise import may_share_a_sequence
    from sdft_ray.core.soft_targets import Likeliest, find_likeliest

    vocabulary, k = teacher.model.config.vocab_size, soft.likeliest or 0
    require_known(k, vocabulary)
    # A model that carries a state on reads one row at a time.
    passes = in_passes(rows, _PASS_TOKENS if may_share_a_sequence(teacher.model.config) else 0)
    for passed in passes:
        found = find_likeliest(teacher.logits(pack_rows(passed)), k, soft.temperature)
        yield Likeliest(found.ids.cpu(), found.log_probs.cpu())
