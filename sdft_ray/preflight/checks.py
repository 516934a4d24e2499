"""Checks of a recipe that need nothing built.

In: recipe and compute file. Out: nothing, or a UserError for a mistake that would fail hours later.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

from sdft_ray.core.patch import require_foldable
from sdft_ray.core.surgery import prune_config, require_blocks, require_supported
from sdft_ray.data import readers
from sdft_ray.data.chat import end_of_turn
from sdft_ray.errors import UserError, problem
from sdft_ray.models import directory, exporting, parts, sources, tokens
from sdft_ray.models.sizes import sizes_of
from sdft_ray.preflight import limits
from sdft_ray.preflight.cuts import depth_of
from sdft_ray.progress import log
from sdft_ray.spec.compute import Compute, EngineOptions
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.sources import GymRows, HubModel, LocalModel, RowSource, ServedModel
from sdft_ray.spec.sources import in_use as sources_in_use
from sdft_ray.stages import cut, merge, train
from sdft_ray.stages.evaluate.presets import require_usable
from sdft_ray.store.files import stamp
from sdft_ray.trackers import libraries

# vLLM's code of these also holds that of their eyes; PyPI's torchvision does not work beside a CPU's torch.
_NEED_TORCHVISION = ("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text")
# Without an error (docs/architectures.md).
_OTHER_TEXT = ("gpt_neox", "gpt_oss", "lfm2")


def check(recipe: Recipe, compute: Compute, read: limits.FileReader = limits.read_file) -> None:
    """Raise UserError for mistakes that show before anything is built.

    read: reads a row file; a caller that checks many recipes remembers the rows.
    """
    if problems := list(libraries.missing(compute.track)):
        raise UserError(*problems)
    facts, depth = sources.describe_model(recipe.model), None
    others = recipe.merge.others if recipe.merge else {}
    for form in recipe.export.formats if recipe.export else ():
        exporting.require_library(form)
    if facts:
        depth = _require_prunable(recipe, facts)
        if recipe.draft:
            _require_generates(facts, "distill", compute.distill.gpus, compute.distill.engine_options())
        _require_exportable(recipe)
        if recipe.evaluate.engine == "vllm":
            _require_generates(facts, "evaluate", compute.evaluate.gpus, compute.evaluate.engine_options())
    if recipe.arms.need_rewrites and (teaching := _teacher_facts(recipe, facts)):
        _require_generates(teaching, "distill", compute.distill.gpus, compute.distill.engine_options())
    for name, other in others.items():
        if other.path is not None and facts and depth:
            _require_compatible(f"merge.others.{name}.path", other.path, facts, depth)
    if facts and depth and recipe.merge and recipe.merge.slerp:
        merge.require_one_for_each(recipe.merge.slerp.t, facts.blocks - depth)
    context, count = facts.context if facts else None, limits.token_counter(recipe.model)
    limits.require_numbers(recipe, context)
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
        if context is not None:
            limits.require_lengths(recipe, compute, in_use, splits, context, count)
    limits.require_texts(recipe, count, read)
    require_usable(recipe.evaluate.preset, recipe.evaluate.tasks)
    if recipe.prune.finalists:
        train.require_fitting(recipe.train, compute.train)
    for arm in recipe.arms.names:
        train.require_fitting(recipe.train_settings(arm), compute.train)
    for name, other in others.items():
        if other.rows is not None and recipe.merge:
            train.require_fitting(recipe.train_settings(recipe.merge.arm, name), compute.train)


def _row_sources(recipe: Recipe) -> dict[str, tuple[RowSource, ...]]:
    """Return all sources of rows that are trained on, by their keys."""
    others = recipe.merge.others if recipe.merge else {}
    given = {f"merge.others.{name}.rows": other.rows for name, other in others.items() if other.rows is not None}
    return {"rows": recipe.rows, **given}


def _require_prunable(recipe: Recipe, facts: directory.ModelFacts) -> int | None:
    """Return how many blocks go; raise UserError for a model here that cannot be pruned as the recipe says."""
    require_supported(facts.architecture, "model")
    assert not isinstance(recipe.model, HubModel), "a hub model has no facts"
    if (path := sources.model_path(recipe.model)).is_dir():
        names = [name for tensors in directory.stored_tensors(path).values() for name in tensors]
        if getattr(recipe.model, "part", None):
            config, names = parts.text_config(path), [new for name in names if (new := parts.text_name(name))]
        else:
            config = readers.read_json(path / "config.json")
        require_blocks(path, names, config)
        stamps = tuple(stamp(file) for file in sorted(path.rglob("*")) if file.is_file())
        _require_sound(path, getattr(recipe.model, "part", None), config["vocab_size"], stamps)
    depth = depth_of(recipe.prune, sizes_of(recipe.model))
    if path.is_dir() and not getattr(recipe.model, "part", None):
        _require_cut_and_targets(recipe, path)
    if recipe.prune.patch == "linear":
        require_foldable(facts.architecture, min(recipe.prune.remove or (1,)) - 1)
    return depth


def _require_cut_and_targets(recipe: Recipe, base: Path) -> None:
    """Raise UserError for blocks by name that the model at `base` cannot be without, and for adapters that do not fit
    it."""
    if recipe.prune.remove:
        prune_config(cut.explicit_config(base), recipe.prune.remove)
    for settings in map(recipe.train_settings, recipe.arms.names):
        if settings.method == "lora" and settings.lora.targets != "all-linear":
            train.outline_model(base, settings.model_copy(update={"scope": "all"}))


@functools.lru_cache
def _require_sound(path: Path, part: str | None, rows: int, _stamps: tuple[tuple[str, int, int], ...]) -> None:
    """Raise UserError for a model that cannot be loaded or trained; once for all recipes of a sweep."""
    if not part:
        directory.require_sound(path)
    tokens.require_fitting(path, rows)


def _require_exportable(recipe: Recipe) -> None:
    """Raise UserError for a model whose directory is here and which cannot be exported as the recipe says."""
    assert not isinstance(recipe.model, HubModel), "a hub model has no facts"
    path = sources.model_path(recipe.model)
    if path.is_dir() and not getattr(recipe.model, "part", None):
        for form in recipe.export.formats if recipe.export else ():
            exporting.require_writable(path, form)


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


def _require_generates(facts: directory.ModelFacts, section: str, gpus: float, engine: EngineOptions) -> None:
    """Raise UserError for a model that vLLM's CPU build does not read, or of which it generates other text
    (docs/architectures.md), or which cannot be spread as the section of the compute file says."""
    if facts.architecture in _OTHER_TEXT and not gpus:
        what = f"vLLM's CPU build generates other text than {facts.architecture}"
        raise UserError(problem(f"compute.{section}.gpus", what, f"Set compute.{section}.gpus: 1"))
    if facts.architecture in _NEED_TORCHVISION and not gpus and find_spec("torchvision") is None:
        what = f"vLLM reads {facts.architecture} with torchvision, which is not installed"
        do = "Do: pip install torchvision --index-url https://download.pytorch.org/whl/cpu"
        raise UserError(problem(section, what, do))
    if facts.heads and facts.heads % (each := engine.tensor_parallel_size):
        what = f"{each} does not divide the {facts.heads} attention heads of the model"
        do = f"Give one of {', '.join(str(n) for n in range(1, facts.heads + 1) if facts.heads % n == 0)}"
        key = "tensor_parallel_size" if section == "distill" else "gpus"
        raise UserError(problem(f"compute.{section}.{key}", what, do))
    if facts.blocks and facts.blocks % (groups := engine.pipeline_parallel_size):
        _report_uneven(facts.blocks, groups)


def _report_uneven(blocks: int, groups: int) -> None:
    """Raise UserError where a group of GPUs would get no block; else report that some get more than others, which only
    costs speed: 61 blocks could not be spread at all."""
    where = "compute.distill.pipeline_parallel_size"
    if groups > blocks:
        raise UserError(problem(where, f"{groups} is more than the {blocks} blocks of the model", "Lower it"))
    even = max(n for n in range(1, groups + 1) if blocks % n == 0)
    what = f"{groups} does not divide the {blocks} blocks of the model, so all wait for groups with one block more"
    log(problem(where, what, f"{even} would divide them"))


def _require_compatible(where: str, path: str, base: directory.ModelFacts, removed: int) -> None:
    """Raise UserError for a model that cannot have been tuned from this base without some blocks."""
    other = sources.describe_model(LocalModel(path=path))
    assert other, "a local model has facts"
    expected = {"architecture": base.architecture, "blocks": base.blocks - removed}
    for field, ours in expected.items():
        if (got := getattr(other, field)) != ours:
            do = "Give a model that was tuned from the same pruned model"
            raise UserError(problem(where, f"{field} is {got}; the model that is pruned here has {ours}", do))
