"""Find models in packages, local files and on a hub, and read their facts.

In: the model section of a recipe. Out: paths and facts. Callers of this module need not know the source of a model. It
refuses bad input with the file's name.
"""

from __future__ import annotations

import functools
import re
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray import imports
from sdft_ray.core.surgery import count_blocks
from sdft_ray.data.readers import package_file, read_refusal, require_whole
from sdft_ray.errors import UserError, problem
from sdft_ray.models.companions import LICENCES
from sdft_ray.models.directory import ModelFacts, describe_directory
from sdft_ray.models.parts import text_config
from sdft_ray.spec.sources import HubModel, LocalModel, ModelSource, PackagedModel

if TYPE_CHECKING:
    from gguf import GGUFReader


# Files of a model directory that move no number: a correction of one keeps all results.
NO_NUMBERS = ("generation_config.json", "*.md", *LICENCES)

_STRETCHED = "rope_freqs.weight"


def describe_model(source: ModelSource, where: str = "model.path", teaches: bool = False) -> ModelFacts | None:
    """Return a model's facts from its headers; None for a hub model, whose headers come with the download.

    teaches: it only generates. Raises UserError for a directory that is not a chat model in safetensors, and at `where`
    the recipe names it for one that is not there.
    """
    if isinstance(source, HubModel):
        return None
    path = model_path(source, where)
    if not path.is_dir():
        return describe_gguf(path)
    facts = describe_directory(path, teaches)
    if source.part is None:
        return facts
    text = text_config(path)
    heads = text.get("num_attention_heads")
    return ModelFacts(text["model_type"], count_blocks(text), text.get("max_position_embeddings"), heads)


def describe_gguf(path: Path) -> ModelFacts:
    """Return the facts of a GGUF file, refusing one that is no whole chat model or would load as another."""
    require_whole(path)
    fields = read_gguf(path).fields
    if (kind := _gguf_value(path, "general.type", "model")) != "model":
        raise UserError(problem(str(path), f"holds no model (general.type is {kind})", "Give the model itself"))
    part = re.search(r"-\d+-of-(\d+)\.gguf$", path.name)
    if (parts := int(_gguf_value(path, "split.count", part[1] if part else 1))) > 1:
        do = "Join them: llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf"
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
    heads = _gguf_value(path, f"{architecture}.attention.head_count", None)
    most = int(gguf_field(path, context)) if context in fields else None
    return ModelFacts(architecture, blocks, most, heads if isinstance(heads, int) else None)


def _require_gguf_tensors(path: Path, blocks: int) -> None:
    """Raise UserError unless each block has the tensors that others have: transformers makes up missing ones."""
    names = {tensor.name for tensor in read_gguf(path).tensors}
    matches = [match for name in names if (match := re.match(r"blk\.(\d+)\.(.+)", name))]
    parts = {match[2] for match in matches} or {"attn_norm.weight"}
    expected = [f"blk.{i}.{part}" for i in range(min(blocks, len(names) + 1)) for part in sorted(parts)]
    if further := sorted(match[0] for match in matches if int(match[1]) >= blocks):
        what = f"holds {further[0]}, and its header has {blocks} blocks"
        raise UserError(problem(str(path), what, "Download it again, whole"))
    if _STRETCHED in names:
        what = f"stretches its positions as Llama 3.1 does ({_STRETCHED}), which transformers does not read"
        raise UserError(problem(str(path), what, "Give the model as a directory with safetensors"))
    missing = [name for name in ("token_embd.weight", *expected, "output_norm.weight") if name not in names]
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UserError(problem(str(path), f"lacks {missing[0]}{more}", "Download it again, whole"))


def read_gguf(path: Path) -> GGUFReader:
    """Return the header (without its arrays) and the tensors of a GGUF file; raises UserError for other files."""
    stat = path.stat()
    return _read_gguf(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _read_gguf(path: Path, size: int, changed: int) -> GGUFReader:
    import numpy as np

    with imports.without("mistral_common"):
        from gguf import GGUFEndian, GGUFReader, GGUFValueType

    class Header(GGUFReader):
        """Passes over arrays, which nothing here reads: a vocabulary of 150,000 texts and numbers takes a second."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            (kind,), (count,) = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            end = orig_offs + 12
            if number := self.gguf_scalar_to_np.get(kind):
                end += int(count) * np.dtype(number).itemsize
            elif kind == GGUFValueType.STRING:
                content, length = self.data.data, struct.Struct("<Q" if self.endianess == GGUFEndian.LITTLE else ">Q")
                for _ in range(count):
                    end += 8 + length.unpack_from(content, end)[0]
            else:
                for _ in range(count):
                    end += self._get_field_parts(end, kind)[0]
            return end - orig_offs, [], [], [GGUFValueType.ARRAY, GGUFValueType(kind)]

    try:
        return Header(path)
    except Exception as error:  # noqa: BLE001 - a damaged file can fail it in any way
        what = f"cannot be read as GGUF ({' '.join(str(error).split())})"
        raise UserError(problem(str(path), what, "Download it again")) from None


def gguf_field(path: Path, name: str) -> Any:
    """Return a value of a GGUF file's header; raises UserError where it is missing."""
    field = read_gguf(path).fields.get(name)
    if field is None:
        raise UserError(problem(str(path), f"has no {name} in its header", "Give a language model, whole"))
    return field.contents()


def _gguf_value(path: Path, name: str, default: Any) -> Any:
    return gguf_field(path, name) if name in read_gguf(path).fields else default


def model_path(source: PackagedModel | LocalModel, where: str = "model.path") -> Path:
    """Return the file or directory of a local model; raises UserError at `where` the recipe names it."""
    if isinstance(source, PackagedModel):
        return package_file(source.package, source.file, "model")
    path = Path(source.path).expanduser()
    if not path.exists():
        raise UserError(problem(where, f"{path} does not exist", "Give a model directory or a .gguf file"))
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise UserError(problem(where, f"{path} is not a .gguf file", "Give the directory it lies in"))
    if path.is_file() and source.part:
        raise UserError(problem("model.part", f"{path} is a .gguf file, of one part", "Remove model.part"))
    return path


def download_model(repo: str, revision: str, directory: Path) -> None:
    """Write a hub model's safetensors, config and tokenizer into `directory`; raises UserError where it cannot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
    patterns += ["LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*"]
    try:
        snapshot_download(
            repo,
            revision=revision,
            local_dir=directory,
            allow_patterns=patterns,
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise UserError(problem(repo, *read_refusal(error))) from None
    shutil.rmtree(directory / ".cache", ignore_errors=True)  # files of the hub client itself
