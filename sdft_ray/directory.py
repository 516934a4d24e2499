"""A Hugging Face model directory as this package writes it: its companions, and the proof that it is the right model.

In: a directory with weights and config.json, and the base that its model came from. Out: the base's tokenizer, chat
template, generation config and licence beside them; or an error that names what is wrong. `cut`, `train` and `merge`
all write through here, because a directory that any tool loads needs more than its weights.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdft_ray.artifacts import write_atomically
from sdft_ray.core.prompts import TrainingRow, end_of_turn
from sdft_ray.core.surgery import rename_tensor
from sdft_ray.shards import StoredTensor
from sdft_ray.sources import LICENCES, read_json, stored_tensors

if TYPE_CHECKING:
    import torch

# What goes from a base to a model made of it, whatever the case. A list, because a user's directory holds anything:
# weights in other formats, logs, the files of a training. Not the model card: it describes the base.
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.tiktoken", "tekken.json"),  # vocabularies of SentencePiece, tiktoken and Mistral
    *("chat_template*", "additional_chat_templates/*", "generation_config.json"),
    *LICENCES,
)
_MOST_BYTES = 1 << 27  # the largest tokenizer.json of a well-known model has 34 MB; what is larger holds weights
# How far logits may differ that are the same sums in another order, as a fraction of their spread (both root mean
# square). float32 keeps 7 digits, of which a deep model loses two. bfloat16 keeps 8 bits: a thousand roundings, one
# after another, are 2^-9 * sqrt(1000) = 6 %, and merging adapters rounds once more. Measured on SmolLM2-135M with
# adapters on all its linear layers: 2e-6 and 3 %.
_SAME_LOGITS = {"float32": 1e-4, "bfloat16": 0.25}


# --- companions -----------------------------------------------------------------------------------------------


def write_companions(base: Path, directory: Path) -> None:
    """Copy what belongs to a model beside its weights and config, byte for byte but for two things.

    The tokenizer's settings are spelled so that transformers 4 reads them, too, and the generation config stops at the
    end of an assistant's turn.
    """
    for path in _companions(base):
        copy = directory / path.relative_to(base)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)  # not its mode: a hub's cache is read-only
    spell_tokenizer_for_older(directory)
    _add_end_of_turn(base, directory)


def _companions(base: Path) -> list[Path]:
    files = (path for path in (*base.iterdir(), *base.glob("additional_chat_templates/*")) if path.is_file())
    return [
        path
        for path in files
        if any(fnmatch.fnmatch(path.relative_to(base).as_posix().lower(), pattern) for pattern in COMPANIONS)
        and path.stat().st_size <= _MOST_BYTES
    ]


def spell_tokenizer_for_older(directory: Path) -> None:
    """Rewrite tokenizer_config.json where only transformers 5 could read it; 5 reads the older spelling alike."""
    path = directory / "tokenizer_config.json"
    settings = dict(read_json(path)) if path.is_file() else {}
    older = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):  # 4 expects a mapping under this name
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    if older != settings:
        write_atomically(path, json.dumps(older, indent=2, ensure_ascii=False) + "\n")


def _add_end_of_turn(base: Path, directory: Path) -> None:
    """Make engines stop at the token that ends an assistant's turn, beside those at which they stop already.

    Not by `GenerationConfig.save_pretrained`, which refuses what many models say (a temperature without do_sample).
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    end, path = end_of_turn(AutoTokenizer.from_pretrained(directory)), directory / "generation_config.json"
    config = AutoConfig.from_pretrained(base).to_dict() | read_json(base / "config.json")
    there = path.is_file()  # else what transformers makes of the config alone
    settings = dict(read_json(path)) if there else GenerationConfig.from_model_config(config).to_diff_dict()
    known = settings.get("eos_token_id", config.get("eos_token_id"))
    stops = known if isinstance(known, list) else [] if known is None else [known]
    if end not in stops or not there or "eos_token_id" not in settings:
        settings["eos_token_id"] = stops if end in stops else [*stops, end]
        settings.pop("_from_model_config", None)  # with it, transformers 4 would take the config's again
        write_atomically(path, json.dumps(settings, indent=2) + "\n")


# --- proofs ---------------------------------------------------------------------------------------------------


def tensor_places(directory: Path) -> dict[str, tuple[Path, StoredTensor]]:
    """Return the file and the bytes of every tensor of a model."""
    return {name: (path, tensor) for path, held in stored_tensors(directory).items() for name, tensor in held.items()}


def require_loadable(directory: Path) -> int:
    """Return the parameter count after proving that the files are exactly the tensors that the config asks for."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    from sdft_ray.progress import quiet_transformers

    quiet_transformers()
    found = {
        name: torch.empty(tensor.shape, device="meta")
        for name, (_, tensor) in tensor_places(directory).items()
        if rename_tensor(name, ())
    }
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


def require_same_logits(directory: Path, rows: Sequence[TrainingRow], trained: torch.Tensor, dtype: str) -> float:
    """Return how far a model's logits are from those of the engine that trained it, after proving them the same.

    `trained` is (K V), for the positions of `rows` that are predicted with loss. The figure is relative: the root mean
    square of the differences by the logits' own spread.
    """
    logits = _compute_logits(directory, rows, dtype)
    difference = float((logits - trained).square().mean().sqrt() / trained.std())
    if not difference <= _SAME_LOGITS[dtype]:
        what = f"its logits are not those of the trained weights (relative difference {difference:.1e}"
        raise RuntimeError(f"{directory}: {what}; expected at most {_SAME_LOGITS[dtype]})")
    return difference


def _compute_logits(directory: Path, rows: Sequence[TrainingRow], dtype: str) -> torch.Tensor:
    """Return logits (K V) of the model in a directory, row by row and without whatever training adds to a model."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    with torch.inference_mode():
        found = [model(torch.tensor([row.ids]), use_cache=False).logits[0, row.trained_from - 1 : -1] for row in rows]
    return torch.cat(found).float()
