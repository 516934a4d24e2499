"""Whether vLLM reads the models of a recipe with the options of the compute file: before an engine starts, hours later.

In: recipe, compute file, and the facts of base and teacher where these are on this machine. Out: nothing, or a
UserError. What vLLM itself refuses is refused here with the key of our files.
"""

from __future__ import annotations

from importlib.util import find_spec

from sdft_ray import cpu
from sdft_ray.data.readers import read_json
from sdft_ray.engine import rounds_activations
from sdft_ray.errors import UserError, problem
from sdft_ray.models import sources
from sdft_ray.models.directory import ModelFacts
from sdft_ray.progress import log
from sdft_ray.spec.compute import Compute, Distill, EngineOptions
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.sources import LocalModel, ServedModel

# vLLM's code of these also holds that of their eyes; PyPI's torchvision does not work beside a CPU's torch.
_NEED_TORCHVISION = (
    *("gemma3", "gemma4", "llama4", "mistral3"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text"),
)
TORCHVISION = "0.28.0"  # of the locked torch; any newer one asks for a newer torch
# Their linear attention has no other kernel on a CPU.
_IN_BFLOAT16 = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text")
# Without an error (docs/architectures.md).
_OTHER_TEXT = ("gpt_neox", "gpt_oss", "lfm2")


def require_fitting(recipe: Recipe, compute: Compute, base: ModelFacts | None, teacher: ModelFacts | None) -> None:
    """Raise UserError for a model that vLLM does not read with these options; teacher: the model that rewrites, None
    where none does or it is not on this machine."""
    distill = "distill", compute.distill.gpus, compute.distill.engine_options()
    evaluate = "evaluate", compute.evaluate.gpus, compute.evaluate.engine_options()
    if recipe.draft and base:
        _require_generating(base, *distill)
        _require_precision(base, "draft.dtype", recipe.draft.dtype, compute.distill.gpus)
    if recipe.evaluate.engine == "vllm" and base:
        _require_generating(base, *evaluate)
        _require_precision(base, "evaluate.dtype", recipe.evaluate.dtype, compute.evaluate.gpus)
        _require_room(base, *evaluate)
    if teacher:
        _require_generating(teacher, *distill)
        _require_precision(teacher, "distill.dtype", recipe.distill.dtype, compute.distill.gpus)
        _require_room(teacher, *distill, "the teacher" if recipe.distill.teacher else "the model")
    if recipe.arms.need_rewrites and recipe.distill.lookup and compute.distill.engine.async_scheduling:
        what = "vLLM does not schedule a pass ahead where distill.lookup proposes tokens"
        raise UserError(problem("compute.distill.engine.async_scheduling", what, "Remove it"))
    _require_exact(recipe, compute)
    _require_gpu(*distill)
    _require_gpu(*evaluate)
    if compute.distill.nodes > 1:
        _require_spreadable(recipe, compute.distill)
    if recipe.evaluate.engine == "transformers" and (gpus := compute.evaluate.gpus) > 1:
        what = f"transformers computes on one GPU, so {gpus - 1:g} of {gpus:g} are idle"
        log(problem("compute.evaluate.gpus", what, "Set it to 1, or set evaluate.engine: vllm"))


def _require_spreadable(recipe: Recipe, plan: Distill) -> None:
    """Raise UserError for a stage whose engines cannot be spread over nodes; report layers that are: that only costs
    speed."""
    if recipe.draft:
        what = f"{plan.nodes} nodes hold one engine, and a draft is measured beside its target"
        raise UserError(problem("compute.distill.nodes", what, "Remove draft, or set nodes: 1"))
    gpus, size = int(plan.gpus), plan.tensor_parallel_size
    if recipe.arms.need_rewrites and not isinstance(recipe.distill.teacher, ServedModel) and gpus % size:
        what = f"{size} GPUs share each layer and a node has {gpus}, so each layer waits for the network between nodes"
        do = f"Set it to {gpus}, and pipeline_parallel_size: {plan.nodes}"
        log(problem("compute.distill.tensor_parallel_size", what, do))


def _require_exact(recipe: Recipe, compute: Compute) -> None:
    """Raise UserError for a model in 8 bits whose sums overflow on this machine; what others can is not known."""
    if compute.ray.address != "local" or not cpu.overflows_in_int8():
        return
    what = "vLLM's sums of 8-bit products overflow on this CPU, which has no VNNI"
    is_served = recipe.export and "int8" in recipe.export.formats and recipe.evaluate.engine == "vllm"
    if is_served and not compute.evaluate.gpus:
        raise UserError(problem("export.formats", f"int8: {what}", "Set evaluate.engine: transformers"))
    teacher = recipe.distill.teacher
    if not (recipe.arms.need_rewrites and isinstance(teacher, LocalModel)) or compute.distill.gpus:
        return
    config = sources.model_path(teacher) / "config.json"
    if config.is_file() and rounds_activations(read_json(config).get("quantization_config")):
        do = "Give it in another precision"
        raise UserError(problem("distill.teacher.path", f"{teacher.path} is in int8: {what}", do))


def _require_gpu(section: str, gpus: float, engine: EngineOptions) -> None:
    """Raise UserError for an option of GPUs where an actor has none."""
    for name in ("cpu_offload_gb", "kv_offloading_size"):
        if getattr(engine, name) and not gpus:
            what = f"spares a GPU's memory, and compute.{section}.gpus is 0"
            raise UserError(problem(f"compute.{section}.engine.{name}", what, "Remove it"))


def _require_room(facts: ModelFacts, section: str, gpus: float, engine: EngineOptions, name: str = "the model") -> None:
    """Raise UserError for numbers of tokens that vLLM refuses together; name: of the model."""
    where, own, tokens = f"compute.{section}.engine", engine.max_model_len, engine.max_num_batched_tokens
    if own and facts.context and own > facts.context:
        what = f"{own} is more than {name}'s context of {facts.context}"
        raise UserError(problem(f"{where}.max_model_len", what, f"Lower it to {facts.context} or less"))
    if tokens is None:
        return
    longest = own or facts.context
    if not gpus and longest and tokens < longest:  # prompts are not split there (docs/footguns.md)
        what = f"{tokens} is less than the {longest} tokens of the longest text, which a CPU reads in one pass"
        raise UserError(problem(f"{where}.max_num_batched_tokens", what, f"Raise it to {longest} or more"))
    if tokens < engine.max_num_seqs:
        what = f"{tokens} is less than the {engine.max_num_seqs} sequences of max_num_seqs"
        raise UserError(problem(f"{where}.max_num_batched_tokens", what, f"Raise it to {engine.max_num_seqs} or more"))


def _require_generating(facts: ModelFacts, section: str, gpus: float, engine: EngineOptions) -> None:
    """Raise UserError for a model that vLLM's CPU build does not read, or of which it generates other text
    (docs/architectures.md), or which cannot be spread as the section of the compute file says."""
    if facts.architecture in _OTHER_TEXT and not gpus:
        what = f"vLLM's CPU build generates other text than {facts.architecture}"
        raise UserError(problem(f"compute.{section}.gpus", what, f"Set compute.{section}.gpus: 1"))
    if facts.architecture in _NEED_TORCHVISION and not gpus and find_spec("torchvision") is None:
        what = f"vLLM reads {facts.architecture} with torchvision, which is not installed"
        do = f"Do: pip install --no-deps torchvision=={TORCHVISION} --index-url https://download.pytorch.org/whl/cpu"
        raise UserError(problem(section, what, do))
    if facts.heads and facts.heads % (each := engine.tensor_parallel_size):
        what = f"{each} does not divide the {facts.heads} attention heads of the model"
        do = f"Give one of {', '.join(str(n) for n in range(1, facts.heads + 1) if facts.heads % n == 0)}"
        key = "tensor_parallel_size" if section == "distill" else "gpus"
        raise UserError(problem(f"compute.{section}.{key}", what, do))
    if facts.blocks and facts.blocks % (groups := engine.pipeline_parallel_size):
        _report_uneven(facts.blocks, groups)


def _require_precision(facts: ModelFacts, key: str, dtype: str, gpus: float) -> None:
    """Raise UserError for a model that vLLM's CPU build does not run in the precision at `key`."""
    if facts.architecture in _IN_BFLOAT16 and dtype != "bfloat16" and not gpus:
        what = f"{dtype}: vLLM's CPU build runs the linear attention of {facts.architecture} in bfloat16 alone"
        raise UserError(problem(key, what, f"Set {key}: bfloat16"))


def _report_uneven(blocks: int, groups: int) -> None:
    """Raise UserError where a group of GPUs would get no block; else report that some get more than others, which only
    costs speed: 61 blocks could not be spread at all."""
    where = "compute.distill.pipeline_parallel_size"
    if groups > blocks:
        raise UserError(problem(where, f"{groups} is more than the {blocks} blocks of the model", "Lower it"))
    even = max(n for n in range(1, groups + 1) if blocks % n == 0)
    what = f"{groups} does not divide the {blocks} blocks of the model, so all wait for groups with one block more"
    log(problem(where, what, f"{even} would divide them"))
