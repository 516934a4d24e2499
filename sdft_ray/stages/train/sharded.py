"""A model under ZeRO-3 of which each worker holds its own share alone, from the first byte on.

In: a model directory and DeepSpeed's configuration. Out: the model that is trained, spread over the workers. The weight
files are mapped and the elements of a worker's share copied out of them; where transformers fuses what the files hold
piece by piece (experts), one piece at a time is there whole. Nothing is sent between workers but the uninitialised
tensors that DeepSpeed itself broadcasts while it makes the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.models.mapped import MappedFiles, find_sources
from sdft_ray.spec import training
from sdft_ray.stages.train.adapters import adapt

if TYPE_CHECKING:
    import torch

# Settings of a user's DeepSpeed JSON with which a worker keeps more than its share, or keeps it in another form.
_OTHER_FORMS = {"zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"}


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
    for parameter in model.parameters():  # some are made in float32, whatever is asked for
        for tensor in (parameter, parameter.ds_tensor):
            tensor.data = tensor.data.to(dtype)
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
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    shapes, filled, files = outline.state_dict(), set(), MappedFiles(base)
    for target, source in find_sources(outline, files.names).items():
        pieces = source.pieces()
        size = shapes[target].numel() // len(pieces)
        filled.add(id(own[target]))
        for number, piece in enumerate(pieces):
            if len(pieces) > 1 and not _own_range(own[target], number * size, size):
                continue
            for name, values in source.convert(piece, target, outline, files.read).items():
                _copy_own(own[name], number * size, values)
                filled.add(id(own[name]))
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in filled]
    assert not missing, f"{base} has no {', '.join(missing[:3])}"


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
