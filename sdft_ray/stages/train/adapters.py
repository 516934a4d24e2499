"""The model that is trained, with fresh adapters for LoRA: with weights, and as an outline without any.

In: a model directory and the training settings. Out: a model, or a UserError for targets that do not fit it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdft_ray.core.patch import gaps
from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.models.depth import blocks_in
from sdft_ray.spec import training
from sdft_ray.store.manifest import read_manifest
from sdft_ray.store.record import Record

LAST_BLOCKS = 3
"""That train.scope: last trains."""


class Removed(Record):
    """What a cut and a patch say in their manifests."""

    removed: tuple[int, ...]


# Linear layers that take no adapter. On a GPU state-space blocks multiply with the weights of out_proj themselves, past
# an adapter, and peft refuses it; llama4's router returns two tensors.
_BARE = {name: ["out_proj"] for name in ("falcon_h1", "granitemoehybrid", "nemotron_h")} | {"llama4_text": ["router"]}


def load_model(base: str, settings: training.Train) -> Any:
    """Return the model that is trained: with fresh adapters for LoRA, else as it is."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, settings.dtype))
    torch.manual_seed(settings.seed)  # behind the load, for which some models draw random numbers (Qwen 3.5)
    return adapt(model, Path(base), settings)


def removed_from(base: Path) -> tuple[int, ...]:
    """Return which blocks of the unpruned model are not in a pruned or patched one."""
    manifest = read_manifest(base)
    assert manifest, f"{base} is an artifact of a cut or a patch"
    return Removed.model_validate(manifest.summary).removed


def blocks_in_scope(base: Path, settings: training.Train) -> tuple[int, ...] | None:
    """Return which blocks of a pruned model are trained; None where all of it is."""
    if settings.scope == "all":
        return None
    blocks = blocks_in(base)
    if settings.scope == "last":
        return tuple(range(max(0, blocks - LAST_BLOCKS), blocks))
    removed = removed_from(base)
    beside = {block - sum(gone < block for gone in removed) for gap in gaps(removed) for block in gap}
    return tuple(sorted(beside & {*range(blocks)}))


def adapt(model: Any, base: Path, settings: training.Train) -> Any:
    """Return the model of a directory as it is trained: with LoRA adapters, and frozen, where the settings say so.

    Adapters out of scope stay as they are made, and then add nothing.
    """
    # Of all ways to make a model, only reading its files has every weight trained (a router's bias in ernie4_5_moe).
    adapted = model.requires_grad_() if settings.method == "full" else _add_adapters(model, settings)
    if (blocks := blocks_in_scope(base, settings)) is None:
        return adapted
    for name, parameter in adapted.named_parameters():
        block = re.search(r"\.layers\.(\d+)\.", name)
        if not block or int(block[1]) not in blocks:
            parameter.requires_grad_(False)
    return adapted


def _add_adapters(model: Any, settings: training.Train) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = settings.lora
    targets = lora.targets if lora.targets == "all-linear" else list(lora.targets)
    wanted = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=_BARE.get(model.config.model_type) if targets == "all-linear" else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, wanted)


def outline_model(base: Path, settings: training.Train) -> Any:
    """Return the model as it will be trained, without weights; raise UserError for LoRA targets that do not fit it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        kinds = (torch.nn.Linear, torch.nn.Embedding)
        layers = {name: module.weight for name, module in model.named_modules() if isinstance(module, kinds)}
        try:
            outline, refused = adapt(model, base, settings), ""
        except ValueError as error:
            outline, refused = None, str(error)
    if settings.method == "full":
        return outline
    asked = set() if settings.lora.targets == "all-linear" else set(settings.lora.targets)
    if outline:  # what peft took for the experts of a mixture, which are no linear layers, it has put elsewhere
        asked &= outline.peft_config["default"].target_modules
    for target in sorted(asked):
        _require_own_weights(target, layers)
    if refused:  # experts take no dropout, and gate and up, one tensor, go together
        raise UserError(problem("train.lora", f"peft says: {refused}", "Set dropout: 0, or other targets"))
    return outline


def _require_own_weights(target: str, layers: Mapping[str, Any]) -> None:
    """Raise UserError where a LoRA target names no layer of a model, or one that shares its weights with another.

    peft changes such weights at one of the two ends, and no model that keeps them tied can hold the result. Untied, a
    pruned model would grow again, and vLLM reads no head of its own for cohere and gemma2.
    """
    named = {name for name in layers if name == target or name.endswith(f".{target}")}
    if not named:
        short = {name.rpartition(".")[2] for name in layers}
        raise UserError(
            problem("train.lora.targets", f"the model has no linear layer {target}", nearest(target, short))
        )
    for name, weight in layers.items():
        tied = [other for other in named if other != name and layers[other] is weight]
        if tied:
            what = f"{target} has the weights of {name} (tie_word_embeddings), and an adapter would part the two"
            raise UserError(problem("train.lora.targets", what, f"Leave {target} out, or set train.method: full"))


def count_parameters(outline: Any) -> tuple[int, int]:
    """Return how many parameters are trained, and how many the model has without adapters."""
    trained = sum(parameter.numel() for parameter in outline.parameters() if parameter.requires_grad)
    own = sum(parameter.numel() for name, parameter in outline.named_parameters() if ".lora_" not in name)
    return trained, own


def name_adapters(outline: Any, all_asked: bool = False) -> tuple[list[str], list[str]]:
    """Return which matrices of a block have adapters, and which have none: those that are no linear layers, and of the
    linear ones those for which all were asked.

    Of olmoe all have them, fused experts and router, too; of gpt_oss the experts and the router have none; of glm4_moe
    the blocks and the shared experts that no router reaches.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    adapted = {
        f"{name}.{getattr(module, 'parameter_name', 'weight')}"
        for name, module in outline.named_modules()
        if isinstance(module, LoraLayer)
    }
    linear = {name for name, module in outline.named_modules() if isinstance(module, torch.nn.Linear)}
    if all_asked:
        linear = {name for name in linear if ".base_layer" in name or ".lora_" in name}
    matrices = {name for name, parameter in outline.named_parameters() if parameter.dim() > 1}
    bare = {name for name in matrices if name.rpartition(".")[0] not in linear}

    def in_block(names: set[str]) -> set[str]:
        short = (name.partition(".layers.")[2].partition(".")[2].replace(".base_layer", "") for name in names)
        return {name.removesuffix(".weight") for name in short if name}

    return sorted(in_block(adapted)), sorted(in_block(bare) - in_block(adapted))
