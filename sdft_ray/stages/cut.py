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
from typing import TYPE_CHECKING, Any

from sdft_ray.artifacts import write_atomically
from sdft_ray.core.surgery import prune_config, rename_tensor, require_choosable
from sdft_ray.sources import WEIGHTS_INDEX, read_json, weight_files
from sdft_ray.stages import Work
from sdft_ray.stages.score import read_measured

if TYPE_CHECKING:
    from sdft_ray.core.similarity import Choice

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
    choice = choose_removed(work)
    remove_blocks(base, directory, choice.blocks)
    parameters = require_loadable(directory)
    return {
        "removed": list(choice.blocks),
        "metric": work.settings["metric"],
        "cost": choice.value,
        "agreement": choice.agreement,
        "runner_up": None if choice.runner_up is None else list(choice.runner_up),
        "blocks": read_json(directory / "config.json")["num_hidden_layers"],
        "parameters": parameters,
    }


def choose_removed(work: Work) -> Choice:
    """Return the blocks that the recipe's metric gives up, and how sure that is."""
    from sdft_ray.core.similarity import Choice, choose_blocks, choose_span, span_distances, span_influences

    settings = work.settings
    size, first, last = settings["blocks"], settings["protect"]["first"], settings["protect"]["last"]
    distances, influences = read_measured(work.input("score"))
    require_choosable(size, first, last, influences[0].shape[1])
    match settings["metric"]:
        case "loss":
            found = read_json(work.input("loss") / "losses.json")["choice"]
            return Choice(**{**found, "blocks": tuple(found["blocks"])})
        case "influence" if not settings["contiguous"]:
            return choose_blocks(influences, size, first, last)
        case "influence":
            return choose_span([span_influences(each, size) for each in influences], size, first, last)
        case _:
            return choose_span([span_distances(each, size) for each in distances], size, first, last)


def remove_blocks(base: Path, directory: Path, removed: Sequence[int]) -> None:
    """Write the model at `base` without the `removed` blocks into `directory`; holds one shard in memory."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = prune_config(explicit_config(base), removed)
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


def explicit_config(base: Path) -> dict[str, Any]:
    """Return a model's config.json with the per-block lists that it leaves to its config class to compute."""
    from transformers import AutoConfig

    config: dict[str, Any] = read_json(base / "config.json")
    computed = AutoConfig.from_pretrained(base).to_dict()
    blocks = config["num_hidden_layers"]
    return config | {
        key: value
        for key, value in computed.items()
        if isinstance(value, list) and len(value) == blocks and config.get(key) is None
    }


def require_loadable(directory: Path) -> int:
    """Return the parameter count after proving that the files are exactly the tensors that the config asks for."""
    import torch
    from safetensors import safe_open
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    from sdft_ray.progress import quiet_transformers

    quiet_transformers()
    found: dict[str, torch.Tensor] = {}
    for shard in weight_files(directory):
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                found[name] = torch.empty(tensors.get_slice(name).get_shape(), device="meta")
    config = AutoConfig.from_pretrained(directory)
    # The loader itself, which also knows the names that files have and the model has not (each expert by itself).
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=found,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # to be named below instead
    )
    wrong = [f"{name} is missing" for name in info["missing_keys"]]
    wrong += [f"{name} is not in the model" for name in info["unexpected_keys"]]
    wrong += [f"{name} is {tuple(a)} in the files, {tuple(b)} in the model" for name, a, b in info["mismatched_keys"]]
    wrong += info["error_msgs"]
    if wrong:
        raise RuntimeError(f"{directory}: {min(wrong)}")
    return int(model.num_parameters())
