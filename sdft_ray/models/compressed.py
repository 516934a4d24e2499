"""A model with weights of 8 bits as vLLM loads it: safetensors in the layout of compressed-tensors.

In: a Hugging Face directory of a dense decoder. Out: a directory in which each matrix of a block is int8 with a scale
for each row, read back and compared. Activations are rounded to 8 bits by the engine, token by token as they come, so
nothing is calibrated. The library that vLLM reads such models with rounds the weights; one tensor at a time is in
memory, where its own way loads the whole model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors import safe_open

from sdft_ray.core.surgery import block_of
from sdft_ray.data.readers import read_json
from sdft_ray.errors import UserError, problem
from sdft_ray.models.companions import write_companions
from sdft_ray.models.directory import WEIGHTS_INDEX, describe_directory, require_dtype, stored_tensors
from sdft_ray.models.shards import StoredTensor, read_header, write_tensors
from sdft_ray.progress import Progress
from sdft_ray.store.files import remember_hash, require_space, write_atomically

_SCHEME = preset_name_to_scheme("W8A8", ["Linear"])
_STEPS = 127  # above zero
Tick = Callable[[str], None]
"""Counts a tensor that was written or compared."""


def require_dense(model: Path) -> None:
    """Raise UserError for a model whose blocks hold other things than matrices and vectors."""
    for tensors in stored_tensors(model).values():
        for name, tensor in tensors.items():
            require_dtype(model, name, tensor)
            if block_of(name) is not None and (len(tensor.shape) > 2 or ".experts." in name):
                what = f"holds {name}, and int8 is written of dense decoders alone"
                raise UserError(problem(str(model), what, "Leave int8 out of export.formats"))


def write_int8(model: Path, directory: Path, progress: Progress) -> tuple[int, float]:
    """Write a model's quantised weights, config and companions; return the bytes of its weights, and the largest error
    of one. Raises UserError for a model that is no dense decoder, and StageFailed where the disk is too small."""
    describe_directory(model)
    require_dense(model)
    shards, done = stored_tensors(model), itertools.count(1)
    parts = (part for tensors in shards.values() for name in tensors for _, part in _parts(name, tensors[name]))
    require_space(directory, sum(part.bytes for part in parts))
    progress.begin(2 * sum(map(len, shards.values())))

    def tick(what: str) -> None:
        progress.update(next(done), what)

    places = {name: shard.name for shard in shards for name in _write(shard, directory / shard.name, tick)}
    size = sum((directory / shard.name).stat().st_size for shard in shards)
    if (model / WEIGHTS_INDEX).is_file():
        _write_json(directory / WEIGHTS_INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    rules = QuantizationConfig(
        config_groups={"group_0": _SCHEME},
        format="int-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    config = read_json(model / "config.json")
    _write_json(directory / "config.json", {**config, "quantization_config": rules.model_dump(mode="json")})
    write_companions(model, directory)
    return size, max(_compare(shard, directory / shard.name, tick) for shard in shards)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_atomically(file, json.dumps(content, indent=2) + "\n")


def _write(shard: Path, file: Path, tick: Tick) -> list[str]:
    """Write one file of weights; return the names of its tensors."""
    tensors = read_header(shard)
    plan = [part for name, tensor in tensors.items() for part in _parts(name, tensor)]

    def contents() -> Iterator[bytes]:
        with safe_open(shard, framework="pt") as weights:
            for name in tensors:
                for part in _stored(name, weights.get_tensor(name)):
                    yield part.contiguous().view(torch.uint8).numpy().tobytes()
                tick("writing")

    remember_hash(file, write_tensors(file, plan, contents()))
    return [name for name, _ in plan]


def _is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and block_of(name) is not None and name.endswith(".weight")


def _parts(name: str, tensor: StoredTensor) -> list[tuple[str, StoredTensor]]:
    """Return what a tensor becomes in the file, by name."""
    if not _is_quantised(name, tensor.shape):
        return [(name, tensor)]
    scale = StoredTensor(tensor.dtype, (tensor.shape[0], 1), 0, tensor.shape[0] * tensor.bytes // tensor.elements)
    return [(name, StoredTensor("I8", tensor.shape, 0, tensor.elements)), (f"{name}_scale", scale)]


def _stored(name: str, weight: torch.Tensor) -> list[torch.Tensor]:
    """Return a weight as it is stored: by itself, or as int8 and the scale of each row.

    The scale is rounded to the weights' own precision first: in that one transformers reads it.
    """
    if not _is_quantised(name, tuple(weight.shape)):
        return [weight]
    rules = _SCHEME.weights
    low, high = torch.aminmax(weight.float(), dim=1, keepdim=True)
    scale = calculate_qparams(low, high, rules)[0].to(weight.dtype)
    return [quantize(weight.float(), scale.float(), None, rules, dtype=torch.int8), scale]


def _compare(shard: Path, file: Path, tick: Tick) -> float:
    """Return the largest error of a weight, after proving that the file holds the model's weights.

    Rounding loses half a step. The largest weight of a row is 127.5 steps, and the scale was rounded, too: what lies
    beyond 127 steps is cut off.
    """
    largest = 0.0
    with safe_open(shard, framework="pt") as source, safe_open(file, framework="pt") as written:
        for name in source.keys():  # noqa: SIM118 - it is no mapping
            weight, stored = source.get_tensor(name), written.get_tensor(name)
            if _is_quantised(name, tuple(weight.shape)):
                scale = written.get_tensor(f"{name}_scale").float()
                errors = (dequantize(stored, scale, dtype=torch.float32) - weight.float()).abs()
                allowed = torch.maximum(scale / 2, weight.float().abs() - _STEPS * scale)
                right, largest = bool((errors <= allowed * 1.0001).all()), max(largest, float(errors.max()))
            else:
                right = torch.equal(weight, stored)
            if not right:
                raise RuntimeError(f"{name} in {file} is not that of the model")
            tick("comparing")
    return largest
