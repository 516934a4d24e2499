"""A tiny random chat model made from its config: seconds to make, real in every part."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What makes blocks of a tiny model differ in kind where the architecture can, and its experts few.
_WINDOWS = {"sliding_window": 4}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MIXED = ["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"]
_UNTIED = {"tie_word_embeddings": False}  # as every model of it; vLLM knows no other
_HYBRID = {"layer_types": [*_MIXED, "linear_attention"]}
_DELTA = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")}
_DELTA |= {f"linear_{kind}_head_dim": 32 for kind in ("key", "value")} | {"full_attention_interval": 2}
_ROUTED = _EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 3}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 8}
FIELDS: dict[str, dict[str, Any]] = {
    "cohere2": _WINDOWS | {"sliding_window_pattern": 3},
    "deepseek_v3": _ROUTED
    | _UNTIED
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
    | {"n_group": 2, "topk_group": 1, "num_key_value_heads": 2, "head_dim": 16}
    | {"topk_method": "noaux_tc", "moe_layer_freq": 1},  # as every config of it; transformers has no such fields
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}
    | {"moe_layer_start_index": 1, "moe_layer_end_index": 4},
    "exaone4": _WINDOWS | {"sliding_window_pattern": 3},
    "gemma2": _WINDOWS | {"query_pre_attn_scalar": 32},
    "gemma3_text": _WINDOWS | {"query_pre_attn_scalar": 32, "sliding_window_pattern": 3},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128, "mlp_multipliers": [1.0, 0.5]},
    "glm4_moe": _ROUTED | _UNTIED,
    "granitemoehybrid": _EXPERTS | _MAMBA | _HYBRID | {"shared_intermediate_size": 32, "residual_multiplier": 0.5},
    "lfm2": {"full_attn_idxs": [1, 4], "block_dim": 64, "conv_dim": 64},  # the latter are read by vLLM alone
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 96, "attention_chunk_size": 64}
    | {"no_rope_layer_interval": 2, "interleave_moe_layer_step": 2},
    "nemotron_h": _EXPERTS
    | _UNTIED
    | {"n_routed_experts": 4, "moe_shared_expert_intermediate_size": 32, "mamba_num_heads": 4, "mamba_head_dim": 32}
    | {"n_groups": 1, "ssm_state_size": 16, "chunk_size": 8}
    | {"layers_block_type": [*_MIXED[:2], "mlp", "moe", *_MIXED[1::-1]]},
    "olmo_hybrid": _HYBRID,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2},
    "qwen3_5_moe_text": _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_5_text": _DELTA,
    "qwen3_next": _DELTA
    | _EXPERTS
    | _UNTIED
    | {"shared_expert_intermediate_size": 32, "mlp_only_layers": [1], "decoder_sparse_step": 2},
    "gemma4_text": _WINDOWS
    | {"layer_types": 3 * ["sliding_attention"] + 3 * ["full_attention"], "global_head_dim": 64}
    | {"hidden_size_per_layer_input": 0},
    "gpt_oss": _WINDOWS | _EXPERTS,
    "mixtral": _EXPERTS,
    "olmo3": _WINDOWS,
    "olmoe": _EXPERTS | _UNTIED,
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 32, "mlp_only_layers": [1], "decoder_sparse_step": 2},
    "qwen3_moe": _EXPERTS | {"mlp_only_layers": [1], "decoder_sparse_step": 2},
    "smollm3": {"no_rope_layer_interval": 2},
}


def make_tiny_model(directory: Path, architecture: str = "llama", **overrides: Any) -> Path:
    """Write a model of 6 blocks, width 64, head size 32 (where vLLM's CPU backend starts), with a byte tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        **FIELDS.get(architecture, {}),
        **overrides,
    }
    torch.manual_seed(0)
    # Far larger than a trained model's: random blocks must matter, or skipping them would go unnoticed.
    config = AutoConfig.for_model(architecture, **fields, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


EYES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
EYES |= {"image_size": 28, "patch_size": 14}
# The wrapper, its text decoder, and its eyes.
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", EYES | {"vision_use_head": False}),  # as every model of it
    "gemma4": ("gemma4_text", EYES | {"num_key_value_heads": 2, "head_dim": 16, "default_output_length": 70}),
    "llama4": ("llama4_text", EYES | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}),
    "mistral3": ("ministral3", EYES | {"head_dim": 16}),
    "qwen3_5": ("qwen3_5_text", {"hidden_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}),
}


def make_wrapped(
    directory: Path, architecture: str, whole: Mapping[str, Any] = MappingProxyType({}), **fields: Any
) -> Path:
    """Write a tiny model with eyes, with a byte tokenizer; whole: fields of its config, fields: of its decoder's."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, eyes = WRAPPERS[architecture]
    own = AutoConfig.from_pretrained(make_tiny_model(directory / "text", text, **fields)).to_dict()
    eyes = {"model_type": "pixtral"} | eyes if architecture == "mistral3" else eyes
    torch.manual_seed(0)
    tied = own["tie_word_embeddings"]
    parts = {"text_config": own, "vision_config": eyes, "tie_word_embeddings": tied}
    config = AutoConfig.for_model(architecture, **parts, **whole)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def make_tokenizer(merges: Sequence[tuple[str, str]] = (), marks: Mapping[str, str] = MappingProxyType({})) -> Any:
    """Return a tokenizer with one token a byte, which round-trips any text, and ChatML's marks; one a merge, and one a
    further mark, by its name in the tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {
        token: i for i, token in enumerate(special + alphabet + [a + b for a, b in merges] + [*marks.values()])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        **({"extra_special_tokens": dict(marks)} if marks else {}),
        clean_up_tokenization_spaces=False,
    )


def rows_settings() -> Any:
    """Return the settings of a rows stage on sums that were in no file."""
    from sdft_ray.data.readers import FileContent
    from sdft_ray.spec.sources import FileRows
    from sdft_ray.spec.wording import validate
    from sdft_ray.stages import rows

    split = {"held_out": 2, "validation": 2, "seed": 0, "answer": "number"}
    origin = validate(FileRows, {"path": "sums.jsonl", "fields": {"prompt": "q", "response": "a"}, **split})
    content = FileContent(sha256="0" * 64, fields=origin.fields)
    return rows.Settings(source=content, split=rows.Split(limit=None, **split), origin=origin)


def make_tiny_rows(storage: Any) -> Any:
    """Return a rows stage whose artifact, made where it is missing, holds 36 training rows of sums."""
    from sdft_ray.core.rows import Row
    from sdft_ray.stages import rows
    from sdft_ray.store.identity import Stage

    stage = Stage("rows", "sums", 1, rows_settings())
    if storage.status(stage) != "done":
        raw = [Row(f"What is {i} + {i}?", f"It is {2 * i}." * 9) for i in range(40)]
        splits, _ = rows.split_rows(raw, "number", 0, 2, 2)
        rows.write_splits(storage.scratch(stage), splits)
        storage.commit(stage, {}, 0.0)
    return stage
