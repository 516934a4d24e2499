"""A model directory as one GGUF file, which llama.cpp runs.

In: a Hugging Face directory of a dense decoder. Out: a .gguf file, read back and compared with the weights: float16
and bfloat16 are their rounding exactly, quantised ones are within stated bounds (quants.py). One tensor is in memory at
a time. What GGUF cannot say of a model, such as windows in some of its blocks, is refused by name: llama.cpp would run
another model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.models import quants
from sdft_ray.models.directory import describe_directory, load_config, require_dtype, tensor_places
from sdft_ray.models.sources import read_gguf
from sdft_ray.models.vocabulary import add_vocabulary, name_pre_tokenizer
from sdft_ray.progress import Progress
from sdft_ray.store.files import require_space

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class _Family(NamedTuple):
    """How llama.cpp names and reads an architecture."""

    name: str
    interleaved: bool = False
    """Whether the two halves of a head that RoPE turns are neighbours there, and not half a head apart."""


_FAMILIES = {
    "granite": _Family("granite", interleaved=True),
    "llama": _Family("llama", interleaved=True),
    "mistral": _Family("llama", interleaved=True),
    "qwen2": _Family("qwen2"),
    "qwen3": _Family("qwen3"),
}
_NUMPY: dict[Kind, np.dtype[Any]] = {Kind.F32: np.dtype("float32"), Kind.F16: np.dtype("float16")}  # others are bytes


class Written(NamedTuple):
    """What was written, and how far it is from the weights."""

    file: Path
    tensors: int
    bytes: int
    largest_error: float
    """Of a weight, beyond the rounding of float16 or bfloat16."""
    context: int
    """Tokens."""


def require_format(name: str) -> None:
    """Raise UserError for a format that is not written here."""
    quants.require_library(name, "--format")
    if name == "int8":
        what = "int8 is no GGUF; it is written by a recipe"
        raise UserError(problem("--format", what, "Set export: {formats: [int8]} in the recipe"))
    if "_k" in name and name not in quants.FORMS:
        what, do = f"{name} is not written", f"Write f16, then do: llama-quantize FILE.gguf OUT.gguf {name.upper()}"
        raise UserError(problem("--format", what, do))
    if name not in quants.FORMS:
        raise UserError(problem("--format", f"{name} is not written", nearest(name, quants.FORMS)))


def write_gguf(model: Path, file: Path, form: str, title: str, progress: Progress) -> Written:
    """Write a model as a GGUF file in a form and compare it with the model; title: its name for people.

    Raises UserError for a model that GGUF cannot say, and StageFailed where the disk is too small.
    """
    describe_directory(model)
    config = load_config(model)
    family = _require_family(model, config)
    writer = gguf.GGUFWriter(None, family.name)
    writer.add_name(title)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{form.upper()}"])
    _add_settings(writer, config)
    add_vocabulary(writer, model, config.vocab_size)
    plan = _plan(model, family, config, form)
    file.parent.mkdir(parents=True, exist_ok=True)
    torn = file.with_name(f".{file.name}.tmp")
    try:
        _write(writer, plan, torn, progress)
        error = _compare(plan, torn, progress)
        torn.replace(file)
    finally:
        writer.close()
        torn.unlink(missing_ok=True)
    return Written(file, len(plan), file.stat().st_size, error, config.max_position_embeddings)


def load_gguf(file: Path, dtype: str) -> PreTrainedModel:
    """Return the model of a file that was written here, with the config beside it: what llama.cpp computes with, in
    another precision."""
    config = load_config(file.parent)
    family = _require_family(file.parent, config)
    names, heads = _tensor_names(family, config), _reordered(family, config)
    stored = {tensor.name: tensor for tensor in read_gguf(file).tensors}
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(config).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        if tensor := stored.get(names.get_name(name, (".weight", ".bias"))):  # else tied to another
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            if count := heads.get(name.split(".")[-2]):
                values = values.reshape(count, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
            weights[name] = torch.from_numpy(np.array(values)).to(getattr(torch, dtype))
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=weights, dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not any(info.values()), info
    return model


# --- what can be said -----------------------------------------------------------------------------------------


def require_sayable(model: Path) -> None:
    """Raise UserError for a model or a tokenizer that GGUF cannot say."""
    _require_family(model, load_config(model))
    name_pre_tokenizer(model / "tokenizer.json")


def _require_family(model: Path, config: PretrainedConfig) -> _Family:
    """Return how llama.cpp reads a model; raises UserError where it would compute something else."""
    if not (family := _FAMILIES.get(config.model_type)):
        what = f"is a {config.model_type} model, which is not written as GGUF here (known: {', '.join(_FAMILIES)})"
        raise UserError(problem(str(model), what, "Convert it with llama.cpp's convert_hf_to_gguf.py"))
    rope, window = config.rope_parameters, getattr(config, "sliding_window", None)
    scaling = rope.get("rope_type", "default")
    windowed = config.model_type == "mistral" or getattr(config, "use_sliding_window", False)
    faults = {
        f"scales its positions ({scaling})": scaling not in ("default", "llama3"),
        "turns only a part of each head": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "has windows of attention": windowed and window is not None and window < config.max_position_embeddings,
        f"has {config.hidden_act} in its MLP": config.hidden_act != "silu",
    }
    for fault in (fault for fault, is_so in faults.items() if is_so):
        what = f"{fault}, which the GGUF of a {family.name} model cannot say"
        raise UserError(problem(str(model), what, "Serve the directory itself with vLLM"))
    return family


def _add_settings(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Write what llama.cpp builds the model from."""
    head = _head_size(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _head_size(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# --- tensors --------------------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """A tensor of the file."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    source: Path | np.ndarray
    """The safetensors file with its weights, or the weights themselves."""
    source_name: str = ""
    heads: int = 0
    """Of which each has its rows in another order in the file; 0: none."""

    @property
    def stored_as(self) -> np.dtype:
        return _NUMPY.get(self.kind, np.dtype("uint8"))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of what is stored: of numbers, or of bytes."""
        return self.shape if self.kind in _NUMPY else gguf.quant_shape_to_byte_shape(self.shape, self.kind)

    @property
    def bytes(self) -> int:
        return math.prod(self.stored_shape) * self.stored_as.itemsize

    def weights(self) -> np.ndarray:
        """Return the weights in float32, in the order of the file."""
        if isinstance(self.source, np.ndarray):
            return self.source
        with safe_open(self.source, framework="pt") as tensors:  # opened anew: what was read does not stay mapped
            weights: np.ndarray = tensors.get_tensor(self.source_name).float().numpy()
        if self.heads:
            halves = weights.reshape(self.heads, 2, -1, *self.shape[1:])
            weights = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(self.shape)
        return weights


def _plan(model: Path, family: _Family, config: PretrainedConfig, form: str) -> list[_Tensor]:
    """Return the tensors of the file in order; raises UserError for one that GGUF has no place for."""
    names, heads = _tensor_names(family, config), _reordered(family, config)
    plan = []
    for source, (place, stored) in tensor_places(model).items():
        require_dtype(model, source, stored)
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue  # the embeddings once more
        if not (name := names.get_name(source, (".weight", ".bias"))):
            what = f"holds {source}, which the GGUF of a {family.name} model has no place for"
            raise UserError(problem(str(model), what, "Serve the directory itself with vLLM"))
        kind = quants.kind_of(name, stored.shape, form, config.num_hidden_layers, config.tie_word_embeddings)
        plan.append(_Tensor(name, kind, stored.shape, place, source, heads.get(source.split(".")[-2], 0)))
    return plan if config.rope_parameters.get("rope_type", "default") == "default" else [*plan, _stretched(config)]


def _tensor_names(family: _Family, config: PretrainedConfig) -> Any:
    """Return what knows the names of tensors in the file by those in the model."""
    (architecture,) = (each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    return gguf.get_tensor_name_map(architecture, config.num_hidden_layers)


def _reordered(family: _Family, config: PretrainedConfig) -> dict[str, int]:
    """Return the modules whose rows have another order in the file, each with its number of heads."""
    if not family.interleaved:
        return {}
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}


def _stretched(config: PretrainedConfig) -> _Tensor:
    """Return the divisor of each frequency of RoPE in a model that stretches its positions as Llama 3.1 does."""
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    size = _head_size(config)
    plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, size, 2, dtype=np.float32) / size)
    factors = (plain / stretched.numpy()).astype(np.float32)
    return _Tensor("rope_freqs.weight", Kind.F32, factors.shape, factors)


def _write(writer: gguf.GGUFWriter, plan: Sequence[_Tensor], file: Path, progress: Progress) -> None:
    """Write the file; raises StageFailed where the disk is too small."""
    require_space(file.parent, sum(tensor.bytes for tensor in plan))
    for tensor in plan:
        writer.add_tensor_info(tensor.name, tensor.stored_shape, tensor.stored_as, tensor.bytes, tensor.kind)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    progress.begin(2 * len(plan))
    for done, tensor in enumerate(plan, 1):
        writer.write_tensor_data(_quantised(tensor))
        progress.update(done, "writing")
    writer.close()


def _quantised(tensor: _Tensor) -> np.ndarray:
    """Return a tensor as it is stored; raises UserError for weights that its kind cannot hold."""
    weights, most = tensor.weights(), quants.LARGEST.get(tensor.kind, float("inf"))
    if not (largest := np.abs(weights).max(initial=0)) <= most:
        what = f"holds weights up to {largest:.3g}, and {tensor.kind.name} ends at {most:.3g}"
        raise UserError(problem(tensor.source_name, what, "Write it as bf16"))
    return quants.encode(weights, tensor.kind)


# --- the proof ------------------------------------------------------------------------------------------------


def _compare(plan: Sequence[_Tensor], file: Path, progress: Progress) -> float:
    """Return the largest error of a weight, after proving that the file holds the model's weights."""
    written = {tensor.name: tensor for tensor in read_gguf(file).tensors}
    assert written.keys() == {tensor.name for tensor in plan}, f"{file} holds other tensors"
    largest = 0.0
    for done, tensor in enumerate(plan, len(plan) + 1):
        if (error := quants.error_of(tensor.weights(), written[tensor.name].data, tensor.kind)) is None:
            raise RuntimeError(f"{tensor.name} in the file is not {tensor.source_name} of the model")
        largest = max(largest, error)
        progress.update(done, "comparing")
    return largest
