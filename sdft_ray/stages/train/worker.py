"""What each worker of a training does, under Ray Train and DeepSpeed, all in step.

In: an assignment. Out: shares of the tuned weights, and on rank 0 the history of the losses. `train_worker` is the
training loop; a worker that dies is replaced, and the new ones go on from the newest whole checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sdft_ray import environment
from sdft_ray.core.rows import TrainingRow
from sdft_ray.results import METRICS, Step
from sdft_ray.spec import compute, training
from sdft_ray.stages.train.adapters import removed_from
from sdft_ray.stages.train.encoded import FOLDER, EncodedRows
from sdft_ray.stages.train.history import best_step, is_out_of_patience, learning_rate
from sdft_ray.stages.train.likeliest import LikeliestTokens
from sdft_ray.stages.train.log import EVENTS, Begun, Log, peak_bytes, report
from sdft_ray.stages.train.rows import proof_rows
from sdft_ray.stages.train.state import PROGRESS, Checkpoint, share_file
from sdft_ray.stages.train.step import compute_logits, measure_losses, take_step
from sdft_ray.stages.train.teacher import Softener, Teacher
from sdft_ray.stages.train.zero import load_trainable, start_engine
from sdft_ray.store.identity import Stage
from sdft_ray.store.record import Record
from sdft_ray.store.storage import Storage

if TYPE_CHECKING:
    from torch import Tensor

RESULT = "result.json"


class Outcome(Record):
    """What rank 0 writes down at the end: how it failed, or how it went."""

    failed: str | None = None
    rows: tuple[int, ...] = ()
    """The numbers of the rows that it failed on."""
    history: tuple[Step, ...] = ()
    workers: int = 0
    peak_bytes: int = 0
    """Of the worker that held most."""
    planned_steps: int = 0
    """Without an end by patience."""
    seconds: float = 0.0
    """That the steps of the history took: without loading, and without steps that a restart lost."""


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What a worker is given."""

    storage: Storage
    stage: Stage[Any]
    plan: compute.Train
    deepspeed: dict[str, Any]
    """The user's JSON."""
    model: Callable[[], Path]
    """Gives the directory of the pruned model on this node."""
    ticker: Any
    """The actor that rank 0 reports its progress to."""

    @property
    def settings(self) -> training.Train:
        """How the model is trained."""
        own: training.Train = self.stage.settings.train
        return own


def train_worker(config: Mapping[str, Assignment]) -> None:
    """Train on one worker: take the steps that are left, then write this worker's share of the model."""
    state = Training(config["assignment"])
    for step in state.steps_left():
        if not state.take(step):
            return
        if state.validates_after(step) and not state.validate(step):
            return
        state.report()
        if state.saves_after(step):
            state.save(step)
    state.finish()


class Training:
    """The state of a training on one worker. Steps are numbered from 0."""

    def __init__(self, assignment: Assignment) -> None:
        import ray.train

        from sdft_ray.core.packing import Schedule
        from sdft_ray.progress import quiet_transformers

        self.assignment = assignment
        self.settings, self.plan = assignment.settings, assignment.plan
        _set_up_deepspeed(self.plan)
        quiet_transformers()
        self.storage, self.folder = assignment.storage, assignment.storage.resumable(assignment.stage)
        self.storage.bring(self.folder, f"{FOLDER}/*")
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        encoded = self.folder / FOLDER
        base, soft = assignment.model(), assignment.stage.settings.soft
        stored = LikeliestTokens(self._input("targets"), "train") if soft and soft.likeliest else None
        self.rows = EncodedRows(encoded, "train", targets=stored)
        self.validation = EncodedRows(encoded, "validation")
        self.is_mixed = len(self.rows.sources()) > 1
        module = load_trainable(str(base), self.settings, self.plan, assignment.deepspeed)
        self.engine = start_engine(module, self.settings, self.plan, assignment.deepspeed)
        if soft:
            module.soften = self._soften(module, soft, base)
        self.steps = Schedule(len(self.rows), self.settings.epochs, self.settings.global_batch_size, self.settings.seed)
        bring = functools.partial(self.storage.bring, self.folder)
        self.history, self.seconds_before, self.best = _resume(self.engine, self.folder, self.rank, bring)
        self.begun, self.tokens = time.monotonic(), 0
        self.log: Log | None = None
        if self.rank == 0:
            assignment.ticker.report.remote(Begun(tuple(self.history)))
            self.storage.bring(self.folder / EVENTS)
            self.storage.bring(self.folder, METRICS)
            self.log = Log(self.folder, len(self.history))

    def steps_left(self) -> Iterator[int]:
        """Yield the steps that are not taken yet, until patience ends."""
        for step in range(len(self.history), len(self.steps)):
            if is_out_of_patience(self.history, self.settings.patience):
                return
            yield step

    def take(self, step: int) -> bool:
        """Take one optimizer step and return whether its loss and gradient are numbers; else say so on disk."""
        numbers = self.steps[step]
        chosen = [self.rows[i] for i in numbers]
        lr = learning_rate(step, len(self.steps), self.settings)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        # A row's dropout depends on seed, step and row alone.
        keys = [f"{self.settings.seed}/{step}/{i}" for i in numbers]
        losses, norm = take_step(self.engine, chosen, keys, self._passes(chosen), self.settings.max_grad_norm)
        loss = losses.mean
        if not (math.isfinite(loss) and math.isfinite(norm)):  # before a checkpoint could keep what it did
            what, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
            return self._give_up(step, f"the {what} at step {step + 1} is {value}")
        by_source = {}
        if self.is_mixed:
            sources = np.array([self.rows.source_of(i) for i in numbers])
            by_source = {"loss_by_source": losses.by_source(sources)}
        self.history.append(Step(step=step + 1, loss=loss, lr=lr, grad_norm=norm, **by_source))
        self.tokens += sum(len(row.ids) for row in chosen)
        return True

    def validates_after(self, step: int) -> bool:
        """Return whether the validation rows are measured after a step."""
        due = step + 1 == len(self.steps) or (step + 1) % self.settings.validate_every_steps == 0
        return bool(self.validation) and due

    def validate(self, step: int) -> bool:
        """Measure the loss of the validation rows, and keep the weights where they are to be kept as the best; return
        whether the loss is a number, else say so on disk."""
        losses = measure_losses(self.engine, self.validation, self._passes(self.validation))
        if not math.isfinite(losses.mean):
            return self._give_up(step, f"the loss of the validation rows after step {step + 1} is {losses.mean}")
        by_source = {}
        if self.is_mixed:
            by_source = {"validation_loss_by_source": losses.by_source(self.validation.column("origin"))}
        self.history[-1] = self.history[-1].model_copy(update={"validation_loss": losses.mean, **by_source})
        if self.settings.keep == "best" and best_step(self.history) == len(self.history):
            self.best = self._weights()
        return True

    def _give_up(self, step: int, why: str) -> Literal[False]:
        self._write(Outcome(failed=why, rows=tuple(self.steps[step])))
        return False

    def report(self) -> None:
        """Report the last step."""
        if self.log is not None:
            rate = self.tokens / (time.monotonic() - self.begun)
            report(self.log, self.assignment.ticker, self.history, rate, self.engine)

    def saves_after(self, step: int) -> bool:
        """Return whether a training checkpoint is written after a step."""
        due = step + 1 == len(self.steps) or (step + 1) % self.plan.checkpoint_every_steps == 0
        return due or is_out_of_patience(self.history, self.settings.patience)

    def save(self, step: int) -> None:
        """Write a training checkpoint; every worker hands over its share, and Ray drops those that are not whole."""
        import ray.train

        from sdft_ray.stages.train.state import save_state

        with tempfile.TemporaryDirectory() as state:
            save_state(self.engine, Path(state), self.best)
            if self.rank == 0:
                stage, history = self.assignment.stage.id, tuple(self.history)
                checkpoint = Checkpoint(stage=stage, workers=self.workers, history=history, seconds=self._seconds())
                checkpoint.to_file(Path(state) / PROGRESS)
                self.storage.publish(*(self.log.files() if self.log else ()))
            ray.train.report({"step": step + 1}, checkpoint=ray.train.Checkpoint.from_directory(state))

    def finish(self) -> None:
        """Write this worker's share of the model, and on rank 0 the history."""
        import torch
        import torch.distributed as dist

        seconds = self._seconds()
        keep_best = self.settings.keep == "best" and best_step(self.history)
        kept = self.best if keep_best else self._weights()
        self.storage.publish(_save_tuned(kept, self.folder / "tuned", self.rank))
        peak = torch.tensor(float(peak_bytes(self.engine)), device=self.engine.device, dtype=torch.float64)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        if self.log is not None:
            self.log.close()
            self.storage.publish(*self.log.files())
        counts = {"workers": self.workers, "peak_bytes": int(peak), "planned_steps": len(self.steps)}
        self._write(Outcome(history=tuple(self.history), seconds=seconds, **counts))
        dist.barrier()

    def _soften(self, module: Any, soft: training.Soft, base: Path) -> Softener:
        """Return the loss with soft targets: those that rows bring, else those of the base beside the module."""
        if soft.likeliest:
            return Softener(soft, None)
        teacher = Teacher(self._input("teacher"), self.settings.dtype, self.engine.device)
        if self.plan.zero_stage < 3:
            teacher.share(module.model, removed_from(base))
        return Softener(soft, teacher)

    def _input(self, name: str) -> Path:
        """Return the directory of an input on this node."""
        return self.storage.handle(self.assignment.stage.inputs[name])()

    def _passes(self, rows: Sequence[TrainingRow]) -> list[list[int]]:
        """Return this worker's share of rows, as the places of those that go through the model together."""
        from sdft_ray.core.packing import assign_passes

        most = self.plan.pass_tokens or self.plan.micro_batch * self.settings.max_tokens
        micro_batch = self.plan.micro_batch if self.engine.module.packs else 1
        return assign_passes([len(row.ids) for row in rows], self.workers, micro_batch, most)[self.rank]

    def _weights(self) -> dict[str, Tensor]:
        from sdft_ray.stages.train.state import share_of_weights

        return share_of_weights(self.engine, compute_logits(self.engine, proof_rows(self.rows)))

    def _seconds(self) -> float:
        """Return how long the steps of the history took."""
        return self.seconds_before + time.monotonic() - self.begun

    def _write(self, outcome: Outcome) -> None:
        if self.rank == 0:
            outcome.to_file(self.folder / RESULT)
            self.storage.publish(self.folder / RESULT)


def _set_up_deepspeed(plan: compute.Train) -> None:
    """Import DeepSpeed for this worker's device, without operators that it would compile."""
    environment.for_deepspeed(plan.gpus)
    import deepspeed

    # DeepSpeed would compile an operator that only its inference uses; a build that is killed leaves a lock that every
    # later one waits on for ever. None of its operators counts as compatible, so none is built.
    deepspeed.ops.__compatible_ops__ = {}


# --- what outlives a worker -----------------------------------------------------------------------------------


def _resume(
    engine: Any, folder: Path, rank: int, bring: Callable[[str], None]
) -> tuple[list[Step], float, dict[str, Tensor]]:
    """Load the newest whole checkpoint, if there is one; return the steps behind it, the seconds that they took, and
    the best weights so far.

    Not `ray.train.get_checkpoint`: Ray's controller hears of a checkpoint about a second after it is on disk, and does
    not know it after a kill in between.
    """
    import torch.distributed as dist

    from sdft_ray.stages.train.state import load_state, newest_checkpoint

    newest = [newest_checkpoint(folder, bring) if rank == 0 else None]
    dist.broadcast_object_list(newest)
    if newest[0] is None:
        return [], 0.0, {}
    bring(f"{newest[0]}/*")
    checkpoint = Checkpoint.from_file(folder / newest[0] / PROGRESS)
    best = load_state(engine, folder / newest[0], len(checkpoint.history))
    return list(checkpoint.history), checkpoint.seconds, best


def _save_tuned(share: Mapping[str, Tensor], folder: Path, rank: int) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = share_file(folder, rank)
    save_file(dict(share), path)
    return path
