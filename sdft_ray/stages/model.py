"""Stage `model`: a GGUF file becomes a plain Hugging Face directory, once.

In: one .gguf file. Out: safetensors in bfloat16, config, tokenizer, chat template, generation config. A model that
is such a directory already is used where it lies and never comes here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdft_ray.stages import Work

VERSION = 1


def build(work: Work) -> dict[str, Any]:
    """Write the dequantised model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from sdft_ray.progress import quiet_transformers

    quiet_transformers()
    gguf = Path(work.stage.where["gguf"])
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    vars(model.config).pop("quantization_config", None)  # it is a plain model from here on
    # bfloat16 is what such models were trained in; the quantised values need no more than its 8 bits.
    model.to(torch.bfloat16).save_pretrained(work.directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(work.directory)
    return {
        "from": gguf.name,
        "architecture": model.config.model_type,
        "blocks": model.config.num_hidden_layers,
        "parameters": model.num_parameters(),
        "dtype": "bfloat16",
    }
