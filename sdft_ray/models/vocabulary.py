"""The vocabulary of a model as GGUF files hold it: tokens, merges, special tokens, chat template.

In: a model directory. Out: the tokenizer's fields of a GGUF file. llama.cpp knows how a tokenizer splits text before
it merges by a name alone, so a tokenizer whose way has no name there is refused: it would read other tokens, silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.data.chat import end_of_turn
from sdft_ray.data.readers import read_object
from sdft_ray.errors import UserError, problem
from sdft_ray.models.tokens import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

# The patterns of Llama 3 and Qwen 2 as their tokenizer.json has them; they differ in how many digits stay together.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3, _QWEN_2 = (rf"{_WORDS}{digits}{_REST}" for digits in (r"\p{N}{1,3}", r"\p{N}"))
# llama.cpp's names (`tokenizer.ggml.pre`), by the steps of tokenizer.json and whether whole words skip the merges.
_NAMES = {
    (("ByteLevel", True), False): "gpt-2",
    (("Digits", True), ("ByteLevel", True), False): "smollm",
    (("Split", _LLAMA_3), ("ByteLevel", False), True): "llama-bpe",
    (("Split", _QWEN_2), ("ByteLevel", False), False): "qwen2",
}
_NORMALIZERS = (None, "NFC")  # llama.cpp normalises nothing; text that is in NFC already, as most is, stays the same
_INSTEAD = "Convert it with llama.cpp's convert_hf_to_gguf.py"


def add_vocabulary(writer: GGUFWriter, model: Path, size: int) -> None:
    """Write a model's tokenizer into a GGUF file; size: rows of its embeddings.

    Raises UserError for a tokenizer that llama.cpp would read in another way.
    """
    from gguf import SpecialVocab, TokenType

    tokenizer = load_tokenizer(model)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name_pre_tokenizer(model / "tokenizer.json"))
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size
    for token, i in tokenizer.get_vocab().items():
        if i < size:  # those behind the last row are never written (tokens.py)
            tokens[i], kinds[i] = token, TokenType.NORMAL
    for i, added in ((i, added) for i, added in tokenizer.added_tokens_decoder.items() if i < size):
        kinds[i] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = SpecialVocab(model, load_merges=True, n_vocab=size)
    special.chat_template = tokenizer.chat_template
    special.add_special_token = {"bos": tokenizer("a").input_ids[0] == tokenizer.bos_token_id}
    # llama.cpp ends a text at both: at the end of a text, and at that of an assistant's turn.
    if (end := end_of_turn(tokenizer)) != tokenizer.eos_token_id:
        special.special_token_ids["eot"] = end
    special.add_to_gguf(writer, quiet=True)


def name_pre_tokenizer(path: Path) -> str:
    """Return llama.cpp's name of how a tokenizer splits text."""
    if not path.is_file():
        raise UserError(problem(str(path.parent), "has no tokenizer.json", _INSTEAD))
    tokenizer = read_object(path)
    model, normalizer = tokenizer.get("model") or {}, (tokenizer.get("normalizer") or {}).get("type")
    if not model.get("merges"):
        raise UserError(problem(str(path), "holds no merges, without which llama.cpp reads no tokenizer", _INSTEAD))
    if model.get("type") != "BPE" or model.get("byte_fallback") or normalizer not in _NORMALIZERS:
        kind = "SentencePiece's" if model.get("byte_fallback") else f"of kind {model.get('type')}"
        what = f"holds a tokenizer {kind}; only those that merge bytes (BPE) are written as GGUF"
        raise UserError(problem(str(path), what, _INSTEAD))
    first = tokenizer.get("pre_tokenizer") or {}
    steps = tuple(map(_step, first.get("pretokenizers") or [first]))
    if name := _NAMES.get((*steps, bool(model.get("ignore_merges")))):
        return name
    what = f"splits text in a way that has no name here ({', '.join(str(step[0]) for step in steps)})"
    raise UserError(problem(str(path), what, _INSTEAD))


def _step(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the kind of a pre-tokenizer, and the one of its settings that matters."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "ByteLevel", step.get("use_regex", True)
        case {"type": "Digits"}:
            return "Digits", step.get("individual_digits", False)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return "Split", pattern
        case _:
            return (step.get("type"),)
