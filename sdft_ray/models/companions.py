"""The files beside a model's weights and config: tokenizer, chat template, generation config, licence.

In: the base that a model was made of. Out: its files beside the model's weights. `cut`, `train` and `merge` all write
through this module, because a directory that any tool loads needs more than its weights.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

from sdft_ray.data.chat import end_of_turn
from sdft_ray.data.readers import read_json
from sdft_ray.models.directory import WEIGHTS_INDEX, load_config
from sdft_ray.models.tokens import load_tokenizer
from sdft_ray.store.files import write_atomically

LICENCES = ("*licen[cs]e*", "*notice*", "copying*", "*use_policy*")
"""Names, in lower case, of the files with the terms of a model."""
# Files to copy from a base to a model made of it, in any case. A list, because a user's directory holds anything:
# weights in other formats, logs, the files of a training. Not the model card: it describes the base.
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.tiktoken", "tekken.json"),  # vocabularies of SentencePiece, tiktoken and Mistral
    *("chat_template*", "additional_chat_templates/*", "generation_config.json"),
    *LICENCES,
)
_MOST_BYTES = 1 << 27  # the largest tokenizer.json of a well-known model has 34 MB; larger files hold weights


def write_companions(base: Path, directory: Path) -> None:
    """Copy the companions of a model's weights and config, byte for byte with two exceptions.

    The tokenizer's settings are spelled so that transformers 4 also reads them, and the generation config stops at the
    end of an assistant's turn.
    """
    for path in _companions(base):
        copy = directory / path.relative_to(base)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)  # not its mode: a hub's cache is read-only
    spell_tokenizer_for_older(directory)
    _add_end_of_turn(base, directory)


def copy_all_but_weights(model: Path, directory: Path) -> None:
    """Copy what describes a model whose tensors keep their names and shapes: config, index, companions."""
    for name in ("config.json", WEIGHTS_INDEX):
        if (model / name).is_file():
            shutil.copy2(model / name, directory / name)
    write_companions(model, directory)


def _companions(base: Path) -> list[Path]:
    files = (path for path in (*base.iterdir(), *base.glob("additional_chat_templates/*")) if path.is_file())
    return [
        path
        for path in files
        if any(fnmatch.fnmatch(path.relative_to(base).as_posix().lower(), pattern) for pattern in COMPANIONS)
        and path.stat().st_size <= _MOST_BYTES
    ]


def spell_tokenizer_for_older(directory: Path) -> None:
    """Rewrite tokenizer_config.json where only transformers 5 could read it; 5 also reads the older spelling."""
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
    """Make engines stop at the token that ends an assistant's turn, beside their present stops.

    Not by `GenerationConfig.save_pretrained`, which refuses settings of many models (a temperature without do_sample).
    """
    from transformers import GenerationConfig

    end, path = end_of_turn(load_tokenizer(directory)), directory / "generation_config.json"
    config = load_config(base).to_dict() | read_json(base / "config.json")
    exists = path.is_file()  # else transformers derives it from the config alone
    settings = dict(read_json(path)) if exists else GenerationConfig.from_model_config(config).to_diff_dict()
    named = settings.get("eos_token_id", config.get("eos_token_id"))
    stops = named if isinstance(named, list) else [] if named is None else [named]
    if end not in stops or not exists or "eos_token_id" not in settings:
        settings["eos_token_id"] = stops if end in stops else [*stops, end]
        settings.pop("_from_model_config", None)  # with it, transformers 4 would take the config's again
        write_atomically(path, json.dumps(settings, indent=2) + "\n")
