"""Stage `train`: one arm's fine-tuning of the pruned model.

In: the pruned model and rows with responses (the references, or what `distill` selected). Out: a plain Hugging Face
directory with the tuned model, for LoRA the adapter beside it, losses.json, metrics.jsonl and TensorBoard's files. Ray
Train runs the workers (worker.py) and replaces dead ones; DeepSpeed spreads what they hold. Every check that needs no
worker is made before one starts. What was written is loaded again: its logits must be those of the trained weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from sdft_ray import (
    progress,  # not `log` by name: the module log.py beside this would replace it
    stages,
)
from sdft_ray.core.rows import TrainingRow
from sdft_ray.data.chat import require_trainable
from sdft_ray.errors import StageFailed, UserError, problem
from sdft_ray.models.directory import require_loadable
from sdft_ray.results import HISTORY, METRICS, validations
from sdft_ray.spec import training
from sdft_ray.spec.compute import Needs
from sdft_ray.spec.section import Section
from sdft_ray.stages import Work
from sdft_ray.stages.train import targets
from sdft_ray.stages.train.adapters import blocks_in_scope, count_parameters, name_adapters, outline_model
from sdft_ray.stages.train.encoded import FOLDER
from sdft_ray.stages.train.fit import fit
from sdft_ray.stages.train.fitting import require_fitting
from sdft_ray.stages.train.history import best_step, last_by_source
from sdft_ray.stages.train.log import EVENTS
from sdft_ray.stages.train.prepare import encode_split, find_ids
from sdft_ray.stages.train.rows import (
    Counts,
    Tally,
    marked_example,
    proof_rows,
    require_some,
    require_vocabulary,
    shorten,
)
from sdft_ray.stages.train.state import read_checkpoint, steps_in
from sdft_ray.stages.train.tuned import require_same_logits, write_model
from sdft_ray.stages.train.worker import RESULT, Outcome
from sdft_ray.store.files import write_atomically
from sdft_ray.store.identity import Stage, numbered
from sdft_ray.store.record import Record

VERSION, NEEDS, UNIT = 4, Needs("train"), "steps"


class Settings(Section):
    """What the pruned model is trained on, and how."""

    optional = ("soft",)

    arm: str
    train: training.Train
    soft: training.Soft | None = None
    """How the base's distribution is the target, where it is."""


class Example(Record):
    """One row as text, split where its loss begins."""

    without_loss: str
    with_loss: str


class Summary(stages.Summary):
    """How a training went; losses are in nats a trained token."""

    arm: str
    rows: int
    """That were trained on."""
    rows_too_long: int
    rows_left_out: int
    """Without a token to train: of those that were too long, and plain texts of one token."""
    rows_by_source: dict[int, int] = Field(default_factory=dict)
    """By the number of the recipe's source, where there is more than one."""
    validation_rows: int
    steps: int
    planned_steps: int
    """Without an end by patience."""
    best_step: int | None
    """Of the lowest validation loss."""
    tokens_per_epoch: int
    trained_tokens_per_epoch: int
    training_seconds: float
    """That the steps took, also those before a restart; without starting workers, and without steps that were lost."""
    workers: int
    peak_memory_gb: float
    """Of the worker that held most."""
    trainable_parameters: int
    adapters_on: tuple[str, ...]
    """Matrices of a block that have adapters."""
    parameters: int
    """Of the model without adapters."""
    logits_differ_by: float
    """At most, between the written model and the trained weights."""
    first_loss: float
    final_loss: float
    validation_loss: float | None
    """The last one."""
    final_loss_by_source: dict[int, float] = Field(default_factory=dict)
    """By the number of the recipe's source, where there are several: at the last step with rows of it."""
    validation_loss_by_source: dict[int, float] = Field(default_factory=dict)
    """The last ones, likewise."""
    example: Example


def stage(
    settings: training.Train,
    arm: str,
    pruned: Stage[Any],
    data: Sequence[Mapping[str, Stage[Any]]],
    soft: training.Soft | None = None,
    base: Stage[Any] | None = None,
) -> Stage[Settings]:
    """Return the stage that trains in an arm, on one or several data together; with soft targets, those of the base."""
    kinds = ("rows", "distilled") if training.is_on_rewrites(arm) else ("rows",)
    inputs = {numbered(kind, i): own[kind] for i, own in enumerate(data) for kind in kinds}
    taught = {"teacher": base} if soft and base else {}
    stored = {"targets": targets.stage(settings, soft, base, data)} if soft and base and soft.likeliest else {}
    own = Settings(arm=arm, train=settings, soft=soft)
    return Stage("train", f"{pruned.slug}-{arm}", VERSION, own, {"model": pruned, **inputs, **taught, **stored})


def build(work: Work[Settings]) -> Summary:
    """Train, then write the plain model."""
    settings = work.settings.train
    given = require_fitting(settings, work.compute.train)
    base = work.input("model")
    work.storage.bring(work.resumable, "*.json")
    _require_own_checkpoints(work)
    parts = _look_at(base, settings)
    data = _prepare(work, base)
    work.progress.begin(settings.count_steps(data.tally.rows))
    work.progress.enter("starting the workers")
    result = fit(work, given)
    if result.failed:
        raise _give_up(work, result)
    difference = _write(work, base, data.first_rows, parts, result.workers)
    history, tally = result.history, data.tally
    write_atomically(work.directory / HISTORY, json.dumps([step.plain() for step in history]))
    shutil.copytree(work.resumable / EVENTS, work.directory / EVENTS, dirs_exist_ok=True)
    shutil.copy(work.resumable / METRICS, work.directory)
    return Summary(
        arm=work.settings.arm,
        rows=tally.rows,
        rows_too_long=tally.rows_too_long,
        rows_left_out=tally.rows_left_out,
        rows_by_source=tally.rows_by_source if len(tally.rows_by_source) > 1 else {},
        validation_rows=data.validation_rows,
        steps=len(history),
        planned_steps=result.planned_steps,
        best_step=best_step(history),
        tokens_per_epoch=tally.tokens,
        trained_tokens_per_epoch=tally.trained_tokens,
        training_seconds=round(result.seconds, 1),
        workers=result.workers,
        peak_memory_gb=round(result.peak_bytes / 1e9, 2),
        trainable_parameters=parts.trainable,
        adapters_on=tuple(parts.adapted),
        parameters=parts.parameters,
        logits_differ_by=difference,
        first_loss=history[0].loss,
        final_loss=history[-1].loss,
        validation_loss=next((loss for _, loss in reversed(validations(history))), None),
        final_loss_by_source=last_by_source(step.loss_by_source for step in history),
        validation_loss_by_source=last_by_source(step.validation_loss_by_source for step in history),
        example=data.example,
    )


def require_gates(stage: Stage[Settings], counts: Counts | Summary) -> None:
    """Raise UserError where more rows were too long than the recipe allows."""
    rows, too_long = counts.rows + counts.rows_left_out, counts.rows_too_long
    allowed = stage.settings.train.max_too_long_fraction
    if too_long > allowed * rows:
        what = f"{too_long} of {rows} rows are longer than {stage.settings.train.max_tokens} tokens"
        what += f" (got {too_long / rows:.2%}; expected at most {allowed:.2%})"
        raise UserError(problem("train.max_tokens", what, "Raise it, or raise train.max_too_long_fraction"))


def _require_own_checkpoints(work: Work[Settings]) -> None:
    """Raise UserError where the directory of this training's checkpoints holds those of another."""
    for directory in sorted(work.resumable.glob("ray_train*/checkpoint_*")):
        checkpoint = read_checkpoint(directory)
        if checkpoint and checkpoint.stage != work.stage.id and steps_in(directory):
            what = f"holds a checkpoint of another training ({checkpoint.stage}, not {work.stage.id})"
            raise UserError(problem(str(directory), what, f"Move {work.resumable} away and run again"))


class _Parts(NamedTuple):
    """What is trained of a model."""

    trainable: int
    parameters: int
    """Of the model without adapters."""
    adapted: list[str]
    """Matrices of a block that have adapters."""


def _look_at(base: Path, settings: training.Train) -> _Parts:
    outline = outline_model(base, settings)
    trained, parameters = count_parameters(outline)
    if blocks := blocks_in_scope(base, settings):
        progress.log(f"train: blocks {', '.join(map(str, blocks))} of the pruned model are trained, and nothing else")
    if not trained:
        what = f"none of them is in the blocks that train.scope: {settings.scope} trains"
        raise UserError(problem("train.lora.targets", what, "Give all-linear, or set train.scope: all"))
    adapted, bare = name_adapters(outline, settings.lora.targets == "all-linear")
    if adapted and bare:
        progress.log(f"train: adapters on {', '.join(adapted)}; none on {', '.join(bare)}")
    return _Parts(trained, parameters, adapted)


class _Data(NamedTuple):
    """What is trained on."""

    tally: Tally
    validation_rows: int
    example: Example

    @property
    def first_rows(self) -> list[TrainingRow]:
        return list(self.tally.first_rows.values())


def _prepare(work: Work[Settings], base: Path) -> _Data:
    """Write rows and validation rows as token ids to where workers find them."""
    from transformers import AutoTokenizer

    settings = work.settings.train
    tokenizer = AutoTokenizer.from_pretrained(base)
    require_trainable(tokenizer)
    work.storage.drop(work.resumable / FOLDER)
    rows = encode_split(work, tokenizer, "train")
    require_some(rows, settings)
    require_gates(work.stage, rows)
    validation = encode_split(work, tokenizer, "validation")
    require_vocabulary(base, tokenizer, max(rows.largest_id, validation.largest_id))
    before, after = marked_example(tokenizer, next(iter(rows.first_rows.values())))
    progress.log(f"train: {rows.rows} rows; of the first, no loss on {shorten(before)}, loss on {shorten(after)}")
    return _Data(rows, validation.rows, Example(without_loss=before, with_loss=after))


def _give_up(work: Work[Settings], result: Outcome) -> StageFailed:
    """Return the error of a training whose loss is no number; a rerun tries again from the last checkpoint."""
    work.storage.drop(work.resumable / RESULT)
    some = ", ".join(find_ids(work, result.rows[:16]))
    some += f" and {len(result.rows) - 16} more" if len(result.rows) > 16 else ""
    kept = f"The last training checkpoint is kept in {work.storage.describe(work.resumable)}"
    return StageFailed(problem("train", f"{result.failed}, on rows {some}", f"Look at them, or lower train.lr. {kept}"))


def _write(work: Work[Settings], base: Path, rows: Sequence[TrainingRow], parts: _Parts, workers: int) -> float:
    """Write the tuned model from the shares of so many workers, and return how far its logits are from those of the
    trained weights."""
    for folder in ("tuned", EVENTS):
        work.storage.bring(work.resumable / folder)
    work.storage.bring(work.resumable, METRICS)
    progress.log("train: writing the model, to compare its logits with those of the trained weights")
    logits = write_model(base, work.settings.train, work.resumable / "tuned", workers, work.directory)
    parameters = require_loadable(work.directory)
    assert parameters == parts.parameters, f"{parts.parameters} parameters were loaded, {parameters} written"
    return require_same_logits(work.directory, proof_rows(rows), logits, work.settings.train.dtype)
