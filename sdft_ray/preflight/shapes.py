"""The shape of a model that the arithmetic of memory needs, from the headers of its files.

In: a model directory or a GGUF file. Out: `memory.Shape`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import AliasChoices, Field

from sdft_ray.core.surgery import block_of
from sdft_ray.data.readers import read_json
from sdft_ray.models import sources
from sdft_ray.models.directory import load_config
from sdft_ray.models.parts import text_config
from sdft_ray.models.sizes import Shapes, sizes_of_shapes, tensor_shapes
from sdft_ray.preflight import memory
from sdft_ray.spec.sources import HubModel, ModelSource
from sdft_ray.store.record import Record

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
_NEEDED = ("hidden_size", "vocab_size", "num_attention_heads")
_INNER = ("intermediate_size", "ffn_dim", "block_ff_dim")  # the latter are of opt, and of published lfm2
_GATE_OR_UP = ("gate_proj", "up_proj", "w1", "w3")


class _Config(Record):
    """What a shape needs of config.json."""

    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    intermediate_size: int | None = Field(None, validation_alias=AliasChoices(*_INNER))

    @property
    def feed_forward(self) -> int:
        """Of all experts that a token goes through."""
        experts = self.num_experts_per_tok
        inner = (experts and self.moe_intermediate_size) or self.intermediate_size
        assert inner, "a block has a feed-forward part"
        return inner * (experts or 1)


def shape_of(source: ModelSource) -> memory.Shape | None:
    """Return a model's shape; None for a hub model, which has no file here."""
    if isinstance(source, HubModel):
        return None
    path = sources.model_path(source)
    return shape_of_directory(path, source.part) if path.is_dir() else _shape_of_gguf(path)


def shape_of_directory(directory: Path, part: str | None = None) -> memory.Shape:
    """Return the shape of a Hugging Face model directory, or of a part of it."""
    given = text_config(directory) if part else read_json(directory / "config.json")
    if not (given.keys() >= {*_NEEDED} and given.keys() & {*_INNER}):
        given = load_config(directory).to_dict() | given  # the class of a config has what its file leaves out
    config = _Config.model_validate(given)
    head = config.head_dim or config.hidden_size // config.num_attention_heads
    return _shape(
        tensor_shapes(directory, part),
        width=config.hidden_size,
        kv_width=(config.num_key_value_heads or config.num_attention_heads) * head,
        feed_forward=config.feed_forward,
        vocabulary=config.vocab_size,
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
    widths: dict[str, tuple[int, int]] = {}  # of the layers of one name in all blocks, which differ in a mixture
    for name, shape in tensors.items():
        if block_of(name) is not None and len(shape) == 2:
            layer = name.split(".")[-2]
            # In memory gate and up of an expert are one tensor, whose adapter is as wide as both.
            outputs = shape[0] * (2 if ".experts." in name and layer in _GATE_OR_UP else 1)
            before = widths.get(layer, (0, 0))
            widths[layer] = before[0] + shape[1], before[1] + outputs
    count = len(sizes.blocks)
    linear = tuple((layer, inputs // count, outputs // count) for layer, (inputs, outputs) in widths.items())
    return memory.Shape(
        blocks=len(sizes.blocks),
        parameters=sizes.total,
        block_parameters=sum(sizes.blocks) // len(sizes.blocks),
        linear=linear,
        **more,
    )
