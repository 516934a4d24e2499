"""The costs of a recipe, estimated before anything is built: memory of each process, steps, tokens, hours.

In: recipe, compute file, and headers of the model. Out: a line for each kind of stage, which `sdft check` shows. The
arithmetic is in memory.py and hours.py; nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdft_ray import pipeline
from sdft_ray.core.mixture import mixture_size
from sdft_ray.core.passes import count_passes
from sdft_ray.core.patch import gaps
from sdft_ray.errors import counted
from sdft_ray.models import sources
from sdft_ray.models.directory import weight_files
from sdft_ray.models.sizes import sizes_of, sizes_of_directory
from sdft_ray.pipeline import Chain
from sdft_ray.preflight import memory
from sdft_ray.preflight.cuts import depth_of
from sdft_ray.preflight.hours import Kind, Rates
from sdft_ray.preflight.limits import most_rows
from sdft_ray.preflight.shapes import shape_of, shape_of_directory
from sdft_ray.results import HELD_OUT
from sdft_ray.spec import compute as compute_spec
from sdft_ray.spec import training
from sdft_ray.spec.compute import Compute, cores, settled
from sdft_ray.spec.evaluation import Retention
from sdft_ray.spec.pruning import Prune
from sdft_ray.spec.recipe import Draft, Recipe
from sdft_ray.spec.sources import HubModel, LocalModel, ServedModel
from sdft_ray.stages import mix, retention
from sdft_ray.stages.evaluate.presets import way_of
from sdft_ray.stages.train import Settings as TrainSettings
from sdft_ray.stages.train.adapters import LAST_BLOCKS
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage
from sdft_ray.sweep.planning import Plan
from sdft_ray.training_data import MixedStage, count_rows


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
    amount: int | None = None
    """The work of all processes, at most: texts, rows, prompts or items; None where it is not known."""
    hours: float | None = None
    """None where the work or its rate is not known."""
    rate: str | None = None
    """Where its rate comes from: `stated` in the compute file, or `measured`."""


def estimate_sweep(plan: Plan, compute: Compute, storage: Storage) -> list[Cost]:
    """Return, for each kind of stage, the most memory and the most work of any recipe of a sweep."""
    by_stage: dict[str, list[Cost]] = {}
    rates = Rates(compute.throughput, storage)
    for cell in plan.cells:
        for cost in estimate_stages(cell.recipe, compute, pipeline.chain(cell.recipe), storage, rates):
            by_stage.setdefault(cost.stage, []).append(cost)
    return [_most(costs) for costs in by_stage.values()]


def _most(costs: Sequence[Cost]) -> Cost:
    """Return the most memory, work and hours of a stage's costs; no hours where some are not known."""
    largest, longest, slowest = (max(costs, key=key) for key in (_memory, _amount, _hours))
    most = dataclasses.replace(largest, work=longest.work, amount=longest.amount)
    return dataclasses.replace(most, hours=slowest.hours, rate=slowest.rate)


def _memory(cost: Cost) -> tuple[float, bool]:
    """Return what the costs of a stage are compared by; of engines on GPUs only what does not fit is known."""
    return cost.gb or 0, cost.fits is False


def _amount(cost: Cost) -> float:
    """Return the amount of work; infinity where it has no known bound."""
    return math.inf if cost.amount is None else cost.amount


def _hours(cost: Cost) -> float:
    """Return the hours; infinity where they are not known."""
    return math.inf if cost.hours is None else cost.hours


def estimate_stages(
    recipe: Recipe, compute: Compute, chain: Chain, storage: Storage, rates: Rates | None = None
) -> list[Cost]:
    """Return the cost of each kind of stage; without memory where the model is not on this machine yet."""
    rates = rates or Rates(compute.throughput, storage)
    base = base_of(recipe, chain, storage)
    estimate = _Estimate(recipe, compute, base.shape, base.depth)
    trained = {f"finalist {i}": stage for i, stage in enumerate(chain.cutting.trained, 1)} | chain.trained
    rows = {name: _training_rows(stage, storage) for name, stage in trained.items()}
    first, kept = next(iter(chain.trained)), recipe.evaluate.retention
    rewritten = {name: data.distilled for name, data in chain.data.items() if data.distilled}
    compared, evaluated = chain.retention.values(), chain.evaluations.values()

    def timed(cost: Cost, kind: Kind, stages: Iterable[Stage[Any]], of_one: int = 1) -> Cost:
        found = rates.hours(kind, cost.amount, cost.processes, stages, of_one)
        return dataclasses.replace(cost, hours=found.hours, rate=found.rate) if found else cost

    return [
        *([timed(estimate.score(), "score", [chain.score])] if chain.score else []),
        *([timed(estimate.greedy(), "score", [])] if recipe.prune.is_greedy else []),
        *(timed(estimate.distill(name, rows[name or first]), "distill", [each]) for name, each in rewritten.items()),
        *(timed(estimate.train(name, each.settings, rows[name]), "train", [each]) for name, each in trained.items()),
        *([estimate.draft(recipe.draft, len(chain.drafts))] if recipe.draft else []),
        *([timed(estimate.retention(kept, len(chain.retention)), "retention", compared)] if kept else []),
        timed(estimate.evaluate(len(chain.models)), "evaluate", evaluated, compute.evaluate.actors),
    ]


class Base(NamedTuple):
    """What is known of a recipe's base before anything is built; None of what is not on this machine yet."""

    directory: Path | None
    shape: memory.Shape | None
    depth: int | None
    """How many of its blocks go."""


def base_of(recipe: Recipe, chain: Chain, storage: Storage) -> Base:
    """Return what is known of the base of a recipe."""
    base = chain.base
    done = base.location or (storage.files(base) if storage.status(base) == "done" else None)
    shape = shape_of_directory(done) if done else shape_of(recipe.model)
    return Base(done, shape, depth_of(recipe.prune, sizes_of_directory(done) if done else sizes_of(recipe.model)))


def trained_parameters(pruned: memory.Shape, settings: training.Train, prune: Prune) -> int:
    """Return how many parameters are trained, at most."""
    scope = _scope(pruned, settings.scope, prune)
    return memory.trainable_parameters(scope, settings.method, settings.lora.rank, settings.lora.targets)


@dataclasses.dataclass(frozen=True)
class _Estimate:
    """Estimates the stages of a recipe."""

    recipe: Recipe
    compute: Compute
    shape: memory.Shape | None
    """Of the base; None where it is not on this machine."""
    depth: int | None

    @property
    def pruned(self) -> memory.Shape | None:
        """The shape of the pruned model."""
        return None if self.shape is None or self.depth is None else memory.prune(self.shape, self.depth)

    @property
    def longest(self) -> int:
        """Tokens of the longest calibration text."""
        return max(corpus.max_tokens for corpus in self.recipe.prune.calibration)

    def score(self) -> Cost:
        corpora = self.recipe.prune.calibration
        texts, tries = sum(corpus.limit for corpus in corpora), 1 + 2 * self.recipe.prune.candidates
        work = f"{texts} texts of up to {self.longest} tokens"
        held_back = sum(corpus.held_back for corpus in corpora) * tries  # whose states the loss keeps
        return self._measuring("score", work, texts, max(texts, held_back), tries)

    def greedy(self) -> Cost:
        """Return the cost of trying every block at every step."""
        protect, texts = self.recipe.prune.protect, sum(corpus.held_back for corpus in self.recipe.prune.calibration)
        work = f"passes over {texts} texts of up to {self.longest} tokens"
        tries, amount = 1 + (self.shape.blocks - protect.first - protect.last if self.shape else 0), None
        if self.shape and self.depth:
            counted = count_passes(self.shape.blocks, self.depth, protect.first, protect.last)
            work = f"{counted.passes:.0f} {work}, for {counted.candidates} candidates"
            amount = round(counted.passes * texts)
        return self._measuring("loss", work, amount, texts * tries, tries)

    def _measuring(self, stage: str, work: str, amount: int | None, states: int, tries: int) -> Cost:
        """Return the cost of processes that measure calibration texts with the base.

        amount: of texts, over all passes; states: of texts, that all processes keep together where it is streamed;
        tries: of one text, kept where it is not.
        """
        section, bytes_each, parts = self.compute.score, None, ""
        if shape := self.shape:
            number = _bytes(self.recipe.prune.dtype)
            tokens, streamed = section.batch_size * self.longest, self.compute.streams(number * shape.parameters)
            kept = states * self.longest // section.actors if streamed else tries * tokens
            kept = memory.state_bytes(shape, number, kept)
            bytes_each = memory.holding_memory(shape, number, tokens, streamed)
            bytes_each += 0 if streamed and section.gpus else kept
            parts = f"one block at a time; states {kept / 1e9:.2f}" if streamed else ""
            parts += " in main memory" if streamed and section.gpus else ""
        return self._cost(stage, work, section.actors, bytes_each, parts, section.gpus, amount)

    def distill(self, model: str, rows: int | None) -> Cost:
        """Return the cost of rewriting the recipe's own rows, or those of another model that is merged."""
        settings, actors = self.recipe.distill, self.compute.distill.actors.max
        name = f"distill ({model})" if model else "distill"
        work = f"{rows or 'all training'} rows of up to {settings.max_new_tokens} new tokens"
        amount = rows and rows * settings.samples
        if isinstance(teacher := settings.teacher, ServedModel):
            return self._cost(name, work, actors, None, f"{teacher.model} generates at its endpoint", 0, amount)
        weights = _bytes(settings.dtype) * self.shape.parameters if self.shape else None
        return self._engine(name, work, actors, _stored_bytes(teacher) if teacher else weights, amount)

    def draft(self, settings: Draft, drafts: int) -> Cost:
        counts, new = ", ".join(map(str, settings.tokens)), settings.max_new_tokens
        prompts = f"{counted(settings.prompts, 'prompt')} of {new} new tokens"
        work = f"{counted(drafts, 'model')}, {prompts}, {counts} of them drafted"
        weights = None
        if self.shape and self.pruned:  # the base alone and the base with its draft take turns
            weights = _bytes(settings.dtype) * (2 * self.shape.parameters + self.pruned.parameters)
        return self._engine("draft", work, 1, weights, drafts * settings.prompts)

    def _engine(self, stage: str, work: str, processes: int, weights: int | None, amount: int | None) -> Cost:
        """Return the cost of processes with vLLM: its part of a GPU; or process, weights and KV cache.

        On GPUs it does not fit where the weights of one leave nothing of vLLM's part to the KV cache.
        """
        section = self.compute.evaluate if stage == "evaluate" else self.compute.distill
        if section.gpus:
            options, gpu = section.engine_options(), self.compute.ray.gpu_memory_gb
            parts = f"vLLM takes {options.gpu_memory_utilization:.0%} of a GPU"
            if weights is None:
                return Cost(stage, work, processes, None, parts, amount=amount)
            each = weights / options.tensor_parallel_size / options.pipeline_parallel_size
            each = max(0.0, each - (options.cpu_offload_gb or 0) * 2**30) / 1e9
            fits = each < options.gpu_memory_utilization * gpu if gpu else None
            return Cost(stage, work, processes, None, f"{parts}, weights {each:.2f} of it", fits, amount)
        cache = round(section.engine.kv_cache_gib * 2**30)
        bytes_each = weights and weights + memory.ENGINE_BYTES + cache
        return self._cost(stage, work, processes, bytes_each, f"of it KV cache {cache / 1e9:.1f}", 0, amount)

    def train(self, model: str, settings: TrainSettings, rows: int | None) -> Cost:
        own, section, name = settings.train, self.compute.train, f"train ({model})"
        steps = "steps unknown" if rows is None else counted(own.count_steps(rows), "step")
        amount = rows and rows * own.epochs
        most = section.micro_batch * own.max_tokens
        tokens = min(most, section.pass_tokens or most)
        work = f"{steps} of {own.global_batch_size} rows, up to {tokens} tokens a pass"
        if not (pruned := self.pruned):
            return self._cost(name, work, section.workers.max, None, "", section.gpus, amount)
        trained = trained_parameters(pruned, own, self.recipe.prune)
        bytes_by_purpose = self._training_bytes(settings, pruned, trained, tokens)
        parts = f"{trained / 1e6:.1f} of {pruned.parameters / 1e6:.1f} M parameters are trained; "
        parts += ", ".join(f"{purpose} {value / 1e9:.2f}" for purpose, value in bytes_by_purpose.items())
        if section.gpus:
            parts += _main_memory(own, section, pruned)
        bytes_each = sum(bytes_by_purpose.values()) + memory.PROCESS_BYTES
        return self._cost(name, work, section.workers.max, bytes_each, parts, section.gpus, amount)

    def _training_bytes(
        self, settings: TrainSettings, pruned: memory.Shape, trained: int, tokens: int
    ) -> dict[str, int]:
        """Return the bytes of one worker by purpose, without the process; those of its GPU where it has one.

        trained: parameters; tokens: of a pass.
        """
        section, number, soft = self.compute.train, _bytes(settings.train.dtype), settings.soft
        needs = memory.training_memory(
            pruned,
            trained,
            workers=section.workers.min,
            zero_stage=section.zero_stage,
            half=settings.train.dtype == "bfloat16",
            tokens=tokens,
            loss_tokens=tokens // 2,  # not known before the rows are read
            gradient_checkpointing=section.gradient_checkpointing,
        )
        weights, optimizer = needs.weights, needs.optimizer
        if section.gpus and section.offload != "none":
            optimizer = 0
        if section.gpus and section.offload == "all":
            weights -= number * pruned.parameters // section.workers.min
        named = {"weights": weights, "gradients": needs.gradients, "optimizer": optimizer}
        named |= {"activations": needs.activations}
        if self.shape and soft and not soft.likeliest:  # the base, of which adapters share all but the removed blocks
            shared = pruned.parameters if settings.train.method == "lora" and section.zero_stage < 3 else 0
            named |= {"teacher": number * (self.shape.parameters - shared)}
        return named

    def retention(self, settings: Retention, models: int) -> Cost:
        work = f"{models} models x up to {settings.rows} rows and {settings.texts} texts"
        bytes_each = None
        if self.shape and self.pruned:  # the base beside a model, and pieces of their logits
            number = _bytes(self.recipe.evaluate.dtype)
            bytes_each = memory.holding_memory(self.shape, number, settings.max_tokens)
            bytes_each += number * self.pruned.parameters
            bytes_each += 5 * 4 * min(retention.PIECE_LOGITS, settings.max_tokens * self.shape.vocabulary)
        held_out = min(settings.rows, sum(source.held_out for source in self.recipe.sources))
        amount = models * (2 * held_out + settings.texts)  # rows: what the base wrote, and the reference
        gpus = self.compute.evaluate.gpus
        return self._cost("retention", work, self._at_once(models), bytes_each, "", gpus, amount)

    def evaluate(self, models: int) -> Cost:
        settings, section = self.recipe.evaluate, self.compute.evaluate
        items = counted(settings.limit, "item") if settings.limit else "all items"
        work = f"{models} models x {counted(len(settings.tasks), 'task')}, {items} each"
        each = [self._items(task) for task in settings.tasks]
        amount = None if None in each else models * sum(count or 0 for count in each)
        number, bytes_each = _bytes(settings.dtype), None
        if self.shape:
            bytes_each = memory.holding_memory(self.shape, number, section.batch_size * 256)
        if settings.engine == "vllm":
            weights = number * self.shape.parameters if self.shape else None
            if weights is not None and bytes_each is not None and not section.gpus:
                weights += bytes_each  # of the model in transformers, which stays beside it on a CPU
            return self._engine("evaluate", work, self._at_once(models * section.actors), weights, amount)
        at_once = self._at_once(models * (section.actors if section.actors > 1 else len(settings.tasks)))
        return self._cost("evaluate", work, at_once, bytes_each, "", section.gpus, amount)

    def _items(self, task: str) -> int | None:
        """Return how many items a task has, at most; None where that is not known."""
        settings = self.recipe.evaluate
        if task == HELD_OUT:  # all of those that are checked, whatever the limit
            return sum(source.held_out for source in self.recipe.sources if source.answer != "none")
        return way_of(settings.preset, task).count(settings.limit)

    def _at_once(self, stages: int) -> int:
        """Return how many evaluations run side by side on this machine; 1 where that is not known."""
        section = self.compute.evaluate
        if self.compute.ray.address != "local" or section.gpus:
            return 1
        return max(1, min(cores() // settled(section.cpus), stages))

    def _cost(
        self, stage: str, work: str, processes: int, bytes_each: int | None, parts: str, gpus: float, amount: int | None
    ) -> Cost:
        room = self.compute.room(processes, gpus)
        fits = None if bytes_each is None or room is None else bytes_each <= room
        return Cost(stage, work, processes, bytes_each and round(bytes_each / 1e9, 2), parts, fits, amount)


def _stored_bytes(model: LocalModel | HubModel) -> int | None:
    """Return the bytes of a model's weights as stored, which may be quantised; None where they are not here."""
    if isinstance(model, HubModel) or not (path := sources.model_path(model, "distill.teacher.path")).is_dir():
        return None
    return sum(file.stat().st_size for file in weight_files(path))


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


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _training_rows(stage: Stage[TrainSettings], storage: Storage) -> int | None:
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
    most = most_rows(rows.settings.origin)
    return None if math.isinf(most) else int(most)
