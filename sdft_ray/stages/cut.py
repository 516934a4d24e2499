"""Stage `cut`: the base model's files without the chosen blocks.

In: the base model and the distances. Out: a plain Hugging Face directory that any tool loads. The model is not
built: tensors are copied shard by shard under their new names; then the result is loaded strictly on the meta
device, which reads no weights and catches every missing, surplus or misshapen tensor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdft_ray.artifacts import write_atomically
from sdft_ray.core.surgery import prune_config, rename_tensor, require_span
from sdft_ray.sources import WEIGHTS_INDEX, read_json, weight_files
from sdft_ray.stages import Work

VERSION = 1
# Everything else that belongs to a model; weights and config are rewritten, other formats and caches stay behind.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "LICENSE*",
)


def build(work: Work) -> dict[str, Any]:
    """Write the pruned model."""
    base, directory = work.input("model"), work.directory
    measured = read_json(work.input("score") / "distances.json")
    require_span(0, work.settings["blocks"], measured["blocks"])
    choice = measured["choices"][str(work.settings["blocks"])]
    start, stop = choice["start"], choice["stop"]
    remove_blocks(base, directory, range(start, stop))
    parameters = require_loadable(directory)
    return {
        "span": [start, stop],
        "distance": choice["distance"],
        "agreement": choice["agreement"],
        "runner_up": choice["runner_up"],
        "blocks": read_json(directory / "config.json")["num_hidden_layers"],
        "parameters": parameters,
    }


def remove_blocks(base: Path, directory: Path, removed: Sequence[int]) -> None:
    """Write the model at `base` without the `removed` blocks into `directory`; holds one shard in memory."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = prune_config(read_json(base / "config.json"), removed)
    weight_map: dict[str, str] = {}
    total = 0
    for shard in weight_files(base):
        with safe_open(shard, framework="pt") as tensors:
            named = {name: rename_tensor(name, removed) for name in tensors.keys()}  # noqa: SIM118 - not a dict
            kept = {new: tensors.get_tensor(old) for old, new in named.items() if new}
        if kept:
            save_file(kept, directory / shard.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(kept, shard.name)
            total += sum(tensor.nbytes for tensor in kept.values())
    if (base / WEIGHTS_INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomically(directory / WEIGHTS_INDEX, json.dumps(index, indent=2))
    write_atomically(directory / "config.json", json.dumps(config, indent=2) + "\n")
    for pattern in _COMPANIONS:
        for path in base.glob(pattern):
            shutil.copy2(path, directory / path.name)


def require_loadable(directory: Path) -> int:
    """Return the parameter count after proving that the files are exactly the tensors that the config asks for."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for shard in weight_files(directory):
        with safe_open(shard, framework="pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        found.pop("lm_head.weight", None)
    differing = sorted({name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)})
    if differing:
        name = differing[0]
        raise RuntimeError(f"{directory}: {name} is {found.get(name)} in the files, {expected.get(name)} in the model")
    return int(model.num_parameters())
