"""How many parameters a model and each of its blocks have, from the headers of its files.

In: a model directory or a GGUF file. Out: `Sizes`. The model is not built: headers name tensors and shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sdft_ray.core.depth import Sizes
from sdft_ray.core.surgery import BUFFERS, block_of, further_blocks, rename_tensor
from sdft_ray.data.readers import read_json
from sdft_ray.models import sources
from sdft_ray.models.directory import is_tied, tensor_places
from sdft_ray.models.parts import text_config, text_name
from sdft_ray.spec.sources import HubModel, ModelSource

_HEAD = "lm_head.weight"
Shapes = Mapping[str, Sequence[int]]
"""The shape of each tensor, by its name."""


def sizes_of(source: ModelSource) -> Sizes | None:
    """Return the sizes of a recipe's model; None for a model of the hub, which is not here yet."""
    if isinstance(source, HubModel):
        return None
    path = sources.model_path(source)
    return sizes_of_directory(path, source.part) if path.is_dir() else _sizes_of_gguf(path)


def sizes_of_directory(directory: Path, part: str | None = None) -> Sizes:
    """Return the sizes of a Hugging Face model directory, or of a part of it."""
    return sizes_of_shapes(tensor_shapes(directory, part))


def sizes_of_shapes(shapes: Shapes) -> Sizes:
    """Return the sizes of a model whose tensors have these names and shapes."""
    return _count((block_of(name), shape) for name, shape in shapes.items())


def tensor_shapes(directory: Path, part: str | None) -> Shapes:
    """Return the shapes of the parameters of a model directory, or of a part of it; tied ones once."""
    config = text_config(directory) if part else read_json(directory / "config.json")
    named = {text_name(name) if part else name: tensor.shape for name, (_, tensor) in tensor_places(directory).items()}
    further = further_blocks(config)
    # Parameters that a cut keeps where it removes no block.
    kept = {name: shape for name, shape in named.items() if name and rename_tensor(name, further) is not None}
    shapes = {name: shape for name, shape in kept.items() if not name.endswith(BUFFERS)}
    if is_tied(directory, config):
        shapes.pop(_HEAD, None)  # old checkpoints store the embeddings twice
    return shapes


def _sizes_of_gguf(path: Path) -> Sizes:
    blocks = re.compile(r"blk\.(\d+)\.")
    tensors = [tensor for tensor in sources.read_gguf(path).tensors if not tensor.name.startswith("rope_")]
    named = [(blocks.match(tensor.name), [int(size) for size in tensor.shape]) for tensor in tensors]
    return _count((int(match[1]) if match else None, shape) for match, shape in named)


def _count(tensors: Iterable[tuple[int | None, Sequence[int]]]) -> Sizes:
    """Return the sizes of tensors; each with its block, or None."""
    by_block: dict[int | None, int] = {}
    for block, shape in tensors:
        by_block[block] = by_block.get(block, 0) + math.prod(shape)
    blocks = sorted(block for block in by_block if block is not None)
    return Sizes(sum(by_block.values()), tuple(by_block[block] for block in blocks))
