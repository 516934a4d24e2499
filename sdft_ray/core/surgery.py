"""Removing blocks from a model's files: which tensors stay, under which names, with which config.

In: tensor names and a parsed config.json. Out: their pruned forms. The model is never built: a checkpoint is a
mapping from names to bytes, and block numbers are part of the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sdft_ray.errors import UserError, problem

# Decoders whose blocks are `model.layers.N.` and independent of each other; each is proven by a test that compares
# the pruned model with the base that skips those blocks. Everything else is refused by name, never guessed.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

# Config lists with one entry a block; a list of that length under another name is refused.
PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")
_NOT_PER_BLOCK = ("architectures", "eos_token_id")
_BLOCK = re.compile(r"^model\.layers\.(\d+)\.")


def require_supported(architecture: str, where: str) -> None:
    """Raise UserError for an architecture whose pruning is not proven."""
    if architecture not in ARCHITECTURES:
        what = f"cannot prune a {architecture} model: not proven to be right"
        raise UserError(problem(where, what, f"Give one of these: {', '.join(ARCHITECTURES)}"))


def require_choosable(size: int, first: int, last: int, blocks: int) -> None:
    """Raise UserError unless `size` blocks can go from a model of which the first and last ones stay."""
    if size >= blocks:
        what = f"{size} removes every block of a {blocks}-block model"
        raise UserError(problem("prune.blocks", what, f"Give 1 to {blocks - 1}"))
    if size > blocks - first - last:
        what = f"leaves {max(0, blocks - first - last)} of {blocks} blocks to remove {size} from"
        raise UserError(problem("prune.protect", what, "Protect fewer, or remove fewer"))


def require_removable(removed: Sequence[int], blocks: int) -> None:
    """Raise UserError unless `removed` is some blocks of the model, sorted and distinct, and not all of them."""
    if not removed or list(removed) != sorted({*removed} & {*range(blocks)}):
        what = f"{list(removed)} is no sorted list of distinct blocks of a {blocks}-block model"
        raise UserError(problem("removed blocks", what, f"Give some of 0 to {blocks - 1}"))
    if len(removed) == blocks:
        what = f"{blocks} removes every block of a {blocks}-block model"
        raise UserError(problem("prune.blocks", what, f"Give 1 to {blocks - 1}"))


def rename_tensor(name: str, removed: Sequence[int]) -> str | None:
    """Return a tensor's name after the `removed` blocks are gone, or None where it goes with them.

    >>> [rename_tensor(f"model.layers.{i}.mlp.up_proj.weight", [1, 2]) for i in (0, 2, 3)]
    ['model.layers.0.mlp.up_proj.weight', None, 'model.layers.1.mlp.up_proj.weight']
    """
    match = _BLOCK.match(name)
    if name.endswith("rotary_emb.inv_freq"):  # a buffer that old checkpoints stored and the config determines
        return None
    if match is None:
        return name
    block = int(match[1])
    if block in removed:
        return None
    return f"model.layers.{block - sum(gone < block for gone in removed)}.{name[match.end() :]}"


def prune_config(config: Mapping[str, Any], removed: Sequence[int]) -> dict[str, Any]:
    """Return config.json for the model without the `removed` blocks.

    Every per-block list loses the same entries; the RoPE base stands in both spellings, because transformers 4 reads
    only the top-level one and silently falls back to 10000.
    """
    blocks = config["num_hidden_layers"]
    require_removable(removed, blocks)
    pruned = dict(config, num_hidden_layers=blocks - len(removed))
    for key, value in config.items():
        if isinstance(value, list) and len(value) == blocks and key not in _NOT_PER_BLOCK:
            if key not in PER_BLOCK:
                what = f"{key} has one entry a block, and its meaning is not known"
                raise UserError(problem("config.json", what, "Ask for this architecture to be added"))
            pruned[key] = [entry for block, entry in enumerate(value) if block not in removed]
    if isinstance(config.get("max_window_layers"), int):
        full = config["max_window_layers"]  # so many blocks from the start attend fully: fewer where they were removed
        full -= sum(block < full for block in removed)
        pruned["max_window_layers"] = min(full, pruned["num_hidden_layers"])
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        pruned.setdefault("rope_theta", rope["rope_theta"])
    return pruned
