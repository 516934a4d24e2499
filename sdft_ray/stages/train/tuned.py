"""The tuned model as a plain Hugging Face directory, from the weights that workers wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.core.rows import TrainingRow
from sdft_ray.core.surgery import older_rope
from sdft_ray.data.readers import read_json
from sdft_ray.models.companions import write_companions
from sdft_ray.spec import training
from sdft_ray.stages.train.adapters import load_model
from sdft_ray.stages.train.state import LOGITS, share_file
from sdft_ray.store.files import write_atomically

if TYPE_CHECKING:
    import torch

# The largest difference of logits that are the same sums in another order, as a fraction of their spread (both root
# mean square). float32 keeps 7 digits, of which a deep model loses two. bfloat16 keeps 8 bits: a thousand roundings in
# a row are 2^-9 * sqrt(1000) = 6 %, and merging adapters rounds once more. Measured on SmolLM2-135M with adapters on
# all its linear layers: 2e-6 and 3 %.
_SAME_LOGITS = {"float32": 1e-4, "bfloat16": 0.25}


def write_model(base: Path, settings: training.Train, tuned: Path, workers: int, directory: Path) -> torch.Tensor:
    """Write the tuned model as a plain Hugging Face directory, and for LoRA the adapter beside it.

    One copy of the model and one tensor are in memory: the trained weights come from the workers' files one by one.
    Return the logits (K V) that the workers computed with these weights.
    """
    from transformers import GenerationConfig

    from sdft_ray.progress import quiet_transformers

    quiet_transformers()
    # Merged in the precision of training: float32 keeps the whole update, bfloat16 rounds it with the weights.
    model = load_model(str(base), settings)
    logits = load_tuned(model, tuned, workers)
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


def load_tuned(model: Any, folder: Path, workers: int) -> Any:
    """Put the trained weights of so many workers into a model; return the logits (K V) that lie beside them.

    Where an elastic training ended with fewer workers than before, shares of those that are gone may lie there, too.
    """
    from safetensors import safe_open

    logits = None
    untouched = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for rank in range(workers):
        with safe_open(share_file(folder, rank), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name == LOGITS:
                    logits = tensors.get_tensor(name)
                else:
                    untouched.pop(name).data.copy_(tensors.get_tensor(name))
    untouched |= {LOGITS: None} if logits is None else {}
    assert not untouched, f"the workers wrote no {', '.join(sorted(untouched)[:3])}"
    return logits


def require_same_logits(directory: Path, rows: Sequence[TrainingRow], trained: torch.Tensor, dtype: str) -> float:
    """Return the distance of a model's logits from those of the engine that trained it, after proving them equal.

    `trained` is (K V), for the positions of `rows` that are predicted with loss. The distance is relative: the root
    mean square of the differences, divided by the logits' own spread.
    """
    logits = _compute_logits(directory, rows, dtype)
    difference = float((logits - trained).square().mean().sqrt() / trained.std())
    if not difference <= _SAME_LOGITS[dtype]:
        what = f"its logits are not those of the trained weights (relative difference {difference:.1e}"
        raise RuntimeError(f"{directory}: {what}; expected at most {_SAME_LOGITS[dtype]})")
    return difference


def _compute_logits(directory: Path, rows: Sequence[TrainingRow], dtype: str) -> torch.Tensor:
    """Return logits (K V) of the model in a directory, row by row and without the additions of training."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    with torch.inference_mode():
        logits = [model(torch.tensor([row.ids]), use_cache=False).logits[0, row.trained_from - 1 : -1] for row in rows]
    return torch.cat(logits).float()
