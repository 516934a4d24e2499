"""Copy a part of a model: some of its tensors under new names, such as the text decoder of one that also sees or hears.

In: a model directory, and what its tensors are called in the part. Out: files of the same bytes. The text decoder of a
model whose config wraps a text_config becomes a plain text model, with text_config as its config; and a text model is
put back into such a model in its decoder's place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.data.readers import read_object
from sdft_ray.errors import UserError, problem
from sdft_ray.models.companions import write_companions
from sdft_ray.models.directory import WEIGHTS_INDEX, load_config, require_loadable, stored_tensors
from sdft_ray.models.shards import DISK_THREADS, Copied, StoredTensor, copy_tensors
from sdft_ray.store.files import remember_hash, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What names of tensors of the text decoder begin with, and what they begin with in a text model.
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
_FURTHER_HEADS = "mtp."  # tensors that predict further tokens from the last state of the uncut decoder
# What images and sounds are turned into tensors by.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
Files = Mapping[str, tuple[Path, Mapping[str, str]]]
"""By the name of a file that is written: the file that its tensors are copied from, and the name that each gets."""
# Read from the wrapper where text_config lacks them.
_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype")


def copy_part(base: Path, directory: Path, rename: Callable[[str], str | None]) -> frozenset[tuple[Any, ...]]:
    """Write the tensors of a model that `rename` gives a name, with their index; files of which none is left go.

    Return the places whose bytes were compared as they were written, of each tensor its own and the copy's.
    """
    held = stored_tensors(base)
    renamed = {
        shard: names
        for shard, tensors in held.items()
        if (names := {name: new for name in tensors if (new := rename(name))})
    }
    files = {shard.name: (shard, names) for shard, names in renamed.items()}
    copies = _copy(directory, files)
    if (base / WEIGHTS_INDEX).is_file():
        _write_index(directory, files, held)
    return frozenset().union(*(copy.same for copy in copies))


def _copy(directory: Path, files: Files) -> Sequence[Copied]:
    """Write files."""
    with ThreadPoolExecutor(DISK_THREADS) as pool:
        copies = list(pool.map(lambda name: copy_tensors(files[name][0], directory / name, files[name][1]), files))
    for name, copy in zip(files, copies, strict=True):
        remember_hash(directory / name, copy.sha256)
    return copies


def _write_index(directory: Path, files: Files, held: Mapping[Path, Mapping[str, StoredTensor]]) -> None:
    """Write the index of files; held: the tensors of those that they are copied from."""
    weight_map = {new: file for file, (_, names) in files.items() for new in names.values()}
    total = sum(held[source][name].bytes for source, names in files.values() for name in names)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomically(directory / WEIGHTS_INDEX, json.dumps(index, indent=2))


def text_name(name: str) -> str | None:
    """Return the name that a tensor has in the text model; None where it is no part of it.

    >>> text_name("model.language_model.norm.weight"), text_name("model.vision_tower.norm.weight")
    ('model.norm.weight', None)
    """
    return next((new + name.removeprefix(old) for old, new in _PREFIXES.items() if name.startswith(old)), None)


def text_config(directory: Path) -> dict[str, Any]:
    """Return config.json of the text model inside a model, in full; raises UserError where there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    path = directory / "config.json"
    if not isinstance(read_object(path).get("text_config"), Mapping):
        do = "Remove model.part, or give a model whose config.json has a text_config"
        raise UserError(problem(str(path), "has no text_config, which model.part: text takes", do))
    whole = load_config(directory)
    text: PreTrainedConfig = whole.get_text_config(decoder=True)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = f"its text_config is that of {text.model_type}, which is no text model of its own"
        raise UserError(problem(str(path), what, "Give another model"))
    config: dict[str, Any] = json.loads(text.to_json_string(use_diff=False))
    outer = json.loads(whole.to_json_string(use_diff=False))
    config |= {key: outer[key] for key in _SHARED if config.get(key) is None and outer.get(key) is not None}
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)].__name__
    return config | {"architectures": [architecture], "tie_word_embeddings": bool(whole.tie_word_embeddings)}


def write_text_part(base: Path, directory: Path, config: Mapping[str, Any]) -> int:
    """Write the text model inside the model at `base` and return its parameter count; config: its text_config.

    Raises UserError for a model whose tensors are not named as such a decoder's.
    """
    if not any(text_name(name) for tensors in stored_tensors(base).values() for name in tensors):
        what = "none of its tensors is named as those of a text decoder (model.language_model., language_model.)"
        raise UserError(problem(str(base), what, "Give the model as transformers saves it"))
    copy_part(base, directory, text_name)
    write_atomically(directory / "config.json", json.dumps(config, indent=2) + "\n")
    write_companions(base, directory)
    return require_loadable(directory)


def write_whole(text: Path, whole: Path, directory: Path) -> tuple[int, int]:
    """Write the model at `whole` with the text model at `text` in its decoder's place.

    Return its parameter count, and the number of tensors beside the decoder, which are copied byte for byte. Heads that
    predict further tokens are left out, as of a cut.
    """
    stored, own = stored_tensors(whole), stored_tensors(text)
    rest = {
        file: {name: name for name in tensors if text_name(name) is None and not name.startswith(_FURTHER_HEADS)}
        for file, tensors in stored.items()
    }
    prefixes = _prefixes_of(name for tensors in stored.values() for name in tensors)
    decoder = {file: {name: _whole_name(name, prefixes) for name in tensors} for file, tensors in own.items()}
    sources = [(file, names) for file, names in (decoder | rest).items() if names]
    files = {f"model-{i:05}-of-{len(sources):05}.safetensors": source for i, source in enumerate(sources, 1)}
    _copy(directory, files)
    _write_index(directory, files, {**own, **stored})
    config = dict(read_object(whole / "config.json"), text_config=read_object(text / "config.json"))
    write_atomically(directory / "config.json", json.dumps(config, indent=2) + "\n")
    for path in (path for name in _PROCESSORS if (path := whole / name).is_file()):
        shutil.copyfile(path, directory / path.name)
    write_companions(whole, directory)
    return require_loadable(directory), sum(map(len, rest.values()))


def _prefixes_of(names: Iterable[str]) -> dict[str, str]:
    """Return what names of tensors of a text model begin with, and what they begin with in a whole model: the same
    words have been saved in two orders."""
    used = {old: _PREFIXES[old] for name in names for old in _PREFIXES if name.startswith(old)}
    return {new: old for old, new in used.items()}


def _whole_name(name: str, prefixes: Mapping[str, str]) -> str:
    return next(old + name.removeprefix(new) for new, old in prefixes.items() if name.startswith(new))
