"""How benchmark tasks are taken: shots, metric and pinned data of each preset, and how many items it has."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdft_ray.errors import UserError, listed, nearest, problem
from sdft_ray.results import HELD_OUT


@dataclasses.dataclass(frozen=True)
class Way:
    """How a benchmark task is taken."""

    metric: str | None
    """None: the first of the task's that is higher for a better model."""
    shots: int = 0
    revision: str | None = None
    """Commit of the task's dataset on the hub; without one the harness takes the newest."""
    items: int | None = None
    """The items of the split that is evaluated, at that commit; None where it is not known here."""
    parts: int = 1
    """Tasks of a group: a limit is of each."""

    def count(self, limit: int | None) -> int | None:
        """Return how many items are evaluated under a limit, at most; None where that is not known."""
        known = [items for items in (self.items, limit and limit * self.parts) if items]
        return min(known, default=None)


_GSM8K = "e53f048856ff4f594e959d75785d2c2d37b678ee"
# OpenLLM Leaderboard v1: shots and metrics of its published set-up. truthfulqa_mc2 alone: the bare tag also generates.
OPENLLM_V1 = {
    "arc_challenge": Way("acc_norm,none", 25, "210d026faf9955653af8916fad021475a3f00453", 1_172),
    "hellaswag": Way("acc_norm,none", 10, "218ec52e09a7e7462a5400043bb9a69a41d06b76", 10_042),
    "truthfulqa_mc2": Way("acc,none", 0, "741b8276f2d1982aa3d5b832d3ee81ed3b896490", 817),
    "mmlu": Way("acc,none", 5, "c30699e8356da336a370243923dbaf21066bb9fe", 14_042, 57),
    "winogrande": Way("acc,none", 5, "01e74176c63542e6b0bcb004dcdea22d94fb67b5", 1_267),
    "gsm8k": Way("exact_match,strict-match", 5, _GSM8K, 1_319),
}


# Answers that are written: these break first after pruning. Shots and metrics are those that the tasks' makers report.
GENERATIVE = {
    "gsm8k_cot": Way("exact_match,flexible-extract", 8, _GSM8K, 1_319),
    "ifeval": Way("prompt_level_strict_acc,none", 0, "966cd89545d6b6acfd7638bc708b98261ca58e84", 541),
    "mmlu_pro": Way("exact_match,custom-extract", 5, "b189ec765aa7ed75c8acfea42df31fdae71f97be", 12_032, 14),
}


# Zero-shot, because the embedded files have no training split to take examples from; the task gsm8k_cot has its own.
OFFLINE = {
    "arc_easy": Way("acc,none"),
    "arc_challenge": Way("acc_norm,none"),
    "sciq": Way("acc,none"),
    "piqa": Way("acc,none"),
    "hellaswag": Way("acc_norm,none"),
    "gsm8k_cot": Way("exact_match,flexible-extract", 8),
}


# Where the harness keeps these tasks. Its whole index costs 12 seconds of CPU in every worker, one folder nothing.
FOLDERS = {
    **{task: task for task in ("gsm8k", "hellaswag", "ifeval", "mmlu_pro", "piqa", "sciq", "winogrande")},
    **{"arc_challenge": "arc", "arc_easy": "arc", "gsm8k_cot": "gsm8k"},
    **{"mmlu": "mmlu/default", "truthfulqa_mc2": "truthfulqa"},
}


_IFEVAL = ("immutabledict", "langdetect")  # that it imports


def way_of(preset: str, task: str) -> Way:
    """Return how a task is taken under a preset; raises UserError for a task that the preset does not have."""
    known = {"offline": OFFLINE, "openllm_v1": OPENLLM_V1, "generative": GENERATIVE}.get(preset)
    if known is None:
        return Way(None)  # any task of the harness
    if task not in known:
        do = nearest(task, [*known, HELD_OUT])
        raise UserError(problem("evaluate.tasks", f"{task} is not in the {preset} preset", do))
    return known[task]


def require_usable(preset: str, tasks: Iterable[str]) -> None:
    """Raise UserError for a task that the harness does not have, or not without packages that are not here."""
    missing = [name for name in _IFEVAL if importlib.util.find_spec(name) is None]
    if missing and "ifeval" in tasks:
        what = f"ifeval needs {' and '.join(missing)}, here and on every node"
        raise UserError(problem("evaluate.tasks", what, "Do: pip install 'lm_eval[ifeval]'"))
    if preset == "harness":
        _require_known(tasks)


def _require_known(tasks: Iterable[str]) -> None:
    """Raise UserError for a task that is not in the harness's index, which takes seconds to read, or that has no score
    there."""
    index, wrong = task_manager().task_index, []
    for task in tasks:
        if task == HELD_OUT:
            continue
        if task not in index:
            wrong.append((f"lm-eval has no task {task}", nearest(task, index)))
        elif parts := _parts_without_score(index[task]):
            wrong.append((f"{task} stands for several tasks, without a score of all", f"Give these: {listed(parts)}"))
        elif (index[task].cfg or {}).get("output_type") == "loglikelihood_rolling":
            what = f"{task} measures perplexity alone, and a score is higher for a better model"
            wrong.append((what, "Take another task; evaluate.retention measures likelihoods of texts"))
    if wrong:
        raise UserError(*(problem("evaluate.tasks", what, do) for what, do in wrong))


def _parts_without_score(entry: Any) -> list[str]:
    """Return the tasks of a tag, or of a group that the harness does not aggregate; none where there is a score."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP" or entry.cfg.get("aggregate_metric_list"):
        return []
    return [str(part.get("task")) if isinstance(part, dict) else part for part in entry.cfg.get("task", ())]


@functools.cache
def task_manager(folder: str | None = None) -> Any:
    """Return the harness's index of all its tasks, or of those in one of its folders."""
    from lm_eval import tasks

    if folder is None:
        return tasks.TaskManager()
    return tasks.TaskManager(include_defaults=False, include_path=str(Path(tasks.__file__).parent / folder))
