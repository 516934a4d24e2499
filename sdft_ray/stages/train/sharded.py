"""A model under ZeRO-3 of which each worker holds its own share alone, from the first byte on.

In: a model directory and DeepSpeed's configuration. Out: the model that is trained, spread over the workers. The weight
files are mapped and the elements of a worker's share copied out of them; where transformers fuses what the files hold
piece by piece (experts), one piece at a time is there whole. Nothing is sent between workers but the uninitialised
tensors that DeepSpeed itself broadcasts while it makes the model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.models.directory import tensor_places
from sdft_ray.spec import training
from sdft_ray.stages.train.adapters import adapt

if TYPE_CHECKING:
    import torch

Read = Callable[[str], "torch.Tensor"]
"""Returns a tensor of the files by its name there, mapped."""
# Settings of a user's DeepSpeed JSON with which a worker keeps more than its share, or keeps it in another form.
_OTHER_FORMS = {
    "mics_shard_size",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
}


def is_sharded(config: Mapping[str, Any]) -> bool:
    """Return whether a DeepSpeed configuration gives each worker a plain share of every weight."""
    zero = config["zero_optimization"]
    return zero["stage"] == 3 and not _OTHER_FORMS & zero.keys()


def load_share(base: str, settings: training.Train, config: Mapping[str, Any]) -> Any:
    """Return the model that is trained, as `load_model` does, but spread; all workers must call it."""
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    facts, dtype = AutoConfig.from_pretrained(base), getattr(torch, settings.dtype)
    # Without overrides, which would round the constants that a model computes when it is made (RoPE's frequencies).
    with deepspeed.zero.Init(config_dict_or_path=config, tensor_overrides=[]), no_init_weights():
        model = AutoModelForCausalLM.from_config(facts, dtype=dtype).eval()
    model.tie_weights()
    for buffer in model.buffers():
        buffer.data = buffer.data.to(deepspeed.get_accelerator().current_device_name())
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(facts)
    _fill(model, outline, Path(base))
    torch.manual_seed(settings.seed)
    model = adapt(model, Path(base), settings)
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft keeps adapters in float32; only a model that is not spread yet is cast
            parameter.data = parameter.data.to(dtype)
    return model


def _fill(model: Any, outline: Any, base: Path) -> None:
    """Copy this worker's share of every weight, and all buffers of the files, into a model; the outline has shapes."""
    from safetensors import safe_open

    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    shapes, places, filled = outline.state_dict(), tensor_places(base), set()
    with contextlib.ExitStack() as stack:
        paths = {path for path, _ in places.values()}
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
        for target, source in _find_sources(outline, places).items():
            pieces = source.pieces()
            size = shapes[target].numel() // len(pieces)
            filled.add(id(own[target]))
            for number, piece in enumerate(pieces):
                if len(pieces) > 1 and not _own_range(own[target], number * size, size):
                    continue
                for name, values in source.convert(
                    piece, target, outline, lambda name: files[places[name][0]].get_tensor(name)
                ).items():
                    _copy_own(own[name], number * size, values)
                    filled.add(id(own[name]))
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in filled]
    assert not missing, f"{base} has no {', '.join(missing[:3])}"


@dataclasses.dataclass
class _Source:
    """The tensors of the files that one tensor of a model is made of."""

    converter: Any
    """transformers' conversion; None where the files hold the tensor as it is."""
    names: dict[str, list[str]]
    """Of these tensors, by the pattern of the conversion that they match, in order."""

    def pieces(self) -> list[dict[str, list[str]]]:
        """Return groups of the names, each of which makes one contiguous range of the tensor.

        Experts that the files hold one by one are fused along the first dimension: each makes a range by itself.
        """
        from transformers.core_model_loading import MergeModulelist

        first, *rest = self.converter.operations if self.converter else [None]
        counts = {len(names) for names in self.names.values()}
        by_expert = isinstance(first, MergeModulelist) and first.dim == 0 and len(counts) == 1
        if not (by_expert and all(getattr(operation, "dim", 0) >= 1 for operation in rest)):
            return [self.names]
        return [{pattern: [names[i]] for pattern, names in self.names.items()} for i in range(*counts)]

    def convert(self, piece: Mapping[str, list[str]], target: str, outline: Any, read: Read) -> dict[str, torch.Tensor]:
        """Return the tensors of a model that a piece makes, by name: one, or what a fused tensor is split into."""
        if not self.converter:
            return {target: read(next(iter(piece.values()))[0])}
        converter = copy.deepcopy(self.converter)
        for pattern, names in piece.items():
            for name in names:
                converter.add_tensor(target, name, pattern, read(name))
        made = converter.convert(target, model=outline, config=outline.config)
        return {name: values[0] if isinstance(values, list) else values for name, values in made.items()}


def _find_sources(outline: Any, names: Iterable[str]) -> dict[str, _Source]:
    """Return what each tensor of a model is made of, by the rules of transformers' own loader.

    Names that the model does not know are left out, as its loader does: files also hold what a config determines.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(outline)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = outline.state_dict(), outline.base_model_prefix
    sources: dict[str, _Source] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:  # its name only looks like one to change
            target, pattern = name, None
        if target in known:
            source = sources.setdefault(target, _Source(by_pattern[pattern] if pattern else None, {}))
            source.names.setdefault(pattern or name, []).append(name)
    return sources


def _own_range(target: Any, start: int, size: int) -> range:
    """Return the elements of [start, start + size) of a flat tensor that this worker keeps: of a buffer all."""
    if not hasattr(target, "ds_tensor"):
        return range(start, start + size)
    share = target.ds_tensor.ds_numel
    first = share * target.ds_zero_partition_rank
    return range(max(first, start), min(first + share, start + size))


def _copy_own(target: Any, start: int, values: torch.Tensor) -> None:
    """Copy into a tensor what this worker keeps of values, which stand at `start` of its flat form."""
    import torch

    kept = _own_range(target, start, values.numel())
    if not kept:
        return
    flat, first = target.reshape(-1), 0
    if hasattr(target, "ds_tensor"):
        flat, first = target.ds_tensor, target.ds_tensor.ds_numel * target.ds_zero_partition_rank
    with torch.no_grad():
        flat[kept.start - first : kept.stop - first].copy_(values.reshape(-1)[kept.start - start : kept.stop - start])
