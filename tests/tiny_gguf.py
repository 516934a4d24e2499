"""A tiny GGUF file, whole or with something wrong, written by the package that defines the format."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tiny import CHAT_TEMPLATE, make_tokenizer

WIDTH, HIDDEN, BLOCKS = 64, 96, 3
BLOCK = {
    **dict.fromkeys(("attn_norm", "ffn_norm"), (WIDTH,)),
    **dict.fromkeys(("attn_q", "attn_output"), (WIDTH, WIDTH)),
    **dict.fromkeys(("attn_k", "attn_v"), (WIDTH // 2, WIDTH)),
    **dict.fromkeys(("ffn_gate", "ffn_up"), (HIDDEN, WIDTH)),
    "ffn_down": (WIDTH, HIDDEN),
}


def make_tiny_gguf(
    path: Path, without: Collection[str] = (), also: Collection[str] = (), fields: Mapping[str, Any] | None = None
) -> Path:
    """Write a random Llama of 3 blocks, with `also` tensors it has no place for, `without` others, and more fields."""
    import numpy as np
    from gguf import GGUFWriter

    vocabulary = make_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "ab"]  # a merge is wanted
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, value in (fields or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(name, value)
    shapes = {"token_embd.weight": (len(tokens), WIDTH), "output_norm.weight": (WIDTH,)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(BLOCKS) for name, shape in BLOCK.items()}
    shapes |= dict.fromkeys(also, (WIDTH,))
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name not in without:
            writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
