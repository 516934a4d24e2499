"""The trials of a sweep, under Ray Tune: as many side by side as the cluster holds.

In: a sweep's plan. Out: an artifact for every stage in it, but for trials that failed or that `asha` stopped, which are
written down with the reason. Drafts come last, one at a time: beside a trial their speeds would mean nothing. Resuming
is by artifacts, and Tune's own state is thrown away: a finished trial is not submitted again, or only reports its
losses to those that are compared with it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sdft_ray import environment, pipeline
from sdft_ray.cluster import count_places, live_nodes, ray_cluster, require_capacity
from sdft_ray.engine import EngineFactory, start_engine
from sdft_ray.errors import StageFailed, UserError
from sdft_ray.preflight import precision, teachers
from sdft_ray.progress import Progress, duration, log
from sdft_ray.results import HISTORY, read_history, validations
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.sweep import Asha
from sdft_ray.stages import draft, evaluate, train
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage
from sdft_ray.sweep import notes
from sdft_ray.sweep.planning import Plan, Trial, check, describe_stopped, is_done, name_draft, stages_of

STEP, LOSS = "step", "validation_loss"
_FOR_EVER = 10**7  # seconds: a trial has its capacity by construction; other trials' evaluations may use it for a while


def run(plan: Plan, compute: Compute, storage: Storage, engine: EngineFactory = start_engine) -> pipeline.Built:
    """Build everything that a sweep lacks; what is shared first, for no trial waits for another.

    A trial or draft that fails does not hold up the others: StageFailed at the end names each with its reason.
    """
    check(plan, compute)
    with storage.lock(plan.name):
        trials = open_trials(plan, storage)
        drafts = [d for d in plan.drafts if notes.read_stopped(storage, plan.name, draft.candidate(d)) is None]
        wanted = [*plan.shared, *(stage for trial in trials for stage in trial.stages), *drafts]
        todo, _ = pipeline.survey(wanted, storage)
        _, there = pipeline.survey(stages_of(plan), storage)
        pipeline.require_gates(there, storage)
        if todo:
            precision.report_slow(todo, compute)
            teachers.require_endpoints(todo, storage)
            with ray_cluster(compute):
                if drafts:
                    require_capacity(compute, draft.NEEDS, "draft")
                pipeline.build(plan.shared, compute, storage, engine=engine)
                _run_trials(_with_rivals(trials, plan, storage) if plan.asha else trials, plan, compute, storage)
                _try_drafts([stage for stage in drafts if stage in todo], plan, compute, storage)
    failed = open_trials(plan, storage)
    lines = [f"{trial.name}: {notes.read_failure(storage, trial.train)}" for trial in failed]
    untried = [stage for stage in pipeline.survey(plan.drafts, storage)[0] if notes.read_failure(storage, stage)]
    lines += [f"{name_draft(stage, plan)}: {notes.read_failure(storage, stage)}" for stage in untried]
    if lines:
        done = f"{len(plan.trials) - len(failed)} of {len(plan.trials)} trials are done"
        what = f"sweep: {len(lines)} failed, {done}. Run the same command again to try those once more."
        raise StageFailed("\n".join([*lines, what]))
    return pipeline.Built(tuple(todo), tuple(there))


def open_trials(plan: Plan, storage: Storage) -> list[Trial]:
    """Return the trials that are neither finished nor stopped by the sweep."""
    with storage.survey():
        return [trial for trial in plan.trials if is_open(trial, plan, storage)]


def is_open(trial: Trial, plan: Plan, storage: Storage) -> bool:
    """Return whether a trial is neither finished nor stopped by the sweep."""
    return not is_done(trial, storage) and notes.read_stopped(storage, plan.name, trial.train) is None


def _with_rivals(trials: Sequence[Trial], plan: Plan, storage: Storage) -> list[Trial]:
    """Return trials after those that they are compared with and that need no more work: these report their losses."""
    groups = {trial.compares_with for trial in trials}
    still_open = {trial.train.id for trial in open_trials(plan, storage)}
    ended = [t for t in plan.trials if t.compares_with in groups and t.train.id not in still_open]
    return [*ended, *trials]


def _run_trials(trials: Sequence[Trial], plan: Plan, compute: Compute, storage: Storage) -> None:
    """Run trials under Ray Tune, as many at a time as the cluster holds."""
    if not trials:
        return
    environment.for_tune()
    from ray import tune

    require_capacity(compute, train.NEEDS, "train")
    require_capacity(compute, evaluate.NEEDS, "evaluate")
    place = storage.root / "scratch" / plan.name
    storage.drop(place)  # of a run that was killed
    patient = compute.model_copy(update={"ray": compute.ray.model_copy(update={"wait_seconds": _FOR_EVER})})
    work = functools.partial(_run_trial, trials=tuple(trials), plan=plan, compute=patient, storage=storage)
    for trial in trials:
        notes.forget_failure(storage, trial.train)
    with Progress("sweep", "trials") as progress:
        progress.begin(len(trials))
        try:
            tune.Tuner(
                # Tune refuses a trial that needs nothing. Its CPUs are its workers', who ask for themselves.
                tune.with_resources(work, {"memory": 1e6}),
                param_space={"trial": tune.grid_search(list(range(len(trials))))},
                tune_config=tune.TuneConfig(
                    scheduler=_scheduler(plan.asha, trials) if plan.asha else None,
                    max_concurrent_trials=trials_at_once(compute),
                    reuse_actors=True,  # a process imports torch once
                ),
                run_config=tune.RunConfig(
                    name="trials",
                    **storage.for_ray(place),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=compute.train.max_failures),
                    callbacks=[_watcher(trials, plan, storage, progress)],
                ),
            ).fit()
        finally:
            storage.drop(place)


def _try_drafts(drafts: Sequence[Stage], plan: Plan, compute: Compute, storage: Storage) -> None:
    """Measure drafts one after another; one whose model is not there is left out, with a line."""
    for stage in drafts:
        notes.forget_failure(storage, stage)
        if storage.status(draft.candidate(stage)) != "done":
            log(f"{name_draft(stage, plan)}: left out, there is no such model")
            continue
        try:
            pipeline.build([stage], compute, storage)
        except (UserError, StageFailed) as error:
            notes.keep_failure(storage, stage, str(error))
            log(f"{name_draft(stage, plan)}: FAILED: {error}")


def trials_at_once(compute: Compute) -> int:
    """Return how many trials the nodes that are there hold side by side: by their training, which needs most."""
    workers, cpus, gpus = compute.bundles(train.NEEDS)
    return max(1, count_places(live_nodes(), cpus, gpus) // workers)


def _run_trial(
    config: Mapping[str, int], trials: Sequence[Trial], plan: Plan, compute: Compute, storage: Storage
) -> dict[str, Any]:
    """Train and evaluate one model; runs in a Ray worker, on the cluster that is there."""
    from ray import tune

    def report(step: int, loss: float) -> None:
        if plan.asha:
            tune.report({STEP: step, LOSS: loss})

    trial = trials[config["trial"]]
    known = notes.read_stopped(storage, plan.name, trial.train)
    if storage.status(trial.train) == "done":
        known = validations(read_history(storage.files(trial.train, HISTORY)))
    try:
        if known is None or storage.status(trial.train) == "done":
            pipeline.build(trial.stages, compute, storage, validated=report, sweep=plan.name)
    except (UserError, StageFailed) as error:  # a result of this trial, not a fault of its process: no second try
        notes.keep_failure(storage, trial.train, str(error))
    for step, value in known or ():
        report(step, value)
    return {"done": True}


def _number(trial: Any) -> int:
    """Return which of our trials one of Tune's is."""
    return int(trial.config["trial"])


def _scheduler(asha: Asha, trials: Sequence[Trial]) -> Any:
    """Return Tune's ASHA, one for each group of trials whose losses compare."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    class WithinGroups(FIFOScheduler):
        def __init__(self) -> None:
            super().__init__()
            self.groups = {
                group: ASHAScheduler(
                    time_attr=STEP,
                    metric=LOSS,
                    mode="min",
                    grace_period=asha.grace_steps,
                    reduction_factor=asha.reduction_factor,
                    max_t=_FOR_EVER,
                    stop_last_trials=False,
                )
                for group in dict.fromkeys(trial.compares_with for trial in trials)
            }

        def of(self, trial: Any) -> Any:
            return self.groups[trials[_number(trial)].compares_with]

        def on_trial_add(self, controller: Any, trial: Any) -> None:
            self.of(trial).on_trial_add(controller, trial)

        def on_trial_result(self, controller: Any, trial: Any, result: Any) -> str:
            return str(self.of(trial).on_trial_result(controller, trial, result))

        def on_trial_complete(self, controller: Any, trial: Any, result: Any) -> None:
            self.of(trial).on_trial_complete(controller, trial, result)

        def on_trial_remove(self, controller: Any, trial: Any) -> None:
            self.of(trial).on_trial_remove(controller, trial)

    return WithinGroups()


def _watcher(trials: Sequence[Trial], plan: Plan, storage: Storage, progress: Progress) -> Any:
    """Return what says a line at the end of every trial and writes down why those without a model have none."""
    from ray.tune import Callback

    class Watcher(Callback):
        def __init__(self) -> None:
            self.begun: dict[int, float] = {}
            self.losses: dict[int, list[tuple[int, float]]] = {}
            self.ended = 0

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self.begun.setdefault(_number(trial), time.monotonic())

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            if LOSS in result:
                self.losses.setdefault(_number(trial), []).append((result[STEP], result[LOSS]))

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            number = _number(trial)
            train = mine[number].train
            if notes.read_failure(storage, train) is None and storage.status(train) != "done":
                notes.keep_stopped(storage, plan.name, train, self.losses[number])
            self.report(number)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            lines = str(trial.get_error() or "its process died").strip().splitlines()
            notes.keep_failure(storage, mine[_number(trial)].train, lines[-1])
            self.report(_number(trial))

        def report(self, number: int) -> None:
            trial, self.ended = mine[number], self.ended + 1
            took = duration(time.monotonic() - self.begun[number])
            if what := notes.read_failure(storage, trial.train):
                took = f"FAILED after {took}: {what}"
            elif losses := notes.read_stopped(storage, plan.name, trial.train):
                took = f"{describe_stopped(losses)}, {took}"
            log(f"trial {trial.name}: {took}")
            progress.update(self.ended)

    mine = trials
    return Watcher()
