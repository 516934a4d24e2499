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
from sdft_ray.core.selection import REASONS
from sdft_ray.data.readers import read_json
from sdft_ray.errors import UserError, problem
from sdft_ray.pipeline import Chain
from sdft_ray.results import DISTANCES, HISTORY, ITEMS, read_history, read_items, read_split
from sdft_ray.spec.recipe import Recipe
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

_SCORE_FIELDS = ("metric", "value", "stderr", "n", "chance", "limited")
_MORE_FIELDS = ("bits_per_byte", "other_metrics")
FLOPS_TOKENS = 256  # the stated length at which forward FLOPs are counted


def collect(recipe: Recipe, name: str, storage: Storage) -> dict[str, Any]:
    """Return everything a report of a finished recipe shows; raises UserError where a stage is not there yet."""
    chain = pipeline.chain(recipe)
    missing, _ = pipeline.survey(chain.in_order, storage)
    if missing:
        names = ", ".join(dict.fromkeys(stage.name for stage in missing))
        raise UserError(problem(name, f"is not finished (missing: {names})", f"Do: sdft run {name}"))
    stages = chain.in_order
    return {
        "recipe": name,
        "models": _models(chain, storage),
        "comparison": compare_arms({arm: [chain.tasks_of(arm)] for arm in recipe.arms.names}, storage),
        "flops_tokens": FLOPS_TOKENS,
        "settings": recipe.model_dump(mode="json"),
        "artifacts": [{"stage": stage.name, "id": stage.id, "directory": storage.where(stage)} for stage in stages],
        **_times(stages, storage),
        **_details(chain, storage),
    }


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a report that `sdft report --json` prints."""
    return {key: report[key] for key in ("recipe", "flops_tokens", "models", "comparison", "speed", "merges", "drafts")}


def _models(chain: Chain, storage: Storage) -> list[dict[str, Any]]:
    """Return one entry a model of a chain, the base first."""
    base = scores_of(chain.tasks_of("base"), storage)
    return [
        {
            "model": name,
            **describe_model(stage, chain.tasks_of(name), base, storage),
            **count_cost(storage.files(stage, "config.json")),
        }
        for name, stage in chain.models.items()
    ]


def scores_of(evaluations: Mapping[str, Stage], storage: Storage) -> list[Score]:
    """Return what a model scored in each of its evaluations."""
    summaries = {task: storage.manifest(stage)["summary"] for task, stage in evaluations.items()}
    return [Score(task, **{field: found[field] for field in _SCORE_FIELDS}) for task, found in summaries.items()]


def describe_model(
    stage: Stage, evaluations: Mapping[str, Stage], base: Sequence[Score], storage: Storage
) -> dict[str, Any]:
    """Return a model's scores, their mean, and how much of the base's that is."""
    mine = scores_of(evaluations, storage)
    tasks = {score.task: {field: getattr(score, field) for field in _SCORE_FIELDS} for score in mine}
    for task, evaluation in evaluations.items():
        found = storage.manifest(evaluation)["summary"]
        tasks[task] |= {field: found[field] for field in _MORE_FIELDS if field in found}
    return {
        "id": stage.id,
        "tasks": tasks,
        "mean": mean_score(mine),
        "recovery": recovery(mine, base),
        "recovery_over_chance": recovery_over_chance(mine, base),
        "limited": any(score.limited for score in mine),
    }


def compare_arms(evaluations: Mapping[str, Sequence[Mapping[str, Stage]]], storage: Storage) -> dict[str, Any] | None:
    """Return how much better the distilled arm does than sft on the same items; None where there is one arm only.

    evaluations: of each arm, those of one model or of several that differ in their seeds; an item counts as their mean.
    """
    if not (evaluations.get("distilled") and evaluations.get("sft")):
        return None
    each, mean = paired_differences(
        _item_values(evaluations["distilled"], storage), _item_values(evaluations["sft"], storage)
    )
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
        each = [read_items(storage.files(evaluations[task], ITEMS)) for evaluations in models]
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


def _times(stages: Sequence[Stage[Any]], storage: Storage) -> dict[str, Any]:
    """Return the wall seconds of each kind of stage, and the provenance of the last."""
    seconds: dict[str, float] = {}
    provenance: dict[str, Any] = {}
    for stage in stages:
        if stage.location is None:
            provenance = storage.manifest(stage)["provenance"]
            seconds[stage.name] = seconds.get(stage.name, 0.0) + provenance["wall_seconds"]
    return {"seconds": seconds, "provenance": provenance}


def _details(chain: Chain, storage: Storage) -> dict[str, Any]:
    """Return what the page shows beside the table: distances, spans, losses, selection, examples."""

    def summary(stage: Stage[Any] | None) -> dict[str, Any] | None:
        return None if stage is None else storage.manifest(stage)["summary"]

    distilled = chain.distilled
    return {
        "distances": _read(storage, chain.score, DISTANCES),
        "losses_of_spans": summary(chain.loss),
        "cut": summary(chain.pruned),
        "speed": summary(chain.speed),
        "selection": summary(distilled),
        "examples": _examples(storage.files(distilled, "train.parquet")) if distilled else [],
        "nll": summary(chain.nll[0]) if chain.nll else None,
        "losses": {
            name: {"curve": read_history(storage.files(stage, HISTORY)), **storage.manifest(stage)["summary"]}
            for name, stage in chain.trained.items()
        },
        "merges": _merges(chain, storage),
        "drafts": {name: summary(stage) for name, stage in chain.drafts.items()},
    }


def _merges(chain: Chain, storage: Storage) -> dict[str, Any]:
    """Return what each merged model gained over those that it was merged from."""

    @functools.cache  # merges have their parents in common
    def items(name: str) -> dict[str, list[float]]:
        return _item_values([chain.tasks_of(name)], storage)

    found = {}
    for name, stage in chain.merged.items():
        parents = list(stage.settings.parents)
        others = [other for other in (*parents, "together") if other in chain.models]
        against = {o: dataclasses.asdict(paired_differences(items(name), items(o))[1]) for o in others}
        found[name] = {"models": parents, "against": against, **storage.manifest(stage)["summary"]}
    return found


def _read(storage: Storage, stage: Stage, name: str) -> Any:
    return read_json(storage.files(stage, name) / name)


def _examples(place: Path, each: int = 3) -> list[dict[str, Any]]:
    """Return a few rows for every reason, reference and rewrite side by side."""
    rows = read_split(place, "train")
    return [row for reason in REASONS for row in [r for r in rows if r["reason"] == reason][:each]]
