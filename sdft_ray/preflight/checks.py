"""Checks of a recipe that need nothing built.

In: recipe and compute file. Out: nothing, or a UserError for a mistake that would fail hours later.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from sdft_ray.core.patch import require_foldable
from sdft_ray.core.surgery import prune_config, require_blocks, require_supported
from sdft_ray.data import readers
from sdft_ray.data.chat import end_of_turn
from sdft_ray.errors import UserError, problem
from sdft_ray.models import directory, exporting, parts, sources, tokens
from sdft_ray.models.sizes import sizes_of
from sdft_ray.preflight import engines, limits
from sdft_ray.preflight.cuts import depth_of
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.sources import GymRows, HubModel, LocalModel, ModelSource, RowSource, ServedModel
from sdft_ray.spec.sources import in_use as sources_in_use
from sdft_ray.spec.training import Train
from sdft_ray.stages import cut, merge, train
from sdft_ray.stages.evaluate.presets import require_usable
from sdft_ray.store.files import stamp
from sdft_ray.trackers import libraries


def check(recipe: Recipe, compute: Compute, read: limits.FileReader = limits.read_file) -> None:
    """Raise UserError for mistakes that show before anything is built.

    read: reads a row file; a caller that checks many recipes remembers the rows.
    """
    if problems := list(libraries.missing(compute.track)):
        raise UserError(*problems)
    facts = sources.describe_model(recipe.model)
    for form in _formats(recipe):
        exporting.require_library(form)
    depth = _require_prunable(recipe, facts) if facts else None
    teaching = _teacher_facts(recipe, facts) if recipe.arms.need_rewrites else None
    engines.require_fitting(recipe, compute, facts, teaching)
    if facts and depth:
        _require_mergeable(recipe, facts, depth)
    _require_rows(recipe, compute, facts, teaching, read)
    require_usable(recipe.evaluate.preset, recipe.evaluate.tasks)
    for settings in (*([recipe.train] if recipe.prune.finalists else []), *_trainings(recipe)):
        train.require_fitting(settings, compute.train)


def _require_mergeable(recipe: Recipe, facts: directory.ModelFacts, depth: int) -> None:
    """Raise UserError for models that cannot be merged with those that are trained here."""
    for name, other in recipe.merge.others.items() if recipe.merge else ():
        if other.path is not None:
            where = f"merge.others.{name}.path"
            _require_compatible(where, other.path, recipe.model, facts, depth)
            _require_precision(where, Path(other.path).expanduser(), recipe.train.dtype)
    if recipe.merge and recipe.merge.slerp:
        merge.require_one_for_each(recipe.merge.slerp.t, facts.blocks - depth)


def _require_rows(
    recipe: Recipe,
    compute: Compute,
    facts: directory.ModelFacts | None,
    teaching: directory.ModelFacts | None,
    read: limits.FileReader,
) -> None:
    """Raise UserError for rows and calibration texts that are too few, or that base or teacher cannot read."""
    base = limits.Reader(facts.context if facts else None, limits.token_counter(recipe.model))
    teacher = limits.Reader(teaching.context if teaching else None, base.count)
    rewriting = recipe.distill.teacher if recipe.arms.need_rewrites else None
    if rewriting:
        teacher = teacher._replace(name="the teacher")
    if isinstance(rewriting, LocalModel):
        teacher = teacher._replace(count=limits.token_counter(rewriting))
    limits.require_numbers(recipe, base, teacher)
    for key, given in _row_sources(recipe).items():
        in_use = sources_in_use(given)
        for source in in_use:
            if isinstance(source, GymRows):
                readers.read_rows(source.model_copy(update={"limit": 1}))
        if recipe.prune.finalists and given is recipe.rows:
            limits.read_sources(in_use, recipe.prune.finalists.rows, read, key, "prune.finalists.rows")
        splits = limits.read_sources(given, recipe.train.rows, read, key)
        if given is not recipe.rows:  # no task reads others' held-out rows
            splits = splits._replace(held_out=[])
        limits.require_forms(recipe.model, splits)
        limits.require_lengths(recipe, compute, in_use, splits, base, teacher)
    limits.require_texts(recipe, base.count, read)


def _formats(recipe: Recipe) -> tuple[str, ...]:
    return recipe.export.formats if recipe.export else ()


def _trainings(recipe: Recipe) -> list[Train]:
    """Return the settings of all that are trained: arms, and others that are merged with one."""
    others = [recipe.train_settings(recipe.merge.arm, name) for name in recipe.others] if recipe.merge else []
    return [*map(recipe.train_settings, recipe.arms.names), *others]


def _row_sources(recipe: Recipe) -> dict[str, tuple[RowSource, ...]]:
    """Return all sources of rows that are trained on, by their keys."""
    others = recipe.merge.others if recipe.merge else {}
    given = {f"merge.others.{name}.rows": other.rows for name, other in others.items() if other.rows is not None}
    return {"rows": recipe.rows, **given}


def _require_prunable(recipe: Recipe, facts: directory.ModelFacts) -> int | None:
    """Return how many blocks go; raise UserError for a model here that cannot be pruned, or then be exported, as the
    recipe says."""
    require_supported(facts.architecture, "model")
    assert not isinstance(recipe.model, HubModel), "a hub model has no facts"
    path, part = sources.model_path(recipe.model), recipe.model.part
    if path.is_dir():
        _require_agreement(recipe, path, part)
    depth = depth_of(recipe.prune, sizes_of(recipe.model))
    if path.is_dir() and not part:
        _require_cut_and_targets(recipe, path)
    if recipe.prune.patch == "linear":
        protect = recipe.prune.protect
        every = range(protect.first, facts.blocks - protect.last)  # removed where no other can be
        first = min(recipe.prune.remove or (every if depth == len(every) else [1]))
        require_foldable(facts.architecture, first - 1)
    if depth and (tried := recipe.prune.finalists):
        _require_spans(tried.count, facts.blocks - sum(dict(recipe.prune.protect).values()) - depth + 1)
    if path.is_dir() and not part:
        for form in _formats(recipe):
            exporting.require_writable(path, form)
    return depth


def _require_agreement(recipe: Recipe, path: Path, part: str | None) -> None:
    """Raise UserError for a model directory whose tensors, config and tokenizer do not agree."""
    names = [name for tensors in directory.stored_tensors(path).values() for name in tensors]
    config = parts.text_config(path) if part else readers.read_json(path / "config.json")
    require_blocks(path, [new for name in names if (new := parts.text_name(name))] if part else names, config)
    vocabulary = config["vocab_size"] if "vocab_size" in config else directory.load_config(path).vocab_size
    if recipe.arms.logits and (likeliest := recipe.arms.logits.likeliest):
        train.targets.require_known(likeliest, vocabulary)
    stamps = tuple(stamp(file) for file in sorted(path.rglob("*")) if file.is_file())
    _require_sound(path, part, vocabulary, stamps)


def _require_spans(finalists: int, spans: int) -> None:
    """Raise UserError for more finalists than there are spans to remove."""
    if finalists > spans:
        what = f"{finalists} is more than the number of spans to choose from, {spans}"
        raise UserError(problem("prune.finalists", what, "Lower it" if spans > 1 else "Remove it"))


def _require_cut_and_targets(recipe: Recipe, base: Path) -> None:
    """Raise UserError for blocks by name that the model at `base` cannot be without, and for adapters that do not fit
    it."""
    if recipe.prune.remove:
        prune_config(cut.explicit_config(base), recipe.prune.remove)
    for settings in _trainings(recipe):
        if settings.method == "lora" and settings.lora.targets != "all-linear":
            train.outline_model(base, settings.model_copy(update={"scope": "all"}))


@functools.lru_cache
def _require_sound(path: Path, part: str | None, rows: int, _stamps: tuple[tuple[str, int, int], ...]) -> None:
    """Raise UserError for a model that cannot be loaded or trained; once for all recipes of a sweep."""
    if not part:
        directory.require_sound(path)
    tokens.require_fitting(path, rows)


def _teacher_facts(recipe: Recipe, base: directory.ModelFacts | None) -> directory.ModelFacts | None:
    """Return the facts of the model that rewrites, where it is on this machine and no endpoint."""
    match recipe.distill.teacher:
        case None:
            return base
        case ServedModel():
            return None
        case source:
            facts = sources.describe_model(source, "distill.teacher.path", teaches=True)
            if isinstance(source, LocalModel):
                end_of_turn(tokens.load_tokenizer(sources.model_path(source)))
            return facts


def _require_compatible(where: str, given: str, source: ModelSource, base: directory.ModelFacts, removed: int) -> None:
    """Raise UserError for a model that cannot have been tuned from this base without some blocks."""
    other = sources.describe_model(LocalModel(path=given), where)
    assert other, "a local model has facts"
    expected = {"architecture": base.architecture, "blocks": base.blocks - removed}
    do = "Give a model that was tuned from the same pruned model"
    for field, ours in expected.items():
        if (got := getattr(other, field)) != ours:
            raise UserError(problem(where, f"{field} is {got}; the model that is pruned here has {ours}", do))
    assert not isinstance(source, HubModel), "a hub model has no facts"
    path, theirs = sources.model_path(source), sources.model_path(LocalModel(path=given))
    if not (path.is_dir() and theirs.is_dir()) or source.part:
        return
    kinds = _kinds_of_tensors(path)
    if wrong := next((kind for kind in sorted(_kinds_of_tensors(theirs)) if kind not in kinds), None):
        what = f"its tensor {wrong[0]} of {' x '.join(map(str, wrong[1]))} is none of the model that is pruned here"
        raise UserError(problem(where, what, do))


def _require_precision(where: str, model: Path, dtype: str) -> None:
    """Raise UserError for a model of which no weight is stored in the precision of those that are trained here."""
    places = directory.tensor_places(model).values()
    found = sorted({directory.DTYPES.get(tensor.dtype, tensor.dtype) for _, tensor in places})
    if dtype not in found:
        what = f"its weights are {' and '.join(found)}, and those that are trained here {dtype}"
        raise UserError(problem(where, what, f"Save it in {dtype}, or set train.dtype to its precision"))


def _kinds_of_tensors(model: Path) -> set[tuple[str, tuple[int, ...]]]:
    """Return the names, without numbers of blocks, and the shapes of a model's tensors."""
    places = directory.tensor_places(model)
    return {(re.sub(r"\.\d+\.", ".N.", name), tuple(tensor.shape)) for name, (_, tensor) in places.items()}
