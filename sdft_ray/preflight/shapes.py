"""The shape of a model that the arithmetic of memory needs, from the headers of its files.

In: a model directory or a GGUF file. Out: `memory.Shape`.
"""

from __future__ import annotations

from pathlib import Path

from sdft_ray.core.surgery import block_of
from sdft_ray.data.readers import read_json
from sdft_ray.models import sources
from sdft_ray.models.parts import text_config
from sdft_ray.models.sizes import Shapes, sizes_of_shapes, tensor_shapes
from sdft_ray.preflight import memory
from sdft_ray.spec.sources import HubModel, ModelSource

_FEED_FORWARD = ("intermediate_size", "ffn_dim", "block_ff_dim")  # of opt, of lfm2's published files
# llama.cpp's names of the layers that may get an adapter.
_GGUF = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
_GATE_OR_UP = ("gate_proj", "up_proj", "w1", "w3")


def shape_of(source: ModelSource) -> memory.Shape | None:
    """Return a model's shape; None for a hub model, which has no file here."""
    if isinstance(source, HubModel):
        return None
    path = sources.model_path(source)
    return shape_of_directory(path, getattr(source, "part", None)) if path.is_dir() else _shape_of_gguf(path)


def shape_of_directory(directory: Path, part: str | None = None) -> memory.Shape:
    """Return the shape of a Hugging Face model directory, or of a part of it."""
    config = text_config(directory) if part else read_json(directory / "config.json")
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    experts = config.get("num_experts_per_tok")
    inner = config.get("moe_intermediate_size") if experts else None
    return _shape(
        tensor_shapes(directory, part),
        width=config["hidden_size"],
        kv_width=(config.get("num_key_value_heads") or heads) * head,
        feed_forward=(inner or next(config[key] for key in _FEED_FORWARD if key in config)) * (experts or 1),
        vocabulary=config["vocab_size"],
    )


def _shape_of_gguf(path: Path) -> memory.Shape:
    architecture = sources.gguf_field(path, "general.architecture")

    def number(name: str) -> int:
        return int(sources.gguf_field(path, f"{architecture}.{name}"))

    tensors: dict[str, tuple[int, ...]] = {}
    for tensor in (each for each in sources.read_gguf(path).tensors if not each.name.startswith("rope_")):
        first, _, rest = tensor.name.removeprefix("blk.").partition(".")
        named = rest.removesuffix(".weight")
        name = f"model.layers.{first}.{_GGUF.get(named, named)}.weight" if first.isdigit() else tensor.name
        tensors[name] = tuple(int(size) for size in reversed(tensor.shape))
    width, heads = number("embedding_length"), number("attention.head_count")
    return _shape(
        tensors,
        width=width,
        kv_width=number("attention.head_count_kv") * width // heads,
        feed_forward=number("feed_forward_length"),
        vocabulary=tensors["token_embd.weight"][0],
    )


def _shape(tensors: Shapes, **more: int) -> memory.Shape:
    sizes = sizes_of_shapes(tensors)
    linear = tuple(
        # In memory gate and up of an expert are one tensor, whose adapter is as wide as both.
        (layer, shape[1], shape[0] * (2 if ".experts." in name and layer in _GATE_OR_UP else 1))
        for name, shape in tensors.items()
        if block_of(name) == 0 and len(shape) == 2 and (layer := name.split(".")[-2])
    )
    return memory.Shape(
        blocks=len(sizes.blocks),
        parameters=sizes.total,
        block_parameters=sum(sizes.blocks) // len(sizes.blocks),
        linear=linear,
        **more,
    )
