"""Stage `model`: the base model as a plain Hugging Face directory that every node can read.

In: one .gguf file, a pinned hub model, or a directory of which a part is wanted. Out: safetensors, config, tokenizer,
chat template, generation config; of a GGUF dequantised to bfloat16, where no tensor may be missing or left over. A
model that is such a directory already is used where it lies and never comes here.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field

from sdft_ray import stages
from sdft_ray.core.surgery import count_blocks, require_supported
from sdft_ray.errors import UserError, problem
from sdft_ray.models.companions import spell_tokenizer_for_older
from sdft_ray.models.directory import describe_directory, load_config, require_sound
from sdft_ray.models.parts import text_config, write_text_part
from sdft_ray.models.sources import NO_NUMBERS, download_model, gguf_field, model_path, read_gguf
from sdft_ray.models.tokens import require_fitting
from sdft_ray.spec.section import Section
from sdft_ray.spec.sources import HubModel, LocalModel, ModelSource
from sdft_ray.stages import Work
from sdft_ray.store.files import hash_source
from sdft_ray.store.identity import Stage, slugify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION, NEEDS, UNIT = 1, None, "parts"
Text = Literal["text"]
"""The part of a model that is taken: all that follows works on it, whatever becomes of the rest."""


class HubSettings(Section):
    """A model of a hub."""

    optional = ("part", "teaches")
    repo: str
    revision: str
    part: Text | None = None
    teaches: bool = False
    """Whether it is no base: then it need not be of an architecture that can be pruned, and may be quantised."""


class FileSettings(Section):
    """A model that is here: a directory as it is, or a .gguf file."""

    unhashed = ("gguf", "directory")
    optional = ("part",)
    sha256: str
    gguf: str | None = None
    """Path of the file."""
    part: Text | None = None
    directory: str | None = None
    """Path of the model whose part is wanted."""


Settings = HubSettings | FileSettings


class Summary(stages.Summary):
    """What the model is."""

    model_config = ConfigDict(populate_by_name=True)
    source: str = Field(validation_alias="from", serialization_alias="from")
    """Name of the repository or file."""
    architecture: str
    blocks: int
    parameters: int | None = None
    """Of a dequantised file, or of a part."""
    dtype: str | None = None
    """Of a dequantised file."""


def stage(source: ModelSource, where: str = "model.path", teaches: bool = False) -> Stage[Settings]:
    """Return the stage that stands for a model: a conversion (GGUF), a download, or a directory as it is.

    teaches: it only rewrites and is never pruned.
    Raises UserError at `where` the recipe names it for one that is not there.
    """
    part: Text | None = "text" if source.part else None
    if isinstance(source, HubModel):
        settings = HubSettings(repo=source.repo, revision=source.revision, part=part, teaches=teaches)
        return Stage("model", slugify(_name_part(source.repo, part)), VERSION, settings)
    path = model_path(source, where)
    sha256 = hash_source(path, without=NO_NUMBERS)
    if path.is_file():
        return Stage("model", slugify(path.stem), VERSION, FileSettings(sha256=sha256, gguf=str(path)))
    if part:
        of_part = FileSettings(sha256=sha256, part=part, directory=str(path.resolve()))
        return Stage("model", slugify(_name_part(path.name, part)), VERSION, of_part)
    return Stage("model", slugify(path.name), VERSION, FileSettings(sha256=sha256), location=path.resolve())


def whole_stage(source: ModelSource) -> Stage[Settings] | None:
    """Return the stage that stands for all of a model, of which a part goes through the chain and is to be put back;
    None where none is."""
    if source.part != "all":
        return None
    return stage(source.model_copy(update={"part": None}), teaches=True)


def tokenizer_stage(path: str, where: str) -> Stage[Settings]:
    """Return the stage that stands for the tokenizer in a directory, whatever weights lie beside it.

    Raises UserError at `where` the recipe names it for one that is not there.
    """
    directory = model_path(LocalModel(path=path), where)
    if directory.is_file() or not (directory / "config.json").is_file():
        do = "Give a directory with tokenizer, chat template and config.json"
        raise UserError(problem(where, f"{directory} holds no config.json", do))
    sha256 = hash_source(directory, without=(*NO_NUMBERS, "*.safetensors", "*.bin", "*.gguf"))
    return Stage("model", slugify(directory.name), VERSION, FileSettings(sha256=sha256), location=directory.resolve())


def _name_part(name: str, part: Text | None) -> str:
    return f"{name}-{part}" if part else name


def build(work: Work[Settings]) -> Summary:
    """Download the model, or write the dequantised one."""
    summary = _write(work)
    if not getattr(work.settings, "teaches", False):
        require_fitting(work.directory, load_config(work.directory).vocab_size)
    return summary


def _write(work: Work[Settings]) -> Summary:
    settings = work.settings
    if isinstance(settings, HubSettings):
        whole = work.directory / "whole" if settings.part else work.directory
        download_model(settings.repo, settings.revision, whole)
        facts = describe_directory(whole, settings.teaches)
        if settings.part:
            summary = _take_text(whole, work.directory, settings.repo)
            shutil.rmtree(whole)
            return summary
        if not settings.teaches:
            require_supported(facts.architecture, "model")
            require_sound(work.directory)
        return Summary(source=settings.repo, architecture=facts.architecture, blocks=facts.blocks)
    if settings.directory:
        return _take_text(Path(settings.directory), work.directory, Path(settings.directory).name)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from sdft_ray.progress import quiet_transformers

    quiet_transformers()
    assert settings.gguf, "a directory is never built"
    gguf = Path(settings.gguf)
    model, info = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        what = f"has nothing for {missing[0]} ({len(missing)} tensors of the model are missing)"
        raise UserError(problem(str(gguf), what, "Download it again, whole"))
    _require_all_taken(gguf, model)
    vars(model.config).pop("quantization_config", None)  # it is a plain model from here on
    # bfloat16 is what such models were trained in; the quantised values need no more than its 8 bits.
    model.to(torch.bfloat16).save_pretrained(work.directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(work.directory)
    spell_tokenizer_for_older(work.directory)
    return Summary(
        source=gguf.name,
        architecture=model.config.model_type,
        blocks=model.config.num_hidden_layers,
        parameters=model.num_parameters(),
        dtype="bfloat16",
    )


def _take_text(whole: Path, directory: Path, source: str) -> Summary:
    """Write the text decoder of a model."""
    config = text_config(whole)
    require_supported(architecture := config["model_type"], "model")
    parameters = write_text_part(whole, directory, config)
    return Summary(source=source, architecture=architecture, blocks=count_blocks(config), parameters=parameters)


def _require_all_taken(gguf: Path, model: PreTrainedModel) -> None:
    """Raise UserError for a file with tensors that the loaded model has no place for: transformers drops them.

    One of them, rope_freqs.weight, is how Llama 3.1 and later stretch their positions.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = gguf_field(gguf, "general.architecture")
    (known,) = (each for each, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(known, model.config.num_hidden_layers)
    taken = {names.get_name(name, (".weight", ".bias")) for name in model.state_dict()}
    if dropped := sorted(tensor.name for tensor in read_gguf(gguf).tensors if tensor.name not in taken):
        what = f"holds {dropped[0]}, which transformers does not take ({len(dropped)} such tensors)"
        raise UserError(problem(str(gguf), what, "Give the model as a directory with safetensors"))
