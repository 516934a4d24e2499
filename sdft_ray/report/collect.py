"""Gathers what the report of a recipe shows from finished artifacts.

In: a recipe's plan and the storage. Out: a `Report`. Nothing is measured here but FLOPs, which are counted, not timed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray import pipeline
from sdft_ray.core.recovery import mean_score, paired_differences, recovery, recovery_over_chance
from sdft_ray.core.retention import Measured, read_lines
from sdft_ray.core.selection import REASONS
from sdft_ray.errors import UserError, problem
from sdft_ray.generated import Habits, HeldOutItem, Sampled, describe, describe_sampled
from sdft_ray.pipeline import Chain
from sdft_ray.report.entries import (
    Artifact,
    Comparison,
    Cost,
    Details,
    Draft,
    Example,
    Exported,
    Finals,
    Greedy,
    Losses,
    Merged,
    MergeEntry,
    ModelEntry,
    Nll,
    Pruned,
    Quality,
    Report,
    Retention,
    RetentionComparison,
    Selection,
    SourceEntry,
    Speed,
    Trained,
    Training,
)
from sdft_ray.report.sweep_entries import SourceResult
from sdft_ray.results import (
    DISTANCES,
    HELD_OUT,
    HISTORY,
    ITEMS,
    RETENTION,
    Distances,
    read_held_out,
    read_history,
    read_items,
    training_batches,
)
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.training import ARMS
from sdft_ray.stages import evaluate, mix, retention
from sdft_ray.stages.evaluate.scores import item_values
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

Evaluations = Mapping[str, Stage[evaluate.Settings]]
"""Of a model, by task."""
FLOPS_TOKENS = 256  # the stated length at which forward FLOPs are counted


def collect(recipe: Recipe, name: str, storage: Storage) -> Report:
    """Return everything a report of a finished recipe shows; raises UserError where a stage is not there yet."""
    chain = pipeline.chain(recipe)
    missing, _ = pipeline.survey(chain.in_order, storage)
    if missing:
        names = ", ".join(dict.fromkeys(stage.name for stage in missing))
        raise UserError(
            problem(name, f"is not finished under {storage.uri} (missing: {names})", f"Do: sdft run {name}")
        )
    base = chain.tasks_of("base")
    generated = describe_generated(recipe, chain, storage)
    sampled = _describe_sampled(recipe, chain, storage)
    models = tuple(
        ModelEntry(
            model=name,
            id=stage.id,
            quality=describe_quality(chain.tasks_of(name), base, storage),
            cost=count_cost(storage.files(stage, "config.json")),
            **describe_retention(chain.retention.get(name), storage),
            **({"generated": generated[name]} if generated else {}),
            **({"pass_at": sampled[name]} if sampled else {}),
        )
        for name, stage in chain.models.items()
    )
    sources = _describe_sources(chain, models, storage)
    compared = compare_arms({arm: [chain.tasks_of(arm)] for arm in recipe.arms.names}, storage)
    further = [*compared[1:], *_compare_exported(chain, storage)]
    exports = {name: Exported.of(stage, storage) for name, stage in chain.exported.items()}
    return Report(
        recipe=name,
        flops_tokens=FLOPS_TOKENS,
        models=models,
        comparison=compared[0] if compared else None,
        **_compare_retention(recipe, chain, storage),
        speed=Speed.of(chain.speed, storage) if chain.speed else None,
        merges=_describe_merges(chain, storage),
        drafts={name: Draft.of(stage, storage) for name, stage in chain.drafts.items()},
        **({"sources": sources} if sources else {}),
        **({"exports": exports} if exports else {}),
        **({"further_comparisons": tuple(further)} if further else {}),
        details=_describe_details(recipe, chain, storage),
    )


def describe_quality(evaluations: Evaluations, base: Evaluations, storage: Storage) -> Quality:
    """Return a model's scores, their mean, and how much of the base's that is."""
    scores, of_base = _read_scores(evaluations, storage), list(_read_scores(base, storage).values())
    mine = list(scores.values())
    return Quality(
        tasks=scores,
        mean=mean_score(mine),
        recovery=recovery(mine, of_base),
        recovery_over_chance=recovery_over_chance(mine, of_base),
        limited=any(score.limited for score in mine),
    )


def _read_scores(evaluations: Evaluations, storage: Storage) -> dict[str, evaluate.Summary]:
    return {task: evaluate.Summary.of(stage, storage) for task, stage in evaluations.items()}


def describe_retention(stage: Stage[retention.Settings] | None, storage: Storage) -> dict[str, Retention]:
    """Return how near a model stays to the base, as the field of an entry; none where that was not asked for."""
    return {"retention": Retention.of(stage, storage)} if stage else {}


def _compare_retention(recipe: Recipe, chain: Chain, storage: Storage) -> dict[str, tuple[RetentionComparison, ...]]:
    """Return how much nearer to the base each arm stays than the one before it, as the field of a report."""
    measured = {
        arm: read_lines(
            (storage.files(chain.retention[arm], RETENTION) / RETENTION).read_text(encoding="utf-8"), Measured
        )
        for arm in recipe.arms.names
        if arm in chain.retention
    }
    compared = []
    for second, first in itertools.pairwise(measured):
        figures = retention.summarise(retention.subtract(measured[first], measured[second])).figures
        compared.append(RetentionComparison(first=first, second=second, figures=figures))
    return {"retention": tuple(compared)} if compared else {}


def describe_generated(recipe: Recipe, chain: Chain, storage: Storage) -> dict[str, Habits]:
    """Return how each model answers held-out rows; nothing where those are no task."""
    if HELD_OUT not in recipe.evaluate.tasks:
        return {}
    rows = read_held_out([storage.files(stage, f"{HELD_OUT}.parquet") for stage in chain.own.read])
    by_id = {row.id: row for row in rows}
    filters = [(source.filters or recipe.distill.filters).model_dump() for source in recipe.sources]
    return {name: describe(items, by_id, filters) for name, items in _read_answers(chain, storage).items()}


def _describe_sampled(recipe: Recipe, chain: Chain, storage: Storage) -> dict[str, dict[int, Sampled]]:
    """Return pass@k of each model, by k; nothing where no answers are sampled."""
    if not (wanted := recipe.evaluate.pass_at):
        return {}
    answers = _read_answers(chain, storage)
    return {
        name: {
            k: describe_sampled(items, None if name == "base" else answers["base"], k, wanted.samples) for k in wanted.k
        }
        for name, items in answers.items()
    }


def _read_answers(chain: Chain, storage: Storage) -> dict[str, list[HeldOutItem]]:
    """Return what each model answered to the held-out rows."""
    places = {name: storage.files(chain.evaluations[name, HELD_OUT], ITEMS) for name in chain.models}
    return {name: read_items(place, HeldOutItem) for name, place in places.items()}


def compare_arms(evaluations: Mapping[str, Sequence[Evaluations]], storage: Storage) -> list[Comparison]:
    """Return how much better each arm does than the one before it on the same items.

    evaluations: of each arm, in the order of spec/training.py, those of one model or of several that differ in their
    seeds; an item counts as their mean.
    """
    values = {arm: item_values(models, storage) for arm, models in evaluations.items() if models}
    return [_compare(first, second, values) for second, first in itertools.pairwise(values)]


def _compare(first: str, second: str, values: Mapping[str, Mapping[str, Sequence[float]]]) -> Comparison:
    tasks, mean = paired_differences(values[first], values[second])
    return Comparison(first=first, second=second, tasks=tasks, mean=mean)


def _compare_exported(chain: Chain, storage: Storage) -> list[Comparison]:
    """Return how much better each exported model does than what it was made of."""
    pairs = [(name, stage.settings.of) for name, stage in chain.exported.items()]
    values = {name: item_values([chain.tasks_of(name)], storage) for name in {*itertools.chain(*pairs)}}
    return [_compare(*pair, values) for pair in pairs]


@functools.cache
def count_cost(directory: Path, tokens: int = FLOPS_TOKENS) -> Cost:
    """Return a model's parameters and the forward FLOPs of one token at a length of `tokens`.

    Counted by torch on the meta device, where nothing is computed, with eager attention: the counter has no formula
    for the CPU's flash attention. So with experts: on the meta device the usual ones want bfloat16.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    plain = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **plain)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        # A ready-made mask: without one transformers looks at position values, which a meta tensor does not have.
        mask, positions = torch.zeros(1, 1, tokens, tokens), torch.arange(tokens)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return Cost(parameters=model.num_parameters(), flops_per_token=counter.get_total_flops() / tokens)


def _describe_details(recipe: Recipe, chain: Chain, storage: Storage) -> Details:
    made = [(stage, storage.manifest(stage).provenance) for stage in chain.in_order if stage.location is None]
    seconds: dict[str, float] = {}
    for stage, provenance in made:
        seconds[stage.name] = seconds.get(stage.name, 0.0) + provenance.wall_seconds
    distilled = chain.distilled
    return Details(
        distances=Distances.from_file(storage.files(chain.score, DISTANCES) / DISTANCES) if chain.score else None,
        losses=Losses.of(chain.loss, storage) if chain.loss and chain.score else None,
        greedy=Greedy.of(chain.loss, storage) if chain.loss and not chain.score else None,
        **({"finals": Finals.of(chain.finals, storage)} if chain.finals else {}),
        cut=Pruned.of(chain.pruned, storage),
        selection=Selection.of(distilled, storage) if distilled else None,
        examples=_read_examples(storage.files(distilled, "train.parquet")) if distilled else [],
        nll=Nll.of(chain.nll[0], storage) if chain.nll else None,
        trainings={
            name: Training(read_history(storage.files(stage, HISTORY)), Trained.of(stage, storage))
            for name, stage in chain.trained.items()
        },
        seconds=seconds,
        provenance=made[-1][1],
        artifacts=[Artifact(stage.name, storage.where(stage)) for stage in chain.in_order],
        settings=recipe.model_dump(mode="json"),
    )


def _describe_sources(chain: Chain, models: Sequence[ModelEntry], storage: Storage) -> tuple[SourceEntry, ...]:
    """Return one entry for each source where the rows are mixed of several."""
    if not isinstance(chain.rows.settings, mix.Settings):
        return ()
    rewrites = Selection.of(chain.distilled, storage).by_source if chain.distilled else ()
    likelihoods = Nll.of(chain.nll[0], storage).by_source if chain.nll else ()
    arms = {name: Trained.of(stage, storage) for name, stage in chain.trained.items() if name in ARMS}
    losses = {name: arm.final_loss_by_source for name, arm in arms.items()}
    validated = {name: arm.validation_loss_by_source for name, arm in arms.items()}
    held_out = {model.model: score for model in models if (score := model.quality.tasks.get(HELD_OUT))}
    entries = []
    for i, (name, mixed) in enumerate(zip(chain.own.sources, mix.Summary.of(chain.rows, storage).sources, strict=True)):
        more: dict[str, Any] = {"rewrites": rewrites[i]} if rewrites else {}
        more |= {"nll": likelihoods[i]} if likelihoods else {}
        key = f"exact_match {name}"
        matches = {name: score.other_metrics[key] for name, score in held_out.items() if key in score.other_metrics}
        more |= {"exact_match": matches}
        for field, by_arm in (("loss", losses), ("validation_loss", validated)):
            more[field] = {name: by_source[i] for name, by_source in by_arm.items() if i in by_source}
        entries.append(SourceEntry(mixed=mixed, **more))
    return tuple(entries)


def describe_trial_sources(
    trained: Stage[Any], evaluations: Evaluations, storage: Storage
) -> dict[str, dict[str, SourceResult]]:
    """Return what came of each source of a trial's rows, as the field of its result; none where there is one only."""
    mixed, summary = trained.rows.settings, Trained.of(trained, storage)
    if not isinstance(mixed, mix.Settings):
        return {}
    distilled = trained.inputs.get("distilled")
    rewrites = Selection.of(distilled, storage).by_source if distilled else ()
    matches = evaluate.Summary.of(evaluations[HELD_OUT], storage).other_metrics if HELD_OUT in evaluations else {}
    sources = {
        name: SourceResult(
            rows=summary.rows_by_source.get(i, 0),
            rewrites_kept=rewrites[i].acceptance if rewrites else None,
            loss=summary.final_loss_by_source.get(i),
            validation_loss=summary.validation_loss_by_source.get(i),
            exact_match=matches.get(f"exact_match {name}"),
        )
        for i, name in enumerate(mixed.names)
    }
    return {"sources": sources}


def _describe_merges(chain: Chain, storage: Storage) -> dict[str, MergeEntry]:
    """Return each merged model, with what it gained over those that it was merged from."""

    @functools.cache  # merges have their parents in common
    def items(name: str) -> dict[str, list[float]]:
        return item_values([chain.tasks_of(name)], storage)

    entries = {}
    for name, stage in chain.merged.items():
        parents = stage.settings.parents
        others = [other for other in (*parents, "together") if other in chain.models]
        against = {other: paired_differences(items(name), items(other))[1] for other in others}
        entries[name] = MergeEntry(models=parents, against=against, merged=Merged.of(stage, storage))
    return entries


def _read_examples(place: Path) -> list[Example]:
    """Return up to three rows for every reason."""
    rows: dict[str, list[Example]] = {reason: [] for reason in REASONS}
    for batch in training_batches(place, None, Example):
        for row in batch:
            if len(rows[row.reason]) < 3:
                rows[row.reason].append(row)
    return [row for reason in REASONS for row in rows[reason]]
