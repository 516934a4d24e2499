"""Stage `evaluate`: one model's score on one task.

In: a model directory, and a benchmark task of lm-eval or the recipe's held-out rows. Out: score.json and one line an
item in items.jsonl, for paired comparisons. The same stage serves base, pruned and tuned models; one artifact per
(model, task), so one more task costs only itself. Each runs in a Ray task of its own: lm-eval cannot disturb the
driver, and a cluster works on many at once. vLLM takes long to start, so a pool of actors with it serves all open tasks
of a model, whose items they share (sharded.py, pool.py); each artifact is there when its task is done.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sdft_ray import environment, stages
from sdft_ray.cluster import begin_work, on_this_node
from sdft_ray.core.rows import Row
from sdft_ray.data.benchmarks import offline_task_file
from sdft_ray.errors import UserError, problem
from sdft_ray.results import HELD_OUT, ITEMS, SCORE, Item, Score, read_held_out
from sdft_ray.spec.compute import EngineOptions, Needs
from sdft_ray.spec.evaluation import Evaluate
from sdft_ray.spec.sources import RowSource
from sdft_ray.stages import Work
from sdft_ray.stages.evaluate.harness import Loaded, load_model, run_task
from sdft_ray.stages.evaluate.held_out import evaluate_held_out
from sdft_ray.stages.evaluate.pool import DEATHS
from sdft_ray.stages.evaluate.presets import way_of
from sdft_ray.stages.evaluate.settings import HeldOutSettings, Settings, Source, TaskSettings
from sdft_ray.stages.evaluate.sharded import TASKS_AT_ONCE, Evaluator, Sizes
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
            engine=wanted.engine,
            max_new_tokens=wanted.max_new_tokens,
            answer=each[0].answer if len(each) == 1 else None,
            sources=each if len(each) > 1 else None,
            pass_at=wanted.pass_at,
            offline=wanted.preset == "offline",
        )
        inputs = {numbered("rows", i): stage for i, stage in enumerate(rows)}
        return Stage("evaluate", slug, VERSION, held_out, {"model": model, **inputs})
    way = way_of(wanted.preset, task)
    file = offline_task_file(task) if wanted.preset == "offline" else None
    settings = TaskSettings(
        task=task,
        dtype=wanted.dtype,
        engine=wanted.engine,
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

    plan, settings, model = work.compute.evaluate, work.settings, work.stage.model
    held_out = read_held_out(work.inputs("rows")) if settings.task == HELD_OUT else []
    device = "cuda" if plan.gpus else "cpu"
    # Of a sweep, too: else the trial's own place, which has no CPU.
    takes: dict[str, Any] = {"num_cpus": plan.cpus, "num_gpus": plan.gpus, "scheduling_strategy": "DEFAULT"}
    options = plan.engine_options() if settings.engine == "vllm" else None
    load = functools.partial(_load, work.handle("model"), settings.dtype, plan.batch_size, device, options)
    if options or plan.actors > 1:
        outline = functools.partial(stages.bring_tokenizer, work.storage, model)
        start = functools.partial(start_evaluator, outline, load, takes, Sizes(plan.actors, plan.shard_items))
        with _shared((work.storage.uri, model.id, settings.dtype, settings.engine), start) as evaluator:
            asked = evaluator.evaluate.remote(evaluate, work.stage, work.storage, held_out)
            summary, items = work.result(asked, of_actor=True)
    else:
        task = ray.remote(evaluate).options(name=f"evaluate {settings.task}", **takes)
        summary, items = work.result(task.remote(load, settings, held_out))
    require_number(summary, settings.dtype)
    write_atomically(work.directory / ITEMS, "".join(json.dumps(item.plain()) + "\n" for item in items))
    summary.to_file(work.directory / SCORE, indent=1)
    return cast(Summary, summary)


def require_number(score: Score, dtype: str) -> None:
    """Raise UserError for a score that is no number."""
    if not math.isfinite(score.value + (score.bits_per_byte or 0)):
        raise UserError(problem("evaluate.dtype", f"{dtype} gives logits of NaN", "Set float32"))


def start_evaluator(
    outline: Callable[[], Path], load: Callable[[], Loaded], takes: dict[str, Any], sizes: Sizes
) -> Any:
    """Start what takes a model through tasks, on this node: there it ends with this process."""
    import ray

    options = {"num_cpus": 0, "max_restarts": DEATHS, "max_task_retries": DEATHS, "max_concurrency": TASKS_AT_ONCE}
    actor = ray.remote(Evaluator).options(**options, scheduling_strategy=on_this_node())
    return actor.remote(outline, load, takes, sizes)


_ACTORS: dict[tuple[str, ...], tuple[Any, int]] = {}
"""Those that stages of this process share, each with how many do."""
_LOCK = threading.Lock()


@contextlib.contextmanager
def _shared(key: tuple[str, ...], start: Callable[[], Any]) -> Iterator[Any]:
    """Hold the actor of a key, which the first of those that hold it at once starts, and the last ends."""
    with _LOCK:
        actor, holders = _ACTORS.get(key) or (start(), 0)
        _ACTORS[key] = actor, holders + 1
    try:
        yield actor
    finally:
        with _LOCK:
            actor, holders = _ACTORS.pop(key)
            if holders > 1:
                _ACTORS[key] = actor, holders - 1
            else:
                import ray

                ray.kill(actor)


def _load(model: Callable[[], Path], dtype: str, batch_size: int, device: str, options: EngineOptions | None) -> Loaded:
    """Return the model in a directory, in vLLM with these options or without any in transformers; runs in a worker."""
    begin_work()
    if options is None:
        return load_model(str(model()), dtype, batch_size, device)
    from sdft_ray.stages.evaluate.by_engine import load_engine

    return load_engine(str(model()), dtype, batch_size, device, options)


def evaluate(load: Callable[[], Loaded], settings: Settings, held_out: list[Row]) -> tuple[Summary, Sequence[Item]]:
    """Return the score, with the seconds that it took, and the items of one task; runs in a Ray worker."""
    begun = time.monotonic()
    if settings.offline:
        environment.go_offline()
    model = load()
    score: Score
    items: Sequence[Item]
    if isinstance(settings, HeldOutSettings):
        sources = settings.sources or [Source(name="", answer=str(settings.answer))]
        score, items = evaluate_held_out(model, held_out, sources, settings.max_new_tokens, settings.pass_at)
    else:
        score, items = run_task(model.lm, settings)
    return Summary(**score.model_dump(exclude_unset=True), seconds=round(time.monotonic() - begun, 2)), items
