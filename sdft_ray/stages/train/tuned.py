"""The tuned model as a plain Hugging Face directory, from the weights that workers wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.core.surgery import older_rope
from sdft_ray.data.readers import read_json
from sdft_ray.models.directory import write_companions
from sdft_ray.spec import training
from sdft_ray.stages.train.adapters import load_model
from sdft_ray.stages.train.state import LOGITS
from sdft_ray.store.files import write_atomically

if TYPE_CHECKING:
    import torch


def write_model(base: Path, settings: training.Train, tuned: Path, directory: Path) -> torch.Tensor:
    """Write the tuned model as a plain Hugging Face directory, and for LoRA the adapter beside it.

    One copy of the model and one tensor are in memory: the trained weights come from the workers' files one by one.
    Return the logits (K V) that the workers computed with these weights.
    """
    from transformers import GenerationConfig

    from sdft_ray.progress import quiet_transformers

    quiet_transformers()
    # Merged in the precision of training: float32 keeps the whole update, bfloat16 rounds it with the weights.
    model = load_model(str(base), settings)
    logits = _load_tuned(model, tuned)
    if settings.method == "lora":
        # Embeddings with an adapter are the pruned model's, which stays the adapter's base.
        model.save_pretrained(directory / "adapter", save_embedding_layers=False)
        model = model.merge_and_unload()
    model.generation_config = GenerationConfig()  # the base's is copied: transformers saves none that it finds odd
    model.save_pretrained(directory)
    config = read_json(directory / "config.json")  # in transformers 5's spelling of RoPE alone
    write_atomically(directory / "config.json", json.dumps(config | older_rope(config), indent=2) + "\n")
    (directory / "generation_config.json").unlink()
    write_companions(base, directory)
    return logits


def _load_tuned(model: Any, folder: Path) -> Any:
    """Put the trained weights into a model; return the logits (K V) that lie beside them."""
    from safetensors import safe_open

    logits = None
    untouched = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name == LOGITS:
                    logits = tensors.get_tensor(name)
                else:
                    untouched.pop(name).data.copy_(tensors.get_tensor(name))
    untouched |= {LOGITS: None} if logits is None else {}
    assert not untouched, f"the workers wrote no {', '.join(sorted(untouched)[:3])}"
    return logits
