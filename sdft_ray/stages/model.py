"""Stage `model`: the base model as a plain Hugging Face directory that every node can read.

In: one .gguf file, or a pinned hub model. Out: safetensors, config, tokenizer, chat template, generation config; of a
GGUF dequantised to bfloat16. A model that is such a directory already is used where it lies and never comes here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdft_ray.core.surgery import require_supported
from sdft_ray.directory import spell_tokenizer_for_older
from sdft_ray.sources import describe_directory, download_model
from sdft_ray.stages import Work

VERSION = 1


def build(work: Work) -> dict[str, Any]:
    """Download the model, or write the dequantised one."""
    if "repo" in work.settings:
        download_model(work.settings["repo"], work.settings["revision"], work.directory)
        facts = describe_directory(work.directory)
        require_supported(facts.architecture, "model")
        return {"from": work.settings["repo"], "architecture": facts.architecture, "blocks": facts.blocks}
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
    spell_tokenizer_for_older(work.directory)
    return {
        "from": gguf.name,
        "architecture": model.config.model_type,
        "blocks": model.config.num_hidden_layers,
        "parameters": model.num_parameters(),
        "dtype": "bfloat16",
    }
