"""Gathers what a report shows from finished artifacts.

In: a recipe's plan and the storage. Out: one plain structure that the terminal table, `--json` and the HTML page are
all views of, so that they cannot disagree. Nothing is measured here but FLOPs, which are counted, not timed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray import pipeline
from sdft_ray.core.recovery import Score, mean_score, paired_differences, recovery, recovery_over_chance
from sdft_ray.data.readers import read_json
from sdft_ray.errors import UserError, problem
from sdft_ray.spec.recipe import Recipe
from sdft_ray.stages.distill import REASONS
from sdft_ray.stages.evaluate import read_items
from sdft_ray.stages.rows import read_split
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

_SCORE_FIELDS = ("metric", "value", "stderr", "n", "chance", "limited")
_MORE_FIELDS = ("bits_per_byte", "other_metrics")
FLOPS_TOKENS = 256  # the stated length at which forward FLOPs are counted


def collect(recipe: Recipe, name: str, storage: Storage) -> dict[str, Any]:
    """Return everything a report of a finished recipe shows; raises UserError where a stage is not there yet."""
    plan = pipeline.stages(recipe)
    missing, _ = pipeline.survey(plan, storage)
    if missing:
        names = ", ".join(dict.fromkeys(stage.name for stage in missing))
        raise UserError(problem(name, f"is not finished (missing: {names})", f"Do: sdft run {name}"))
    exams = exams_of(plan)
    return {
        "recipe": name,
        "models": _models(plan, storage),
        "comparison": compare_arms({arm: [exams[arm]] for arm in recipe.arms.names}, storage),
        "flops_tokens": FLOPS_TOKENS,
        "settings": recipe.model_dump(mode="json"),
        "artifacts": [{"stage": stage.name, "id": stage.id, "directory": storage.where(stage)} for stage in plan],
        **_details(plan, exams, storage),
    }


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a report that `sdft report --json` prints."""
    return {key: report[key] for key in ("recipe", "flops_tokens", "models", "comparison", "speed", "merges", "drafts")}


def _models(plan: Sequence[Stage], storage: Storage) -> list[dict[str, Any]]:
    """Return one entry a model of a plan, the base first."""
    exams = exams_of(plan)
    base = scores_of(exams["base"], storage)
    return [
        {
            "model": who,
            **describe_model(stage, exams[who], base, storage),
            **count_cost(storage.files(stage, "config.json")),
        }
        for who, stage in pipeline.models(plan).items()
    ]


def exams_of(plan: Sequence[Stage]) -> dict[str, dict[str, Stage]]:
    """Return the exams of each model of a plan, by its name and the task's."""
    found: dict[str, dict[str, Stage]] = {}
    named = pipeline.models(plan)
    for stage in plan:
        if stage.name == "evaluate":
            who = next(name for name, examined in named.items() if examined is stage.inputs["model"])
            found.setdefault(who, {})[stage.settings["task"]] = stage
    return found


def scores_of(exams: Mapping[str, Stage], storage: Storage) -> list[Score]:
    """Return what a model scored in each of its exams."""
    summaries = {task: storage.manifest(stage)["summary"] for task, stage in exams.items()}
    return [Score(task, **{field: found[field] for field in _SCORE_FIELDS}) for task, found in summaries.items()]


def describe_model(stage: Stage, exams: Mapping[str, Stage], base: Sequence[Score], storage: Storage) -> dict[str, Any]:
    """Return a model's scores, their mean, and how much of the base's that is."""
    mine = scores_of(exams, storage)
    tasks = {score.task: {field: getattr(score, field) for field in _SCORE_FIELDS} for score in mine}
    for task, exam in exams.items():
        found = storage.manifest(exam)["summary"]
        tasks[task] |= {field: found[field] for field in _MORE_FIELDS if field in found}
    return {
        "id": stage.id,
        "tasks": tasks,
        "mean": mean_score(mine),
        "recovery": recovery(mine, base),
        "recovery_over_chance": recovery_over_chance(mine, base),
        "limited": any(score.limited for score in mine),
    }


def compare_arms(exams: Mapping[str, Sequence[Mapping[str, Stage]]], storage: Storage) -> dict[str, Any] | None:
    """Return how much better the distilled arm does than sft on the same items; None where there is one arm only.

    exams: of each arm, those of one model or of several that differ in their seeds; an item counts as their mean.
    """
    if not (exams.get("distilled") and exams.get("sft")):
        return None
    each, mean = paired_differences(_item_values(exams["distilled"], storage), _item_values(exams["sft"], storage))
    return {
        "first": "distilled",
        "second": "sft",
        "tasks": {task: dataclasses.asdict(found) for task, found in each.items()},
        "mean": dataclasses.asdict(mean),
    }


def _item_values(models: Sequence[Mapping[str, Stage]], storage: Storage) -> dict[str, list[float]]:
    """Return the value of every item of every task, as the mean over models."""
    found: dict[str, list[float]] = {}
    for task in models[0]:
        each = [read_items(storage.files(exams[task], "items.jsonl")) for exams in models]
        assert all([i["id"] for i in items] == [i["id"] for i in each[0]] for items in each), f"{task}: other items"
        found[task] = [sum(item["value"] for item in same) / len(same) for same in zip(*each, strict=True)]
    return found


@functools.cache
def count_cost(directory: Path, tokens: int = FLOPS_TOKENS) -> dict[str, float]:
    """Return a model's parameters and the forward FLOPs of one token at a length of `tokens`.

    Counted by torch on the meta device, where nothing is computed, with eager attention: the counter has no formula
    for the CPU's flash attention.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        # A ready-made mask: without one transformers looks at position values, which a meta tensor does not have.
        mask = torch.zeros(1, 1, tokens, tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return {"parameters": int(model.num_parameters()), "flops_per_token": counter.get_total_flops() / tokens}


def _details(plan: Sequence[Stage], exams: Mapping[str, Mapping[str, Stage]], storage: Storage) -> dict[str, Any]:
    """Return what the page shows beside the table: distances, spans, losses, selection, examples, wall times."""
    found: dict[str, Any] = {"losses": {}, "losses_of_spans": None, "selection": None, "examples": [], "seconds": {}}
    found |= {"nll": None, "speed": None, "merges": {}, "drafts": {}}

    @functools.cache  # merges have their parents in common
    def items(who: str) -> dict[str, list[float]]:
        return _item_values([exams[who]], storage)

    for stage in plan:
        if stage.location is None:
            manifest = storage.manifest(stage)
            seconds = found["seconds"]
            seconds[stage.name] = seconds.get(stage.name, 0.0) + manifest["provenance"]["wall_seconds"]
            found["provenance"] = manifest["provenance"]
        match stage.name:
            case "score":
                found["distances"] = _read(storage, stage, "distances.json")
            case "loss":
                found["losses_of_spans"] = manifest["summary"]
            case "cut":
                found["cut"] = manifest["summary"]
            case "speed":
                found["speed"] = manifest["summary"]
            case "merge":
                name, parents = stage.where["model"], [parent.where["model"] for parent in stage.inputs.values()]
                others = [other for other in (*parents, "together") if other in exams]
                against = {o: dataclasses.asdict(paired_differences(items(name), items(o))[1]) for o in others}
                found["merges"][name] = {"models": parents, "against": against, **manifest["summary"]}
            case "draft":
                found["drafts"][stage.where["draft"]] = manifest["summary"]
            case "distill" if found["selection"] is None:  # of a recipe's own rows, which are the first
                found["selection"] = manifest["summary"]
                found["examples"] = _examples(storage.files(stage, "train.parquet"))
            case "nll" if found["nll"] is None:  # of the same rows
                found["nll"] = manifest["summary"]
            case "train":
                losses = _read(storage, stage, "losses.json")
                found["losses"][stage.where["model"]] = {"curve": losses, **manifest["summary"]}
    return found


def _read(storage: Storage, stage: Stage, name: str) -> Any:
    return read_json(storage.files(stage, name) / name)


def _examples(place: Path, each: int = 3) -> list[dict[str, Any]]:
    """Return a few rows for every reason, reference and rewrite side by side."""
    rows = read_split(place, "train")
    return [row for reason in REASONS for row in [r for r in rows if r["reason"] == reason][:each]]
