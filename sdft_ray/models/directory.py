"""Check a Hugging Face model directory.

In: a directory with weights and config.json. Out: its facts and the places of its tensors, or an error that names the
fault. What transformers and vLLM would pass over in silence, or each read in its own way, is refused here.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdft_ray.core.surgery import EMBEDDINGS, count_blocks, further_blocks, rename_tensor
from sdft_ray.data.readers import read_json, read_object, read_text, require_whole
from sdft_ray.data.text import first_line
from sdft_ray.errors import UserError, problem
from sdft_ray.models.shards import StoredTensor, read_header, same_bytes
from sdft_ray.store.files import inside

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_WEIGHTS = "model.safetensors"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""PyTorch's names of the kinds of weights, by those in safetensors files."""
WEIGHTS_INDEX = f"{_WEIGHTS}.index.json"


def load_config(directory: Path) -> PreTrainedConfig:
    """Return a model's config as transformers reads it, which runs no code of the model's own; raises UserError for one
    that transformers refuses."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - a config can be wrong in any way
        what = f"is refused by transformers ({first_line(error)})"
        raise UserError(problem(str(directory / "config.json"), what, "Copy or download it again")) from None
    return config


# --- proofs ---------------------------------------------------------------------------------------------------


def tensor_places(directory: Path) -> dict[str, tuple[Path, StoredTensor]]:
    """Return the file and the bytes of every tensor of a model."""
    return {name: (path, tensor) for path, file in stored_tensors(directory).items() for name, tensor in file.items()}


def require_dtype(model: Path, name: str, tensor: StoredTensor) -> None:
    """Raise UserError for a tensor of a model that PyTorch does not compute with."""
    if tensor.dtype not in DTYPES:
        do = f"Give it in {', '.join(DTYPES.values())}"
        raise UserError(problem(str(model), f"{name} is stored as {tensor.dtype}", do))


class _Loading(NamedTuple):
    """What transformers reports of a loaded model, by its own names."""

    missing_keys: Iterable[str]
    unexpected_keys: Iterable[str]
    mismatched_keys: Iterable[tuple[str, Sequence[int], Sequence[int]]]
    error_msgs: Iterable[str]


def require_loadable(directory: Path) -> int:
    """Return the parameter count after proving that the files hold exactly the tensors of the config."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from sdft_ray.progress import quiet_transformers

    quiet_transformers()
    further = further_blocks(read_json(directory / "config.json"))
    tensors = {
        name: torch.empty(tensor.shape, device="meta")
        for name, (_, tensor) in tensor_places(directory).items()
        if rename_tensor(name, further)
    }
    config = load_config(directory)
    kinds = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if hasattr(config, "text_config") else MODEL_FOR_CAUSAL_LM_MAPPING
    # The loader also knows names of tensors that only files have (each expert by itself).
    model, info = kinds[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the error below names them
    )
    found = _Loading(*(info[name] for name in _Loading._fields))
    wrong = [f"{name} is missing" for name in found.missing_keys]
    wrong += [f"{name} is not in the model" for name in found.unexpected_keys]
    wrong += [f"{name} is {tuple(a)} in the files, {tuple(b)} in the model" for name, a, b in found.mismatched_keys]
    wrong += found.error_msgs
    if wrong:
        raise RuntimeError(f"{directory}: {min(wrong)}")
    return int(model.num_parameters())


def require_sound(directory: Path) -> None:
    """Raise UserError for a model whose files are not those of its config, or hold no plain numbers."""
    for name, (path, tensor) in tensor_places(directory).items():
        if name.endswith(".weight") and tensor.dtype not in DTYPES:
            what = f"{name} is of {tensor.dtype} (expected one of {', '.join(DTYPES.values())})"
            raise UserError(problem(str(path), what, "Give the model before it was quantised"))
    require_generation(directory / "generation_config.json")
    try:
        require_loadable(directory)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a config can be wrong in any way
        what = f"cannot be loaded ({first_line(error).removeprefix(f'{directory}: ')})"
        raise UserError(problem(str(directory), what, "Copy or download it again")) from None


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Files that transformers reads beside weights and config; it ignores a damaged generation_config.json silently.
_COMPANIONS = (
    *_TOKENIZER_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("merges.txt", "chat_template.jinja"),
)
_COUNTS = ("num_hidden_layers", "max_position_embeddings", "num_attention_heads")


def require_generation(path: Path) -> None:
    """Raise UserError for a generation config with which transformers would not load the model, or not know its end."""
    from transformers import GenerationConfig

    if not path.is_file():
        return
    named = read_object(path).get("eos_token_id")
    ends = named if isinstance(named, list) else [named]
    try:
        GenerationConfig.from_pretrained(path.parent)
        wrong = "" if all(end is None or type(end) is int for end in ends) else f"eos_token_id is {json.dumps(named)}"
    except Exception as error:  # noqa: BLE001 - any value of it can be wrong
        wrong = first_line(error)
    if wrong:
        raise UserError(problem(str(path), f"is refused by transformers ({wrong})", "Correct it, or remove the file"))


# --- models ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """The facts of a model for planning, read from its headers."""

    architecture: str
    """`model_type` of its config, for example `llama`."""
    blocks: int
    context: int | None = None
    """The most tokens of a sequence, where the config names it."""
    heads: int | None = None
    """Attention heads of a block, where the config names them."""


def describe_directory(directory: Path, teaches: bool = False) -> ModelFacts:
    """Return the facts of a Hugging Face model directory, refusing one without a part that the chain needs.

    teaches: it only generates, and its weights may be quantised.
    """
    _require_own_weights(directory)
    _require_files(directory)
    config = read_object(directory / "config.json", missing="is no Hugging Face model directory")
    _require_weights(directory, config, teaches)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(problem(str(directory), "has no tokenizer", "Put the model's tokenizer files beside it"))
    settings: dict[str, Any] = {}
    for path in (path for name in _COMPANIONS if (path := directory / name).is_file()):
        require_whole(path)
        if path.name == "tokenizer.json":
            _require_tokenizer(path)
        elif path.suffix == ".json":
            value = read_object(path)
            settings = value if path.name == "tokenizer_config.json" else settings
    if "AutoTokenizer" in str(settings.get("auto_map")):
        what = "asks for a tokenizer that is code of the model's own, which is never run (auto_map)"
        do = "Save the tokenizer as tokenizer.json and remove auto_map"
        raise UserError(problem(str(directory / "tokenizer_config.json"), what, do))
    _require_chat_template(directory, settings.get("chat_template"))
    _, context, heads = (_count(directory / "config.json", config, name) for name in _COUNTS)
    return ModelFacts(str(config.get("model_type")), count_blocks(config), context, heads)


def _count(path: Path, config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    if value is not None and (type(value) is not int or value < 1):
        what = f"{name} is {json.dumps(value)}, not a whole number above 0"
        raise UserError(problem(str(path), what, "Copy or download it again"))
    return value


def _require_own_weights(directory: Path) -> None:
    """Raise UserError for a directory that names another model's weights, or is a folder of GGUF files."""
    if (adapter := directory / "adapter_config.json").is_file():
        base = read_object(adapter).get("base_model_name_or_path")
        what = f"holds an adapter{f' of {base}' if base else ''}, not a model (adapter_config.json)"
        raise UserError(problem(str(directory), what, "Merge it into its base with peft's merge_and_unload"))
    if not (directory / "config.json").is_file() and (files := sorted(directory.glob("*.gguf"))):
        raise UserError(problem(str(directory), "is a folder of GGUF files", f"Give one of them: {files[0]}"))


def _require_files(directory: Path) -> None:
    """Raise UserError where a file that is read is a directory, or a link that leads nowhere: it would pass for one
    that is not there."""
    names = ("config.json", WEIGHTS_INDEX, *_COMPANIONS)
    for path in sorted(path for path in directory.iterdir() if path.name in names or path.suffix == ".safetensors"):
        if not path.is_file():
            kind = "a directory, not a file" if path.is_dir() else f"a link to {path.readlink()}, which is not there"
            raise UserError(problem(str(path), f"is {kind}", "Copy or download it again"))


def _require_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises nothing more precise
        what = f"cannot be read as a tokenizer ({' '.join(str(error).split())})"
        raise UserError(problem(str(path), what, "Copy or download it again")) from None


def _require_chat_template(directory: Path, inline: Any) -> None:
    """Raise UserError unless there is one chat template, or one of several that is the default.

    transformers takes the files, where there are any, instead of the one inside tokenizer_config.json.
    """
    files = {path.stem: path for path in (directory / "additional_chat_templates").glob("*.jinja")}
    if (default := directory / "chat_template.jinja").is_file():
        files["default"] = default
    templates: dict[str, Any] = {name: read_text(path) for name, path in files.items()}
    if not files and isinstance(inline, dict):
        templates = inline
    elif not files and isinstance(inline, list):
        templates = {str(entry.get("name")): entry.get("template") for entry in inline if isinstance(entry, dict)}
    elif not files and inline:
        templates = {"default": inline}
    if templates and "default" not in templates:
        what = f"has chat templates named {', '.join(sorted(templates))}, and none named default"
        raise UserError(problem(str(directory), what, "Save the one to use as chat_template.jinja"))
    if not isinstance(template := templates.get("default"), str) or not template.strip():
        do = "Give an instruction-tuned model"
        if (directory / "chat_template.json").is_file():
            do = "Save the text inside chat_template.json, which tokenizers do not read, as chat_template.jinja"
        raise UserError(problem(str(directory), "has no chat template", do))


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model: those its index names, else its one file, else none.

    Raises UserError for an index that names a missing file.
    """
    if index := _weight_map(directory):
        files = [inside(directory, name) for name in sorted(set(index.values()))]
    else:
        files = [path for path in [directory / _WEIGHTS] if path.is_file()]
    for path in files:
        if not path.is_file():
            what = f"names {path.name}, which is not beside it"
            raise UserError(problem(str(directory / WEIGHTS_INDEX), what, "Copy or download that file, too"))
    return files


def stored_tensors(directory: Path) -> dict[Path, dict[str, StoredTensor]]:
    """Return the tensors of each weight file of a model, from the headers alone.

    Raises UserError for a damaged file, and for an index that names a tensor which its file lacks.
    """
    tensors = {path: read_header(path) for path in weight_files(directory)}
    for name, file in _weight_map(directory).items():
        if name not in tensors[directory / file]:
            what = f"names {file} as the file of {name}, which it lacks"
            raise UserError(problem(str(directory / WEIGHTS_INDEX), what, "Copy or download the model again"))
    return tensors


def _weight_map(directory: Path) -> dict[str, str]:
    """Return the file of each tensor by the index; empty for a model in one file, which has no index."""
    path = directory / WEIGHTS_INDEX
    if not path.is_file():
        return {}
    files = read_object(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError(problem(str(path), "has no weight_map", "Copy or download it again"))
    return files


def _require_weights(directory: Path, config: Mapping[str, Any], teaches: bool) -> None:
    files = weight_files(directory)
    if not files:
        raise UserError(problem(str(directory), *_explain_no_weights(directory)))
    _require_one_layout(directory, {path.name for path in files})
    for path in files:
        require_whole(path)
    stored = stored_tensors(directory)
    places = {name: (path, tensor) for path, tensors in stored.items() for name, tensor in tensors.items()}
    for path, tensors in stored.items():
        if not tensors:
            raise UserError(problem(str(path), "holds no tensors", "Copy or download it again"))
        if twice := [name for name in tensors if places[name][0] != path]:
            what = f"holds {twice[0]}, and so does {places[twice[0]][0].name}"
            raise UserError(problem(str(path), what, "Copy or download the model again, into an empty directory"))
    if (settings := config.get("quantization_config")) and not teaches:
        method = settings.get("quant_method", "somehow") if isinstance(settings, dict) else settings
        do = "Give the model as it was before, in bfloat16"
        raise UserError(problem(str(directory / "config.json"), f"its weights are quantised ({method})", do))
    embeddings, head = next((places[n] for n in EMBEDDINGS if n in places), None), places.get("lm_head.weight")
    if embeddings and head and is_tied(directory, config) and not same_bytes(*embeddings, *head):
        what = "tie_word_embeddings is true, but lm_head.weight is not the embeddings"
        raise UserError(problem(str(directory / "config.json"), what, "Set tie_word_embeddings to false"))


def _explain_no_weights(directory: Path) -> tuple[str, str]:
    """Return the problem and the remedy of a directory without model.safetensors and without an index."""
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in names):
        what = f"has shards of weights ({names[0]}, …) without {WEIGHTS_INDEX}, which lists their tensors"
        return what, "Copy or download it, too"
    if names:
        what = f"has weights in {', '.join(names)}, which transformers does not look for (expected {_WEIGHTS})"
        return what, "Give the model in the layout of transformers"
    if any(directory.glob("*.bin")):
        what = "has pickled weights only, and a pickle can run code (expected *.safetensors)"
        code = f"M.from_pretrained({str(directory)!r}, dtype='auto').save_pretrained({str(directory)!r})"
        return what, f'Convert it: python -c "from transformers import AutoModelForCausalLM as M; {code}"'
    return "has no weights (expected *.safetensors)", "Copy or download them, too"


def _require_one_layout(directory: Path, read: set[str]) -> None:
    """Raise UserError for weights from which transformers and vLLM would read different files.

    transformers takes model.safetensors before an index, vLLM what the index names; without an index vLLM takes every
    *.safetensors, and before all others consolidated*.safetensors, at any depth.
    """
    indexed, whole = (directory / WEIGHTS_INDEX).is_file(), (directory / _WEIGHTS).is_file()
    if indexed and whole and read != {_WEIGHTS}:
        what = f"holds {_WEIGHTS}, which transformers reads, and {WEIGHTS_INDEX}, which names {', '.join(sorted(read))}"
        what += " and which vLLM reads"
        raise UserError(problem(str(directory), what, f"Remove {_WEIGHTS} or {WEIGHTS_INDEX}"))
    other = {path.relative_to(directory).as_posix() for path in directory.rglob("consolidated*.safetensors")}
    if not indexed:
        other |= {path.name for path in directory.glob("*.safetensors")}
    other -= read
    if other:
        what = f"holds {', '.join(sorted(other))} beside {', '.join(sorted(read))}, and vLLM would also read them"
        raise UserError(problem(str(directory), what, f"Remove {', '.join(sorted(other))}"))


def is_tied(directory: Path, config: Mapping[str, Any]) -> bool:
    """Return whether a model's head has the weights of its embeddings."""
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    return bool(load_config(directory).tie_word_embeddings)  # each architecture has its own default
