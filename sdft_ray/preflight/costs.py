"""The costs of a recipe, estimated before anything is built: memory of each process, steps, tokens.

In: recipe, compute file, and headers of the model. Out: a line for each kind of stage, which `sdft check` shows. The
arithmetic is in memory.py; nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import math

from sdft_ray import pipeline
from sdft_ray.core.mixture import mixture_size
from sdft_ray.core.passes import count_passes
from sdft_ray.core.patch import gaps
from sdft_ray.models import sources
from sdft_ray.models.directory import weight_files
from sdft_ray.models.sizes import sizes_of, sizes_of_directory
from sdft_ray.pipeline import Chain
from sdft_ray.preflight import memory
from sdft_ray.preflight.cuts import depth_of
from sdft_ray.preflight.shapes import shape_of, shape_of_directory
from sdft_ray.spec import compute as compute_spec
from sdft_ray.spec import training
from sdft_ray.spec.compute import Compute, cores, settled
from sdft_ray.spec.recipe import Prune, Recipe
from sdft_ray.spec.sources import HubModel, LocalModel, ServedModel
from sdft_ray.stages import mix, retention, train
from sdft_ray.stages.train.adapters import LAST_BLOCKS
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage
from sdft_ray.sweep.planning import Plan
from sdft_ray.training_data import MixedStage, count_rows

_Engines = compute_spec.Distill | compute_spec.Evaluate


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one stage."""

    stage: str
    work: str
    """The amount of work, in words."""
    processes: int
    gb: float | None
    """Memory of each process; None where it is not known."""
    parts: str = ""
    """The parts of the memory, in words."""
    fits: bool | None = None
    """Whether all processes fit this machine, or one a GPU; None where neither is known."""


def estimate_sweep(plan: Plan, compute: Compute, storage: Storage) -> list[Cost]:
    """Return, for each kind of stage, the most memory and the most work of any recipe of a sweep."""
    by_stage: dict[str, list[Cost]] = {}
    for cell in plan.cells:
        for cost in estimate_stages(cell.recipe, compute, pipeline.chain(cell.recipe), storage):
            by_stage.setdefault(cost.stage, []).append(cost)
    return [
        dataclasses.replace(max(costs, key=_memory), work=max(costs, key=_amount).work) for costs in by_stage.values()
    ]


def _memory(cost: Cost) -> tuple[float, bool]:
    """Return what the costs of a stage are compared by; of engines on GPUs only what does not fit is known."""
    return cost.gb or 0, cost.fits is False


def _amount(cost: Cost) -> float:
    """Return the number at the start of a cost's work; infinity for work without a known bound."""
    amount = cost.work.partition(" ")[0]
    return int(amount) if amount.isdecimal() else math.inf


def estimate_stages(recipe: Recipe, compute: Compute, chain: Chain, storage: Storage) -> list[Cost]:
    """Return the cost of each kind of stage; without memory where the model is not on this machine yet."""
    base = chain.base
    done = base.location or (storage.files(base) if storage.status(base) == "done" else None)
    shape = shape_of_directory(done) if done else shape_of(recipe.model)
    depth = depth_of(recipe.prune, sizes_of_directory(done) if done else sizes_of(recipe.model))
    pruned = None if shape is None or depth is None else memory.prune(shape, depth)
    first = next(iter(chain.trained.values()))
    trained = {f"finalist {i}": stage for i, stage in enumerate(chain.cutting.trained, 1)} | chain.trained
    return [
        *([_score(recipe, compute, shape)] if chain.score else []),
        *([_greedy(recipe, compute, shape, depth)] if recipe.prune.is_greedy else []),
        _distill(recipe, compute, shape, _training_rows(first, storage)),
        *(_train(recipe, compute, shape, pruned, name, stage, storage) for name, stage in trained.items()),
        *_drafts(recipe, compute, shape, pruned, len(chain.drafts)),
        *_retention(recipe, compute, shape, pruned, len(chain.retention)),
        _evaluate(recipe, compute, shape, len(chain.models)),
    ]


def _score(recipe: Recipe, compute: Compute, shape: memory.Shape | None) -> Cost:
    corpora = recipe.prune.calibration
    texts, tries = sum(corpus.limit for corpus in corpora), 1 + 2 * recipe.prune.candidates
    work = f"{texts} texts of up to {_longest(recipe)} tokens"
    held_back = sum(corpus.held_back for corpus in corpora) * tries  # whose states the loss keeps
    return _measuring("score", work, recipe, compute, shape, max(texts, held_back), tries)


def _greedy(recipe: Recipe, compute: Compute, shape: memory.Shape | None, depth: int | None) -> Cost:
    """Return the cost of trying every block at every step."""
    protect, texts = recipe.prune.protect, sum(corpus.held_back for corpus in recipe.prune.calibration)
    work = f"passes over {texts} texts of up to {_longest(recipe)} tokens"
    tries = 1 + (shape.blocks - protect.first - protect.last if shape else 0)
    if shape and depth:
        counted = count_passes(shape.blocks, depth, protect.first, protect.last)
        work = f"{counted.passes:.0f} {work}, for {counted.candidates} candidates"
    return _measuring("loss", work, recipe, compute, shape, texts * tries, tries)


def _longest(recipe: Recipe) -> int:
    return max(corpus.max_tokens for corpus in recipe.prune.calibration)


def _measuring(
    stage: str, work: str, recipe: Recipe, compute: Compute, shape: memory.Shape | None, states: int, tries: int
) -> Cost:
    """Return the cost of processes that measure calibration texts with the base.

    states: of texts, that all of them keep together where it is streamed; tries: of one text, kept where it is not.
    """
    section, bytes_each, parts = compute.score, None, ""
    if shape is not None:
        number, longest = _bytes(recipe.prune.dtype), _longest(recipe)
        tokens, streamed = section.batch_size * longest, compute.streams(number * shape.parameters)
        kept = states * longest // section.actors if streamed else tries * tokens
        kept = memory.state_bytes(shape, number, kept)
        bytes_each = memory.holding_memory(shape, number, tokens, streamed)
        bytes_each += 0 if streamed and section.gpus else kept
        parts = f"one block at a time; states {kept / 1e9:.2f}" if streamed else ""
        parts += " in main memory" if streamed and section.gpus else ""
    return _cost(stage, work, section.actors, bytes_each, parts, compute, section.gpus)


def _distill(recipe: Recipe, compute: Compute, shape: memory.Shape | None, rows: int | None) -> Cost:
    work = f"{rows or 'all training'} rows of up to {recipe.distill.max_new_tokens} new tokens"
    actors, teacher = compute.distill.actors.max, recipe.distill.teacher
    if isinstance(teacher, ServedModel):
        return _cost("distill", work, actors, None, f"{teacher.model} generates at its endpoint", compute, 0)
    weights = None if shape is None else _bytes(recipe.distill.dtype) * shape.parameters
    if teacher:
        weights = _stored_bytes(teacher)
    return _engine("distill", work, actors, weights, compute, compute.distill)


def _stored_bytes(model: LocalModel | HubModel) -> int | None:
    """Return the bytes of a model's weights as stored, which may be quantised; None where they are not here."""
    if isinstance(model, HubModel) or not (path := sources.model_path(model, "distill.teacher.path")).is_dir():
        return None
    return sum(file.stat().st_size for file in weight_files(path))


def _drafts(
    recipe: Recipe, compute: Compute, shape: memory.Shape | None, pruned: memory.Shape | None, drafts: int
) -> list[Cost]:
    if not (settings := recipe.draft):
        return []
    counts = ", ".join(map(str, settings.tokens))
    work = (
        f"{drafts} models, {settings.prompts} prompts of {settings.max_new_tokens} new tokens, {counts} of them drafted"
    )
    weights = None
    if shape is not None and pruned is not None:  # the base alone and the base with its draft take turns
        weights = _bytes(settings.dtype) * (2 * shape.parameters + pruned.parameters)
    return [_engine("draft", work, 1, weights, compute, compute.distill)]


def _engine(stage: str, work: str, processes: int, weights: int | None, compute: Compute, section: _Engines) -> Cost:
    """Return the cost of processes with vLLM: its part of a GPU; or process, weights and KV cache.

    On GPUs it does not fit where the weights of one leave nothing of vLLM's part to the KV cache.
    """
    if section.gpus:
        options, gpu = section.engine_options(), compute.ray.gpu_memory_gb
        parts = f"vLLM takes {options.gpu_memory_utilization:.0%} of a GPU"
        if weights is None:
            return Cost(stage, work, processes, None, parts)
        each = weights / options.tensor_parallel_size / options.pipeline_parallel_size
        each = max(0.0, each - (options.cpu_offload_gb or 0) * 2**30) / 1e9
        fits = each < options.gpu_memory_utilization * gpu if gpu else None
        return Cost(stage, work, processes, None, f"{parts}, weights {each:.2f} of it", fits)
    cache = round(section.engine.kv_cache_gib * 2**30)
    bytes_each = weights and weights + memory.ENGINE_BYTES + cache
    return _cost(stage, work, processes, bytes_each, f"of it KV cache {cache / 1e9:.1f}", compute, 0)


def _train(
    recipe: Recipe,
    compute: Compute,
    shape: memory.Shape | None,
    pruned: memory.Shape | None,
    model: str,
    stage: Stage[train.Settings],
    storage: Storage,
) -> Cost:
    settings, section = stage.settings.train, compute.train
    rows, name = _training_rows(stage, storage), f"train ({model})"
    steps = "steps unknown" if rows is None else f"{settings.count_steps(rows)} steps"
    most = section.micro_batch * settings.max_tokens
    tokens = min(most, section.pass_tokens or most)
    work = f"{steps} of {settings.global_batch_size} rows, up to {tokens} tokens a pass"
    if shape is None or pruned is None:
        return _cost(name, work, section.workers.max, None, "", compute, section.gpus)
    scope = _scope(pruned, settings.scope, recipe.prune)
    trained = memory.trainable_parameters(scope, settings.method, settings.lora.rank, settings.lora.targets)
    needs = memory.training_memory(
        pruned,
        trained,
        workers=section.workers.min,
        zero_stage=section.zero_stage,
        half=settings.dtype == "bfloat16",
        tokens=tokens,
        loss_tokens=tokens // 2,  # not known before the rows are read
        gradient_checkpointing=section.gradient_checkpointing,
    )
    named = {"weights": needs.weights, "gradients": needs.gradients, "optimizer": needs.optimizer}
    if section.offload != "none" and section.gpus:
        named |= {"optimizer": 0}
    if section.offload == "all" and section.gpus:
        named |= {"weights": needs.weights - _bytes(settings.dtype) * pruned.parameters // section.workers.min}
    named |= {"activations": needs.activations}
    soft = stage.settings.soft
    if soft and not soft.likeliest:  # the base beside it, of which adapters share all but the removed blocks
        shares = settings.method == "lora" and section.zero_stage < 3
        own = shape.parameters - pruned.parameters if shares else shape.parameters
        named |= {"teacher": _bytes(settings.dtype) * own}
    parts = f"{trained / 1e6:.1f} of {pruned.parameters / 1e6:.1f} M parameters are trained; " + ", ".join(
        f"{name} {value / 1e9:.2f}" for name, value in named.items()
    )
    if section.gpus:
        parts += _main_memory(settings, section, pruned)
    bytes_each = sum(named.values()) + memory.PROCESS_BYTES
    return _cost(name, work, section.workers.max, bytes_each, parts, compute, section.gpus)


def _scope(pruned: memory.Shape, scope: str, prune: Prune) -> memory.Shape:
    """Return the shape of what is trained of a model, at most."""
    if scope == "all":
        return pruned
    runs = len(gaps(prune.remove)) if prune.remove else 1 if prune.contiguous else pruned.blocks
    blocks = min(pruned.blocks, 2 * runs if scope == "beside_cut" else LAST_BLOCKS)
    return dataclasses.replace(pruned, blocks=blocks, parameters=blocks * pruned.block_parameters)


def _main_memory(settings: training.Train, section: compute_spec.Train, shape: memory.Shape) -> str:
    """Return in words the main memory of a training whose workers compute on GPUs."""
    number, shares = _bytes(settings.dtype), section.workers.min if section.zero_stage == 3 else 0
    loading = memory.loading_memory(shape, number, shares, on_gpu=section.offload != "all")
    writing = number * shape.parameters + memory.PROCESS_BYTES
    return f"; main memory {loading / 1e9:.2f} to load, {writing / 1e9:.2f} in the process that writes the model"


def _retention(
    recipe: Recipe, compute: Compute, shape: memory.Shape | None, pruned: memory.Shape | None, models: int
) -> list[Cost]:
    if not (settings := recipe.evaluate.retention):
        return []
    work = f"{models} models x up to {settings.rows} rows and {settings.texts} texts"
    bytes_each = None
    if shape is not None and pruned is not None:  # the base beside a model, and pieces of their logits
        number = _bytes(recipe.evaluate.dtype)
        bytes_each = memory.holding_memory(shape, number, settings.max_tokens) + number * pruned.parameters
        bytes_each += 5 * 4 * min(retention.PIECE_LOGITS, settings.max_tokens * shape.vocabulary)
    return [_cost("retention", work, _at_once(compute, models), bytes_each, "", compute, compute.evaluate.gpus)]


def _at_once(compute: Compute, stages: int) -> int:
    """Return how many evaluations run side by side on this machine; 1 where that is not known."""
    section = compute.evaluate
    if compute.ray.address != "local" or section.gpus:
        return 1
    return max(1, min(cores() // settled(section.cpus), stages))


def _evaluate(recipe: Recipe, compute: Compute, shape: memory.Shape | None, models: int) -> Cost:
    settings, section = recipe.evaluate, compute.evaluate
    items = f"{settings.limit} items" if settings.limit else "all items"
    work = f"{models} models x {len(settings.tasks)} tasks, {items} each"
    number, bytes_each = _bytes(settings.dtype), None
    if shape is not None:
        bytes_each = memory.holding_memory(shape, number, section.batch_size * 256)
    if settings.engine == "vllm":
        weights = None if shape is None else number * shape.parameters
        if weights is not None and bytes_each is not None and not section.gpus:
            weights += bytes_each  # of the model in transformers, which stays beside it on a CPU
        return _engine("evaluate", work, _at_once(compute, models * section.actors), weights, compute, section)
    at_once = _at_once(compute, models * (section.actors if section.actors > 1 else len(settings.tasks)))
    return _cost("evaluate", work, at_once, bytes_each, "", compute, section.gpus)


def _cost(
    stage: str, work: str, processes: int, bytes_each: int | None, parts: str, compute: Compute, gpus: float
) -> Cost:
    room = compute.room(processes, gpus)
    fits = None if bytes_each is None or room is None else bytes_each <= room
    return Cost(stage, work, processes, bytes_each and round(bytes_each / 1e9, 2), parts, fits)


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _training_rows(stage: Stage[train.Settings], storage: Storage) -> int | None:
    """Return the number of training rows, or the most where they are not read yet; None where no limit is known."""
    each = [stage.settings.train.rows or _most_rows(stage.inputs[key], storage) for key in stage.keys("rows")]
    return None if None in each else sum(rows or 0 for rows in each)


def _most_rows(rows: MixedStage, storage: Storage) -> int | None:
    if storage.status(rows) == "done":
        return count_rows(rows, storage).train
    if isinstance(rows.settings, mix.Settings):
        each = [_most_rows(source, storage) for source in rows.inputs.values()]
        known = [math.inf if most is None else most for most in each]
        size = mixture_size(known, rows.settings.shares)
        return None if math.isinf(size) else int(size)
    split = rows.settings.split
    return split.limit - split.held_out - split.validation if split.limit else None
