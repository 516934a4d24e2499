"""Remove blocks from the tensor names and the config of a model.

In: tensor names and a parsed config.json. Out: their pruned forms. The model is never built: its files are a mapping
from names to bytes, and block numbers are part of the names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.errors import UserError, problem

# Decoders whose blocks are `model.layers.N.` and independent of each other; each is proven by a test that compares
# the pruned model with the base that skips those blocks. Everything else is refused by name, never guessed.
ARCHITECTURES = (
    *("cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_oss"),
    *("granite", "llama", "mistral", "mixtral", "nemotron", "olmo2", "olmo3", "olmoe", "phi3", "qwen2"),
    *("qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2"),
)
# Reasons to refuse some well-known ones.
_REASONS = {
    "its blocks share keys and values": ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
    "it mixes attention with other kinds of block in a pattern that depends on position": (
        *("bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "minimax"),
        *("nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_next", "recurrent_gemma"),
        "zamba2",
    ),
    "its blocks are state-space blocks without attention": ("falcon_mamba", "mamba", "mamba2"),
    "which blocks have experts depends on position": (
        *("deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "llama4_text"),
    ),
    "its language model is a part of a larger one": (
        *("gemma3", "glm4v", "llama4", "llava", "mistral3", "mllama", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"),
    ),
}

# Config lists with one entry a block; a list of that length under another name is refused.
PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")
_NOT_PER_BLOCK = ("architectures", "eos_token_id", "mlp_only_layers")
# Fields from which a per-block list was computed: beside the pruned list they would describe another model.
_PATTERNS = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
}
_BLOCK = re.compile(r"^model\.layers\.(\d+)\.")


def require_supported(architecture: str, where: str) -> None:
    """Raise UserError for an architecture whose pruning is not proven."""
    if architecture not in ARCHITECTURES:
        reasons = [reason for reason, names in _REASONS.items() if architecture in names]
        what = f"cannot prune a {architecture} model: {' and '.join(reasons) or 'not proven to be right'}"
        raise UserError(problem(where, what, f"Give one of these: {', '.join(ARCHITECTURES)}"))


def require_blocks(model: Path, names: Iterable[str], blocks: int) -> None:
    """Raise UserError where tensors have other blocks than the config: the choice of blocks would be a guess."""
    numbers = {block_of(name) for name in names} - {None}
    if numbers != set(range(blocks)):
        what = f"its weights have {len(numbers)} blocks named model.layers.N, its config.json has {blocks}"
        raise UserError(problem(str(model), what, "Give a model whose weights and config.json agree"))


def require_removable(removed: Sequence[int], blocks: int, where: str = "removed blocks") -> None:
    """Raise UserError unless `removed` is some blocks of the model, sorted and distinct, and not all of them."""
    if outside := [block for block in removed if block not in range(blocks)]:
        what = f"{outside[0]} is no block of a {blocks}-block model"
        raise UserError(problem(where, what, f"Give blocks from 0 to {blocks - 1}"))
    if not removed or list(removed) != sorted({*removed}):
        what = f"{list(removed)} is no sorted list of distinct blocks"
        raise UserError(problem(where, what, f"Give blocks from 0 to {blocks - 1}"))
    if len(removed) == blocks:
        what = f"removes every block of a {blocks}-block model"
        raise UserError(problem(where, what, f"Give at most {blocks - 1}"))


def name_blocks(blocks: Sequence[int]) -> str:
    """Return sorted blocks as text: a half-open span where they are contiguous, else a list.

    >>> name_blocks([9, 10, 11]), name_blocks([9, 13])
    ('[9, 12)', '9, 13')
    """
    if blocks[-1] - blocks[0] == len(blocks) - 1:
        return f"[{blocks[0]}, {blocks[-1] + 1})"
    return ", ".join(map(str, blocks))


def rename_tensor(name: str, removed: Sequence[int]) -> str | None:
    """Return a tensor's name without the `removed` blocks, or None where it belongs to one of them.

    >>> [rename_tensor(f"model.layers.{i}.mlp.up_proj.weight", [1, 2]) for i in (0, 2, 3)]
    ['model.layers.0.mlp.up_proj.weight', None, 'model.layers.1.mlp.up_proj.weight']
    """
    if name.endswith("rotary_emb.inv_freq"):  # a buffer that old checkpoints stored and the config determines
        return None
    block = block_of(name)
    if block is None:
        return name
    if block in removed:
        return None
    return _BLOCK.sub(f"model.layers.{block - sum(other < block for other in removed)}.", name)


def block_of(name: str) -> int | None:
    """Return the number of the block that a tensor belongs to, or None where it belongs to none."""
    match = _BLOCK.match(name)
    return int(match[1]) if match else None


def prune_config(config: Mapping[str, Any], removed: Sequence[int]) -> dict[str, Any]:
    """Return config.json for the model without the `removed` blocks.

    `config` has every per-block list spelled out: a pattern would be computed from the new block numbers. Every such
    list loses the same entries.
    """
    blocks = config["num_hidden_layers"]
    require_removable(removed, blocks)
    kept = [block for block in range(blocks) if block not in removed]
    pruned = dict(config, num_hidden_layers=len(kept))
    for key, value in config.items():
        if isinstance(value, list) and len(value) == blocks and key not in _NOT_PER_BLOCK:
            if key not in PER_BLOCK:
                what = f"{key} has one entry a block, and its meaning is not known"
                raise UserError(problem("config.json", what, "Ask for this architecture to be added"))
            pruned[key] = [value[block] for block in kept]
    for key, computed in _PATTERNS.items():
        if pruned.pop(key, None) is not None and computed not in pruned:
            what = f"{key} depends on a block's number, and {computed} is missing"
            raise UserError(problem("config.json", what, f"Write {computed} into it, one entry a block"))
    if isinstance(config.get("max_window_layers"), int):  # so many blocks from the start
        pruned["max_window_layers"] = sum(block < config["max_window_layers"] for block in kept)
    if "mlp_only_layers" in config or "decoder_sparse_step" in config:
        dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
        pruned["mlp_only_layers"] = [i for i, block in enumerate(kept) if block in dense or (block + 1) % step]
        pruned["decoder_sparse_step"] = 1
    return pruned | older_rope(config)


def older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE settings as transformers 4 spells them: it reads only these, and silently uses its defaults."""
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:  # one set for each kind of block
        local = (rope.get("sliding_attention") or {}).get("rope_theta")
        older = {} if local is None else {"rope_local_base_freq": local}
        rope = rope["full_attention"] or {}
    else:
        older = {}
    older |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key not in older}
    return {key: value for key, value in older.items() if config.get(key) is None}
