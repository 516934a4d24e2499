"""The Python surface: `from sdft_ray import run, sweep, report`.

In: what the commands take: a recipe, sweep or compute file by its path, or its content as a mapping. Out: addresses of
models, and tables as pandas has them. These three functions are all that is promised to stay; a test freezes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray import environment
from sdft_ray.errors import UserError, problem

if TYPE_CHECKING:
    import pandas

    from sdft_ray.spec.recipe import Recipe

Source = str | os.PathLike[str] | Mapping[str, Any]


def run(
    recipe: Source,
    *,
    compute: Source | None = None,
    root: str | os.PathLike[str] = "./artifacts",
    overrides: Mapping[str, Any] | None = None,
    until: str | None = None,
) -> dict[str, str]:
    """Build what a recipe lacks, as `sdft run` does, and return where its finished models are, by name.

    recipe, compute: the path of a YAML file, or its content. overrides: recipe values by dotted key, as of `--set`.
    until: the last stage to build, such as "cut". Raises UserError (sdft_ray.errors) for a mistake in the input and
    StageFailed where a stage did not finish; finished work is kept, and the same call goes on from it.
    """
    environment.for_command()
    from sdft_ray import pipeline
    from sdft_ray.report import collect, track
    from sdft_ray.spec.compute import load_compute
    from sdft_ray.store.storage import Storage

    loaded, plan, storage = _load(recipe, overrides), load_compute(_given(compute)), Storage(str(root))
    pipeline.require_stage(until)
    pipeline.run(loaded, plan, storage, until)
    chain = pipeline.chain(loaded)
    if plan.track and until in (None, "evaluate"):
        track.log_results(collect.collect(loaded, _name(recipe), storage), chain, plan, storage)
    return {name: storage.where(stage) for name, stage in chain.models.items() if storage.status(stage) == "done"}


def sweep(
    sweep: Source, *, compute: Source | None = None, root: str | os.PathLike[str] = "./artifacts"
) -> dict[str, str]:
    """Build what a sweep over recipes lacks, as `sdft sweep` does, and return where its finished models are, by trial.

    sweep, compute: the path of a YAML file, or its content. Raises UserError (sdft_ray.errors) for a mistake in the
    input, and StageFailed once all other trials are done where one failed.
    """
    environment.for_command()
    from sdft_ray.report import track
    from sdft_ray.report.sweep import collect
    from sdft_ray.spec.compute import load_compute
    from sdft_ray.store.identity import distinct
    from sdft_ray.store.storage import Storage
    from sdft_ray.sweep import goal, planning

    plan, machine, storage = planning.load_sweep(_given(sweep)), load_compute(_given(compute)), Storage(str(root))
    goal.run(plan, machine, storage)
    if machine.track:
        track.log_sweep(collect(plan, _name(sweep), storage), plan, machine, storage)
    done = [trial for trial in plan.trials if planning.is_done(trial, storage)]
    names = distinct([trial.name for trial in done])  # `seed 1` may be one of two axes
    return {name: storage.where(trial.train) for name, trial in zip(names, done, strict=True)}


def report(
    source: Source, *, root: str | os.PathLike[str] = "./artifacts", overrides: Mapping[str, Any] | None = None
) -> pandas.DataFrame:
    """Return what `sdft report` shows: of a finished recipe a line for each model, of a sweep one for each trial.

    Scores, their standard errors (`TASK_stderr`) and means are fractions, recovery is in percent of the base's mean.
    source: the path of a recipe or sweep file, or its content. Raises UserError (sdft_ray.errors) where the recipe is
    not finished, or a sweep has no base to compare with.
    """
    environment.for_command()
    from sdft_ray.report import collect, frame
    from sdft_ray.report import sweep as of_sweep
    from sdft_ray.spec.loading import is_sweep
    from sdft_ray.store.storage import Storage
    from sdft_ray.sweep import planning

    given, storage = _given(source), Storage(str(root))
    if not is_sweep(given):
        return frame.as_frame(frame.lines(collect.collect(_load(source, overrides), _name(source), storage)))
    if overrides:
        raise UserError(problem("overrides", "are for recipes", "Change the sweep"))
    return frame.as_frame(frame.lines(of_sweep.collect(planning.load_sweep(given), _name(source), storage)))


def _load(recipe: Source, overrides: Mapping[str, Any] | None) -> Recipe:
    from sdft_ray.spec.loading import dump_yaml, load_recipe
    from sdft_ray.spec.wording import as_plain

    plain = json.loads(json.dumps(overrides or {}, default=as_plain))
    return load_recipe(_given(recipe), [f"{key}={dump_yaml(value)}" for key, value in plain.items()])


def _given(source: Any) -> Any:
    """Return a path as one, with the home directory for `~`; content and None as they are."""
    return Path(source).expanduser() if isinstance(source, str | os.PathLike) else source


def _name(source: Source) -> str:
    return "given" if isinstance(source, Mapping) else str(source)
