"""Stage `evaluate`: one model's score on one task.

In: a model directory, and a benchmark task of lm-eval or the recipe's held-out rows. Out: score.json and one line an
item in items.jsonl, for paired comparisons. The same stage serves base, pruned and tuned models; one artifact per
(model, task), so one more task costs only itself. Each runs in a Ray task of its own: lm-eval cannot disturb the
driver, and a cluster works on many at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from sdft_ray import environment, stages
from sdft_ray.cluster import use_assigned_cores
from sdft_ray.core.rows import Row
from sdft_ray.data.benchmarks import offline_task_file
from sdft_ray.results import HELD_OUT, ITEMS, SCORE, Item, Score, read_held_out
from sdft_ray.spec.compute import Needs
from sdft_ray.spec.recipe import Evaluate
from sdft_ray.spec.sources import RowSource
from sdft_ray.stages import Work
from sdft_ray.stages.evaluate.harness import load_model, run_task
from sdft_ray.stages.evaluate.held_out import evaluate_held_out
from sdft_ray.stages.evaluate.presets import way_of
from sdft_ray.stages.evaluate.settings import HeldOutSettings, Settings, Source, TaskSettings
from sdft_ray.store.files import hash_source, write_atomically
from sdft_ray.store.identity import Stage, numbered, slugify

VERSION, NEEDS, UNIT = 2, Needs("evaluate"), "parts"


class Summary(Score, stages.Timed):
    """The score of a model on a task."""


def stage(
    wanted: Evaluate, task: str, name: str, model: Stage, rows: Sequence[Stage], sources: Mapping[str, RowSource]
) -> Stage[Settings]:
    """Return the stage that takes the model of this name through a task; rows: those of each source.

    Held-out rows are read from each source, not from the mixture: whatever its weights, the base is evaluated once.
    """
    slug = slugify(f"{task}-{name}")
    if task == HELD_OUT:
        each = tuple(Source(name=name, answer=source.answer) for name, source in sources.items())
        held_out = HeldOutSettings(
            dtype=wanted.dtype,
            max_new_tokens=wanted.max_new_tokens,
            answer=each[0].answer if len(each) == 1 else None,
            sources=each if len(each) > 1 else None,
        )
        inputs = {numbered("rows", i): stage for i, stage in enumerate(rows)}
        return Stage("evaluate", slug, VERSION, held_out, {"model": model, **inputs})
    way = way_of(wanted.preset, task)
    file = offline_task_file(task) if wanted.preset == "offline" else None
    settings = TaskSettings(
        task=task,
        dtype=wanted.dtype,
        metric=way.metric,
        shots=way.shots,
        revision=way.revision,
        limit=wanted.limit,
        chat_template=wanted.chat_template,
        sha256=hash_source(file) if file else None,
        file=str(file) if file else None,
    )
    return Stage("evaluate", slug, VERSION, settings, {"model": model})


def build(work: Work[Settings]) -> Summary:
    """Write score.json and items.jsonl."""
    import ray

    plan = work.compute.evaluate
    held_out = read_held_out(work.inputs("rows")) if work.settings.task == HELD_OUT else []
    summary, items = work.result(
        ray.remote(evaluate)
        .options(
            num_cpus=plan.cpus,
            num_gpus=plan.gpus,
            name=f"evaluate {work.settings.task}",
            scheduling_strategy="DEFAULT",  # of a sweep, too: else the trial's own place, which has no CPU
        )
        .remote(
            work.handle("model"),
            work.settings,
            held_out,
            plan.batch_size,
            "cuda" if plan.gpus else "cpu",
        )
    )
    write_atomically(work.directory / ITEMS, "".join(json.dumps(item.plain()) + "\n" for item in items))
    write_atomically(work.directory / SCORE, json.dumps(summary.plain(), indent=1) + "\n")
    return cast(Summary, summary)


def evaluate(
    model: Callable[[], Path],
    settings: Settings,
    held_out: list[Row],
    batch_size: int,
    device: str,
) -> tuple[Summary, Sequence[Item]]:
    """Return the score, with the seconds that it took, and the items of one task; runs in a Ray worker."""
    begun = time.monotonic()
    if isinstance(settings, HeldOutSettings) or settings.file:
        environment.go_offline()
    from sdft_ray.progress import quiet_transformers

    quiet_transformers()
    use_assigned_cores()
    lm = load_model(str(model()), settings.dtype, batch_size, device)
    score: Score
    items: Sequence[Item]
    if isinstance(settings, HeldOutSettings):
        sources = settings.sources or [Source(name="", answer=str(settings.answer))]
        score, items = evaluate_held_out(lm, held_out, sources, settings.max_new_tokens, batch_size)
    else:
        score, items = run_task(lm, settings)
    return Summary(**score.model_dump(exclude_unset=True), seconds=round(time.monotonic() - begun, 2)), items
