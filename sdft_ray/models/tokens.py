"""A model's tokenizer, and whether it fits the model.

In: a model directory, or a GGUF file. Out: the tokenizer, or an error that names the fault. A token without a row of
embeddings ends a training or an evaluation when a row first holds it, hours later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdft_ray.data.chat import encode_row
from sdft_ray.data.text import first_line
from sdft_ray.errors import UserError, problem

_EXCHANGE = ("QUESTION", "RESPONSE")


def load_tokenizer(path: Path) -> Any:
    """Return the tokenizer of a directory or a GGUF file, which runs no code of the model's own; raises UserError for
    one that transformers does not load."""
    from transformers import AutoTokenizer

    folder, gguf = (path, None) if path.is_dir() else (path.parent, path.name)
    try:
        return AutoTokenizer.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - the files of a tokenizer can be wrong in any way
        what = f"its tokenizer cannot be loaded ({first_line(error)})"
        raise UserError(problem(str(path), what, "Copy or download it again")) from None


def require_fitting(directory: Path, rows: int) -> None:
    """Raise UserError for a chat template that gives no training sequence, and for a token that a model with so many
    rows of embeddings cannot read."""
    tokenizer = load_tokenizer(directory)
    written = encode_row(tokenizer, *_EXCHANGE).ids
    if lost := [text for text in _EXCHANGE if text not in tokenizer.decode(written)]:
        what = f"its tokenizer does not give {lost[0]} back from its tokens"
        raise UserError(problem(str(directory), what, "Put the tokenizer's own files, whole, in their place"))
    if outside := find_outside(tokenizer, rows, written):
        what = f"its tokenizer has the token {outside[0]!r} with id {outside[1]}, and the model {rows} embeddings"
        raise UserError(problem(str(directory), what, "Remove the token from the tokenizer's files"))


def find_outside(tokenizer: Any, rows: int, written: list[int]) -> tuple[str, int] | None:
    """Return a token, with its id, that a model with so many rows of embeddings may be given and cannot read; None
    where there is none.

    written: ids that the chat template writes. A control token that is never written does no harm: Gemma 3's text
    models have one for images behind the last row.
    """
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    harmless = control - {*written, tokenizer.eos_token_id, tokenizer.pad_token_id}
    outside = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows and i not in harmless}
    return (outside[max(outside)], max(outside)) if outside else None
