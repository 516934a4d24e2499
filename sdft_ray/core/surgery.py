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

# Decoders whose blocks are independent of each other; each is proven by a test that compares the pruned model with
# the base that skips those blocks. Everything else is refused by name, never guessed.
ARCHITECTURES = (
    *("apertus", "arcee", "cohere", "cohere2", "deepseek_v3", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon_h1"),
    *("gemma", "gemma2", "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt_neox", "gpt_oss", "granite"),
    *("granitemoehybrid", "hunyuan_v1_dense", "lfm2", "llama", "llama4_text", "ministral3", "mistral", "mixtral"),
    *("nemotron", "nemotron_h", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe"),
    *("qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "stablelm"),
    "starcoder2",
)
# Reasons to refuse some well-known ones.
_REASONS = {
    "its blocks share keys and values": ("gemma3n", "gemma3n_text"),
    "it mixes attention with other kinds of block in a pattern that depends on position": (
        *("bamba", "jamba", "kimi_linear", "minimax", "recurrent_gemma", "zamba2"),
    ),
    "its blocks are state-space blocks without attention": ("falcon_mamba", "mamba", "mamba2"),
    "its language model is a part of a larger one": (
        *("glm4v", "llava", "mllama", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"),
    ),
    "its language model is a part of a larger one, which model.part: text takes out, and all puts back": (
        *("gemma3", "gemma4", "llama4", "mistral3", "qwen3_5", "qwen3_5_moe"),
    ),
}

# Config fields by what they say of blocks; those that a file leaves to its config class are written out before.
PER_BLOCK = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "hybrid_override_pattern")
"""With one entry a block, or one letter; a list of that length under another name is refused."""
_NOT_PER_BLOCK = (
    *("architectures", "eos_token_id", "mlp_only_layers", "moe_layers", "full_attn_idxs", "mtp_layers_block_type"),
    *("mlp_multipliers", "ssm_multipliers", "time_step_limit"),
)
_FROM_START = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
"""A count of blocks from the start."""
_HEADS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""A count of heads that predict further tokens. They read the last state of the uncut model, so a cut drops them."""
# Fields from which a per-block list was computed: beside the pruned list they would describe another model.
_PATTERNS = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "full_attention_interval": "layer_types",
    "full_attn_idxs": "layer_types",
}
_SHARED = ("num_kv_shared_layers", "hidden_size_per_layer_input")
"""Where set, blocks read others' keys and values, or slices of one tensor for all blocks (gemma4's small models)."""
BY_POSITION = (
    *("num_hidden_layers", "mlp_only_layers", "decoder_sparse_step", "moe_layers", "interleave_moe_layer_step"),
    *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", *_FROM_START, *_HEADS, *_PATTERNS),
    *("per_layer_config", *_SHARED),
)
"""Other fields that say something of blocks by their numbers."""
BLOCK = re.compile(r"^(?:model|model\.decoder|gpt_neox|backbone)\.layers\.(\d+)\.(.+)")
"""Names of tensors of blocks: the block's number, and the name within it."""
_DETERMINED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
"""Ends of names of buffers that old checkpoints stored (the masks are gpt_neox's) and the config determines."""
BUFFERS = ("mlp.act_fn.beta", "mlp.act_fn.eps", "gate.e_score_correction_bias", "layer_scalar")
"""Ends of names of stored tensors that are no parameters."""
EMBEDDINGS = (
    *("model.embed_tokens.weight", "gpt_neox.embed_in.weight", "model.decoder.embed_tokens.weight"),
    *("backbone.embeddings.weight", "model.embeddings.weight"),
)


def require_supported(architecture: str, where: str) -> None:
    """Raise UserError for an architecture whose pruning is not proven."""
    if architecture not in ARCHITECTURES:
        reasons = [reason for reason, names in _REASONS.items() if architecture in names]
        what = f"cannot prune a {architecture} model: {' and '.join(reasons) or 'not proven to be right'}"
        raise UserError(problem(where, what, f"Give one of these: {', '.join(ARCHITECTURES)}"))


def count_blocks(config: Mapping[str, Any]) -> int:
    """Return the number of blocks of a config.json; 0 where it names none. nemotron_h has only their kinds."""
    if isinstance(named := config.get("num_hidden_layers"), int) and named:
        return named
    return len(next((value for key in PER_BLOCK if isinstance(value := config.get(key), list | str)), ()))


def further_blocks(config: Mapping[str, Any]) -> range:
    """Return the numbers behind the last block under which files store heads that predict further tokens."""
    blocks = count_blocks(config)
    counts = (count for key in _HEADS if type(count := config.get(key)) is int)
    return range(blocks, blocks + max(counts, default=0))


def require_blocks(model: Path, names: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise UserError where tensors have other blocks than the config: the choice of blocks would be a guess."""
    blocks = count_blocks(config)
    further = further_blocks(config)
    numbers = {block for name in names if (block := block_of(name)) is not None and block not in further}
    if len(numbers) != blocks or max(numbers, default=-1) != blocks - 1:
        what = f"its weights have {len(numbers)} blocks named model.layers.N, its config.json has {blocks}"
        raise UserError(problem(str(model), what, "Give a model whose weights and config.json agree"))
    _require_own_parts(str(model), config)
    _require_known_lists(config)


def _require_known_lists(config: Mapping[str, Any]) -> None:
    """Raise UserError for a list that may say something of each block, and nobody knows what."""
    blocks, known = count_blocks(config), {*PER_BLOCK, *_NOT_PER_BLOCK}
    for key, value in config.items():
        if isinstance(value, list) and len(value) == blocks and key not in known:
            what = f"{key} has one entry a block, and its meaning is not known"
            raise UserError(problem("config.json", what, "Ask for this architecture to be added"))


def _require_own_parts(where: str, config: Mapping[str, Any]) -> None:
    """Raise UserError for a model whose blocks share more than the residual stream."""
    if shared := [key for key in _SHARED if config.get(key)]:
        what = f"cannot prune it: its blocks share tensors, or keys and values ({shared[0]} is {config[shared[0]]})"
        raise UserError(problem(where, what, "Give a model in which it is 0"))


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
    if name.endswith(_DETERMINED) or name.startswith("mtp."):  # the latter are heads that predict further tokens
        return None
    match = BLOCK.match(name)
    if match is None:
        return name
    if (block := int(match[1])) in removed:
        return None
    return f"{name[: match.start(1)]}{block - sum(other < block for other in removed)}{name[match.end(1) :]}"


def block_of(name: str) -> int | None:
    """Return the number of the block that a tensor belongs to, or None where it belongs to none."""
    match = BLOCK.match(name)
    return int(match[1]) if match else None


def decoder_of(model: Any) -> Any:
    """Return the part of a loaded model that holds its blocks as `layers`."""
    found = model.get_decoder()
    return found if hasattr(found, "layers") else found.model  # llama4's head returns itself


def prune_config(config: Mapping[str, Any], removed: Sequence[int]) -> dict[str, Any]:
    """Return config.json for the model without the `removed` blocks.

    `config` has everything spelled out that depends on a block's number: it would be computed from the new numbers.
    Every per-block list loses the same entries.
    """
    blocks = count_blocks(config)
    require_removable(removed, blocks)
    _require_known_lists(config)
    kept = [block for block in range(blocks) if block not in removed]
    pruned = dict(config, num_hidden_layers=len(kept))
    for key, value in config.items():
        if key in PER_BLOCK and isinstance(value, str):
            pruned[key] = "".join(value[block] for block in kept)
        elif key in PER_BLOCK and isinstance(value, list) and len(value) == blocks:
            pruned[key] = [value[block] for block in kept]
    for key, computed in _PATTERNS.items():
        if pruned.pop(key, None) is not None and computed not in pruned:
            what = f"{key} depends on a block's number, and {computed} is missing"
            raise UserError(problem("config.json", what, f"Write {computed} into it, one entry a block"))
    pruned |= {key: sum(block < config[key] for block in kept) for key in _FROM_START if type(config.get(key)) is int}
    pruned |= {key: 0 for key in _HEADS if config.get(key)}
    pruned |= _place_experts(config, kept)
    if isinstance(own := config.get("per_layer_config"), Mapping):  # by a block's number, which is text in a file
        by_block = {int(block): fields for block, fields in own.items()}
        pruned["per_layer_config"] = {str(i): by_block[block] for i, block in enumerate(kept) if block in by_block}
    _require_own_parts("config.json", config)
    _require_attention(config, kept)
    return pruned | older_rope(config)


def _place_experts(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return the fields that say by number which blocks have experts, for the blocks that are left."""
    if "mlp_only_layers" in config or "decoder_sparse_step" in config:
        dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
        plain = [i for i, block in enumerate(kept) if block in dense or (block + 1) % step]
        return {"mlp_only_layers": plain, "decoder_sparse_step": 1}
    if isinstance(config.get("moe_layers"), list):  # transformers reads these numbers, vLLM the step alone
        mixed = [i for i, block in enumerate(kept) if block in config["moe_layers"]]
        steps = [step for step in range(1, len(kept) + 2) if mixed == list(range(step - 1, len(kept), step))]
        return {"moe_layers": mixed, "interleave_moe_layer_step": steps[0] if steps else 0}
    if isinstance(config.get("moe_layer_start_index"), int):
        first, last, step = (config[f"moe_layer_{key}"] for key in ("start_index", "end_index", "interval"))
        mixed = [i for i, block in enumerate(kept) if first <= block <= last and not (block + 1) % step]
        mixed = mixed or [len(kept)]  # none has experts
        between = range(mixed[0], mixed[-1] + 1)
        steps = [step for step in range(1, len(kept) + 2) if mixed == [i for i in between if not (i + 1) % step]]
        if not steps:
            what = f"blocks with experts would be {mixed}, and moe_layer_interval has no word for that"
            raise UserError(problem("config.json", what, "Remove a contiguous span, or other blocks"))
        return {"moe_layer_start_index": mixed[0], "moe_layer_end_index": mixed[-1], "moe_layer_interval": steps[0]}
    return {}


def _require_attention(config: Mapping[str, Any], kept: Sequence[int]) -> None:
    """Raise UserError for a cut that leaves no block of attention, or none of full attention last where one must be."""
    kinds = config.get("layer_types") or config.get("layers_block_type") or ["attention"] * count_blocks(config)
    attends = [kind != "linear_attention" and ("attention" in kind or kind == "hybrid") for kind in kinds]
    if any(attends) and not any(attends[block] for block in kept):
        blocks = [block for block, attending in enumerate(attends) if attending]
        what = f"the cut leaves no block of attention: the base has {name_blocks(blocks)}"
        raise UserError(problem("prune.blocks", what, "Remove fewer blocks, or raise prune.protect"))
    if config.get("model_type") == "gemma4_text" and kinds[kept[-1]] != "full_attention":
        what = f"the last block would be {kept[-1]}, of {kinds[kept[-1]]}, and gemma4 makes full attention of its last"
        raise UserError(problem("prune.blocks", what, "Set prune.protect.last: 1"))


def older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE settings as transformers 4 spells them: it reads only these, and silently uses its defaults."""
    rope = config.get("rope_parameters") or {}
    if config.get("model_type") == "gemma4_text":  # transformers 4 does not know it, and 5 would read both
        return {}
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
