"""The driver's side of a training: Ray Train's workers, watched from here.

In: an assignment for the workers. Out: what rank 0 wrote down at the end.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from sdft_ray import environment
from sdft_ray.cluster import Watch, ticker
from sdft_ray.errors import StageFailed, problem
from sdft_ray.results import Step, validations
from sdft_ray.spec import compute
from sdft_ray.stages import Work
from sdft_ray.stages.train.log import Begun, Stepped
from sdft_ray.stages.train.worker import RESULT, Assignment, Outcome, train_worker
from sdft_ray.trackers import Tracking, run_of

_ASK_SECONDS = 1.0  # between two looks at how far the workers are


def fit(work: Work[Any], given: dict[str, Any]) -> Outcome:
    """Run the workers and return what rank 0 wrote down at the end; `given` is the user's DeepSpeed JSON."""
    from ray.train.v2.api.exceptions import TrainingFailedError

    if (work.resumable / RESULT).is_file():  # killed between the last step and the commit
        return Outcome.from_file(work.resumable / RESULT)
    work.storage.drop(work.resumable / "tuned")  # of other numbers of workers
    _set_torn_list_aside(work.resumable)
    reports, run = ticker(), run_of(work.stage, work.sweep)
    trainer = _make_trainer(work, given, reports)
    with (
        _own_interrupt(),
        Tracking(work.compute.track, run, work.storage, work.stage.id) as tracking,
        _Watcher(work, reports, tracking) as watcher,
    ):
        try:
            trainer.fit()
        except SystemExit:  # Ray Train's own handler of Ctrl-C ends the process as if all were well
            raise KeyboardInterrupt from None
        except TrainingFailedError as error:
            cause = str(error).strip().splitlines()[-1]
            where = work.storage.describe(work.resumable)
            do = f"The last training checkpoint is kept in {where}; the same command goes on from it"
            raise StageFailed(problem("train", cause, do)) from error
    work.storage.bring(work.resumable, RESULT)
    outcome = Outcome.from_file(work.resumable / RESULT)
    watcher.report_validations(validations(outcome.history))
    return outcome


def _make_trainer(work: Work[Any], given: dict[str, Any], ticker: Any) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    plan = work.compute.train
    here = work.compute.ray.address == "local" and not plan.gpus
    assignment = Assignment(work.storage, work.stage, plan, given, work.handle("model"), ticker)
    return TorchTrainer(
        train_worker,
        train_loop_config={"assignment": assignment},
        scaling_config=ScalingConfig(
            num_workers=_worker_count(plan),  # type: ignore[arg-type] # a pair is elastic
            use_gpu=bool(plan.gpus),
            resources_per_worker={"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})},
        ),
        # The same name and place: a rerun goes on from the last checkpoint by itself, in whatever layout.
        run_config=RunConfig(
            name="ray_train",
            **work.storage.for_ray(work.resumable),
            failure_config=FailureConfig(max_failures=plan.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=plan.keep_checkpoints),
            worker_runtime_env={"env_vars": environment.for_tensors_on_cpus() if here else {}},  # type: ignore[call-arg]
        ),
    )


def _worker_count(plan: compute.Train) -> int | tuple[int, int]:
    least, most = plan.workers.min, plan.workers.max
    return most if least == most else (least, most)


class _Watcher:
    """Shows how far the workers are, in a thread, and passes on validation losses and what is tracked."""

    def __init__(self, work: Work[Any], ticker: Any, tracking: Tracking) -> None:
        self._ticker, self._work, self._tracking = ticker, work, tracking
        self._reported: set[int] = set()
        self._watch = Watch(f"{work.progress.stage}: its progress", _ASK_SECONDS, self._read)

    def __enter__(self) -> Self:
        self._watch.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._watch.__exit__(kind, *error)

    def report_validations(self, losses: Iterable[tuple[int, float]]) -> None:
        """Pass on the validation losses that nobody has heard of yet."""
        for step, loss in losses:
            if self._work.validated and step not in self._reported:
                self._reported.add(step)
                self._work.validated(step, loss)

    def _read(self) -> None:
        """Pass on what the workers reported since the last time."""
        import ray

        for report in ray.get(self._ticker.read.remote()):  # once: an error of one must not lose the others
            self._watch.attempt(self._take, report)

    def _take(self, report: Begun | Stepped) -> None:
        progress = self._work.progress
        match report:
            case Begun(history):
                if len(history) != progress.done:
                    progress.begin(progress.total, len(history))
                for step in history:  # an earlier command may have ended before it passed them on
                    self._pass_on(step, step.metrics())
            case Stepped(step, note, metrics):
                progress.update(step.step, note)
                self._pass_on(step, metrics)

    def _pass_on(self, step: Step, metrics: Mapping[str, float]) -> None:
        self.report_validations(validations([step]))
        self._tracking.log(step.step, {f"train/{name}": value for name, value in metrics.items()})


@contextlib.contextmanager
def _own_interrupt() -> Iterator[None]:
    """Put the handler of Ctrl-C back that Ray Train replaces."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)


def _set_torn_list_aside(folder: Path) -> None:
    """Let Ray begin a new list of checkpoints where its own is torn.

    It writes the list in place: a kill or a full disk at that moment leaves half of it, which it cannot read.
    """
    listed = folder / "ray_train" / "checkpoint_manager_snapshot.json"
    try:
        if listed.is_file():
            json.loads(listed.read_text())
    except ValueError:
        listed.parent.rename(folder / f"ray_train-torn-{len(list(folder.glob('ray_train-torn-*')))}")
