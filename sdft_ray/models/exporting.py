"""A model in the forms that other programs serve: written, read back, and loaded again to be evaluated.

In: a model directory and a form (`export.formats`). Out: a directory with weights in that form beside config, tokenizer
and chat template.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sdft_ray.data.readers import read_json
from sdft_ray.models.companions import write_companions
from sdft_ray.models.directory import weight_files
from sdft_ray.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Exported(NamedTuple):
    """What was written."""

    bytes: int
    """Of the weights."""
    largest_error: float
    """Of a weight, beyond the rounding of float16 or bfloat16."""


def require_library(form: str) -> None:
    """Raise UserError for a form of a recipe whose library is not installed here."""
    if form != "int8":
        from sdft_ray.models import quants

        quants.require_library(form, "export.formats")


def require_writable(model: Path, form: str) -> None:
    """Raise UserError for a model that cannot be written in a form."""
    if form == "int8":
        from sdft_ray.models import compressed

        compressed.require_dense(model)
    else:
        from sdft_ray.models import gguf

        gguf.require_sayable(model)


def write(model: Path, directory: Path, form: str, title: str, progress: Progress) -> Exported:
    """Write a model in a form into a directory; title: its name for people. Raises UserError for a model that the form
    does not hold, and StageFailed where the disk is too small."""
    if form == "int8":
        from sdft_ray.models import compressed

        return Exported(*compressed.write_int8(model, directory, progress))
    from sdft_ray.models import gguf

    require_library(form)
    written = gguf.write_gguf(model, directory / _file(form), form, title, progress)
    shutil.copyfile(model / "config.json", directory / "config.json")
    write_companions(model, directory)
    return Exported(written.bytes, written.largest_error)


def _file(form: str) -> str:
    return f"model-{form}.gguf"


def serve_line(directory: str, form: str) -> str:
    """Return the command that serves what was written."""
    if form == "int8":
        return f"vllm serve {directory}"
    return f"llama-server --model {directory}/{_file(form)} --jinja"


def load_causal(directory: Path, dtype: str) -> PreTrainedModel:
    """Return the model of any directory in a precision, one that was written here among them."""
    import torch
    from transformers import AutoModelForCausalLM

    exported = load_exported(directory, dtype)
    return exported or AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))


def load_exported(directory: Path, dtype: str) -> PreTrainedModel | None:
    """Return the model of a directory that was written here, in a precision; None for any other directory.

    Matrices of int8 become numbers again, times their scales, and what goes into them is still rounded to 8 bits.
    """
    if not weight_files(directory) and (files := sorted(directory.glob("*.gguf"))):  # beside weights: another's
        from sdft_ray.models import gguf

        return gguf.load_gguf(files[0], dtype)
    if not read_json(directory / "config.json").get("quantization_config"):
        return None
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    at_once = CompressedTensorsConfig(dequantize=True)  # else at the first call of the whole model, not of its body
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), quantization_config=at_once
    )
    return model
