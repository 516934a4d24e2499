"""A benchmark task of lm-eval: run with our model, read as one score and a value for each item."""

from __future__ import annotations

import functools
import json
import math
import numbers
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from sdft_ray.data.benchmarks import read_documents
from sdft_ray.errors import UserError, problem
from sdft_ray.models.exporting import load_exported
from sdft_ray.models.generation import Answer, generate, plain_generation
from sdft_ray.results import Item, Score
from sdft_ray.stages.evaluate.likelihoods import score_requests
from sdft_ray.stages.evaluate.presets import FOLDERS, task_manager
from sdft_ray.stages.evaluate.scores import make_score
from sdft_ray.stages.evaluate.settings import TaskSettings
from sdft_ray.store.record import Record


class Loaded(NamedTuple):
    """A model that can be taken through tasks."""

    lm: Any
    """As the harness asks it."""
    tokenizer: Any
    answer: Answer
    """Returns the continuations of prompts, each up to where a response ends."""
    score: Callable[[Sequence[tuple[list[int], list[int]]]], list[tuple[float, bool]]]
    """Returns (log-likelihood, is greedy) of each (context, continuation), both token ids."""


class _Size(Record):
    effective: int
    original: int


class Reported(Record):
    """What the harness reports of a task, or of each task of a group."""

    results: dict[str, dict[str, Any]]
    """By task or group, and by metric."""
    samples: dict[str, list[dict[str, Any]]]
    higher_is_better: dict[str, dict[str, bool | None]]
    sizes: dict[str, _Size] = Field(alias="n-samples")


def ask_harness(lm: Any, settings: TaskSettings) -> Reported:
    """Return what the harness reports of a task, with all samples.

    By the steps of `lm_eval.simple_evaluate`, but for its description of this machine: that asks pip, compilers and
    drivers, for seconds a task.
    """
    import lm_eval
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    manager = task_manager(FOLDERS.get(settings.task))
    with tempfile.TemporaryDirectory() as folder:
        task = settings.task
        if settings.file:
            task = write_task(manager, task, _from_file(Path(settings.file), Path(folder)), Path(folder))
        elif settings.revision:
            task = write_task(manager, task, {"dataset_kwargs": {"revision": settings.revision}}, Path(folder))
        loaded = manager.load([task])
        for part in loaded["tasks"].values():
            if part.get_config("num_fewshot") != 0:  # a task that is defined without examples stays so
                part.set_config(key="num_fewshot", value=settings.shots)
            part.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        output = lm_eval.evaluate(
            lm,
            loaded,
            limit=settings.limit,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=True,
            log_samples=True,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    return Reported.model_validate(output)


def run_task(lm: Any, settings: TaskSettings) -> tuple[Score, list[Item]]:
    """Return the score and the items of a task."""
    output = ask_harness(lm, settings)
    results = output.results[settings.task]
    samples_of_all = [sample for samples in output.samples.values() for sample in samples]
    metric = settings.metric
    if metric is None:
        better = output.higher_is_better.get(settings.task, {})
        metric = choose_metric(settings.task, results, better, samples_of_all)
    name = metric.partition(",")[0]
    samples = [sample for sample in samples_of_all if _of_filter(sample, metric)]
    items = [
        Item(id=sample["doc_hash"], task=task, value=float(sample[name]))
        for task, group in output.samples.items()
        for sample in group
        if _of_filter(sample, metric) and name in sample
    ]
    others = {
        key: float(value)  # a correlation of answers that are all the same is no number
        for key, value in results.items()
        if "," in key and "_stderr" not in key and key != metric
        if isinstance(value, numbers.Real) and math.isfinite(value)
    }
    # The harness's own aggregate is the value: a group may weigh its tasks, a metric need not be a mean of items.
    score = make_score(
        name,
        [item.value for item in items],
        chance=sum(map(_chance, samples)) / len(samples),
        limited=any(output.sizes[task].effective < output.sizes[task].original for task in output.samples),
        value=float(results[metric]),
        other_metrics=others,
    )
    return score, items


def choose_metric(
    task: str, results: Iterable[str], higher_is_better: Mapping[str, bool | None], samples: Sequence[Mapping[str, Any]]
) -> str:
    """Return a task's first metric, as `name,filter`, that is higher for a better model and a number for each item:
    means, recovery and paired intervals are of such ones. Raises UserError for a task without one."""
    for key in results:
        name = key.partition(",")[0]
        values = [sample.get(name) for sample in samples if _of_filter(sample, key)]
        if higher_is_better.get(name) and values and all(isinstance(value, numbers.Real) for value in values):
            return key
    what = f"{task} has no metric that is higher for a better model and known for each item"
    raise UserError(problem("evaluate.tasks", what, "Take another task"))


def _chance(sample: Mapping[str, Any]) -> float:
    """Return what guessing scores on an item: by its number of choices, 0 where the answer is generated."""
    if targets := sample["doc"].get("mc2_targets"):  # TruthfulQA scores the probability of all true choices together
        labels = targets["labels"]
        return sum(labels) / len(labels)
    choices = len(sample["arguments"])
    return 1 / choices if choices > 1 else 0.0


def write_task(manager: Any, task: str, changes: Mapping[str, Any], folder: Path) -> str:
    """Return the path of a task file that is the harness's own task, or each task of its group, with some changes."""
    import yaml

    path = folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump({"include": str(manager.task_index[task].yaml_path), **changes}))
    return str(path)


def _from_file(file: Path, folder: Path) -> dict[str, Any]:
    """Return what makes a task read a local copy of its documents; folder: where one in its form can be written."""
    kwargs: dict[str, Any] = {"data_files": {"validation": str(file)}}
    if is_lines := file.suffix != ".arrow":
        plain = folder / "documents.jsonl"
        plain.write_text("".join(json.dumps(each) + "\n" for each in read_documents(file)), encoding="utf-8")
        kwargs = {"data_files": {"validation": str(plain)}, "cache_dir": str(folder)}  # else each run leaves a copy
    return {
        "dataset_path": "json" if is_lines else "arrow",
        "dataset_name": None,
        "dataset_kwargs": kwargs,
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }


def _of_filter(sample: Mapping[str, Any], metric: str) -> bool:
    return str(sample.get("filter", "none")) == metric.partition(",")[2]


def load_model(model: str, dtype: str, batch_size: int, device: str) -> Loaded:
    """Return a model in transformers."""
    from lm_eval.models.huggingface import HFLM

    class SharedContextLM(HFLM):
        """The harness's model, reading each item's context once for all of its choices."""

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            return score_requests(self.model, [(r[1], r[2]) for r in requests], self.max_length, batch_size)

    # On a CPU the context is the cost. A GPU is fed better by the harness's own large batches.
    kind = SharedContextLM if device == "cpu" else HFLM
    exported = load_exported(Path(model), dtype)
    given = exported.to(device) if exported else model
    lm = kind(pretrained=given, tokenizer=model, dtype=dtype, device=device, batch_size=batch_size)
    lm.model.generation_config = plain_generation(lm.model, lm.tokenizer)  # generating tasks of the harness take it
    return in_transformers(lm, batch_size)


def in_transformers(lm: Any, batch_size: int) -> Loaded:
    """Return a model that the harness has loaded in transformers."""
    return Loaded(
        lm,
        lm.tokenizer,
        functools.partial(generate, lm.model, lm.tokenizer, batch_size=batch_size),
        functools.partial(score_requests, lm.model, max_length=lm.max_length, batch_size=batch_size),
    )
