"""A tiny model with quantised weights, as publishers write them, beside the plain model of the same rounded weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Parts = dict[str, torch.Tensor]


def _by_group(weight: torch.Tensor) -> torch.Tensor:
    return weight.float().reshape(weight.shape[0], -1, GROUP)  # (out, groups, GROUP)


def _pack(values: torch.Tensor) -> torch.Tensor:
    """Return (n, 8 m) numbers of 4 bits as (n, m) of 32, the first lowest."""
    packed = sum(values.reshape(len(values), -1, 8).long()[..., i] << (4 * i) for i in range(8))
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def to_gptq(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    grouped = _by_group(weight)
    scale = (grouped.abs().amax(-1, keepdim=True) / 7).half()
    values = (grouped / scale.float()).round().clamp(-8, 7) + 8
    groups = grouped.shape[1]
    parts = {
        "qweight": _pack(values.reshape(weight.shape)).T.contiguous(),
        "scales": scale[..., 0].T.contiguous(),
        "qzeros": _pack(torch.full((groups, weight.shape[0]), 7)),  # as its first version writes 8
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return parts, ((values - 8) * scale.float()).reshape(weight.shape)


def to_awq(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    grouped = _by_group(weight)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    values = ((grouped / scale.float()).round() + zero).clamp(0, 15)

    def pack(table: torch.Tensor) -> torch.Tensor:
        return _pack(table.reshape(len(table), -1, 8)[..., _AWQ_ORDER].reshape(table.shape))

    parts = {
        "qweight": pack(values.reshape(weight.shape).T.contiguous()),
        "scales": scale[..., 0].T.contiguous(),
        "qzeros": pack(zero[..., 0].T.contiguous()),
    }
    return parts, ((values - zero) * scale.float()).reshape(weight.shape)


FORMS: dict[str, tuple[Callable[[torch.Tensor], tuple[Parts, torch.Tensor]], dict]] = {
    "gptq": (to_gptq, {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}),
    "awq": (to_awq, {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
}


def quantise(base: Path, directory: Path, form: str) -> tuple[Path, Path]:
    """Write a model with quantised matrices in its blocks, and the plain model of these; return both."""
    quantised, rounded = directory / form, directory / "rounded"
    write, settings = FORMS[form]
    tensors, plain = {}, {}
    for name, weight in load_file(base / "model.safetensors").items():
        if name.endswith("proj.weight"):
            parts, plain[name] = write(weight)
            tensors |= {f"{name.removesuffix('weight')}{part}": values for part, values in parts.items()}
        else:
            tensors[name] = plain[name] = weight
    for folder, content in ((quantised, tensors), (rounded, plain)):
        shutil.copytree(base, folder)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": form} | settings
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised, rounded
