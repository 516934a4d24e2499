"""Calibration texts: which file they are in, and its texts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sdft_ray.core.rows import Row
from sdft_ray.data.benchmarks import olmo_file, read_arrow
from sdft_ray.data.chat import encode_rows, opening_ids
from sdft_ray.data.readers import decode, describe_suffix, read_json, read_records, require_characters, require_text
from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.spec.recipe import Calibration
from sdft_ray.spec.section import Section
from sdft_ray.store.files import hash_source


def read_paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number of its last line, text) of what empty lines part."""
    require_text(path)
    lines: list[str] = []
    number = 0
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            decode(line.encode(errors="surrogateescape"), f"{path}:{number}")
            if line != "\n":
                lines.append(line)
                continue
            yield number, "".join(lines)
            lines = []
    yield number, "".join(lines)


# --- calibration texts and benchmark files ---------------------------------------------------------------------


def calibration_file(text: str) -> Path:
    """Return the file that calibration texts are in: that of `boolq`, or the one at a path."""
    if text == "boolq":
        return olmo_file("hf_datasets/boolq/none/validation/*.arrow", "prune.calibration.text")
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
        yield from ((number, row["passage"]) for number, row in enumerate(read_arrow(path), 1))
    elif path.suffix.lower() == ".txt":
        yield from read_paragraphs(path)
    else:
        for number, record in read_records(path):
            if field not in record:
                what = f"{path}:{number} has no {field}"
                raise UserError(problem("prune.calibration.field", what, nearest(field, record)))
            yield number, record[field]


Rows = Sequence[Row]

# --- corpora --------------------------------------------------------------------------------------------------


class CorpusSettings(Section):
    """A corpus as it is hashed: of a file its content, of rows their stage's id."""

    unhashed, optional = ("name", "path"), ("sha256",)
    field: str
    limit: int
    held_back: int
    max_tokens: int
    positions: Literal["last", "all", "response"]
    sha256: str | None = None
    name: str
    """What people call it; no two corpora of a chain have the same."""
    path: str | None = None
    """Where its file is."""


def describe_corpora(corpora: Sequence[Calibration], names_of_rows: Sequence[str | None]) -> tuple[CorpusSettings, ...]:
    """Return corpora as they are hashed, and numbered where two have one name; for each that is rows, their name."""
    described = []
    names: list[str] = []
    for corpus, name in zip(corpora, names_of_rows, strict=True):
        kept: dict[str, Any] = {
            key: getattr(corpus, key) for key in ("field", "limit", "held_back", "max_tokens", "positions")
        }
        if name is None:
            file = calibration_file(corpus.text or "boolq")
            name = "boolq" if corpus.text == "boolq" else file.stem
            kept |= {"sha256": hash_source(file), "path": str(file.absolute())}  # workers are elsewhere
        names.append(_distinct(name, names))
        described.append(CorpusSettings(name=names[-1], **kept))
    return tuple(described)


def _distinct(name: str, taken: Sequence[str]) -> str:
    """Return a name that is not taken: a further `texts` is `texts-2`."""
    numbers = (f"{name}-{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbers) if each not in taken)


@dataclasses.dataclass(frozen=True)
class Text:
    """One calibration text as the model sees it: content up to its last token, no end-of-turn mark."""

    ids: list[int]
    content_from: int = 0
    """Index of the first token of the response of a chat row, else 0."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One corpus: the texts that are measured, and others that the loss is taken on."""

    name: str
    positions: str
    measured: list[Text]
    loss_texts: list[Text]
    shortened: int
    """Texts that were longer than max_tokens."""


def read_corpora(base: Path, wanted: Sequence[CorpusSettings], rows: Mapping[int, Rows]) -> list[Corpus]:
    """Return corpora as token ids of the model in `base`; rows: of those that are rows, by their number."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    context = read_json(base / "config.json").get("max_position_embeddings")
    for corpus in wanted:
        if context and corpus.max_tokens > context:
            what = f"{corpus.max_tokens} is more than the model's context of {context}"
            raise UserError(problem("prune.calibration.max_tokens", what, f"Give at most {context}"))
    return [_read_corpus(tokenizer, corpus, rows.get(i)) for i, corpus in enumerate(wanted)]


def _read_corpus(tokenizer: Any, wanted: CorpusSettings, rows: Rows | None) -> Corpus:
    count = wanted.limit + wanted.held_back
    if rows:
        texts = _read_chat(tokenizer, rows[:count])
    else:
        assert wanted.path, "a corpus is rows or a file of texts"
        plain = read_calibration(Path(wanted.path), wanted.field, count)
        texts = [Text(tokenizer(text)["input_ids"]) for text in plain]
    texts = [text for text in texts if len(text.ids) > 1]  # nothing predicts the only token of a text
    if not texts:
        what = f"{wanted.path or wanted.name} has no text of two tokens"
        raise UserError(problem("prune.calibration", what, "Give longer texts"))
    kept = wanted.held_back if len(texts) == count else min(wanted.held_back, len(texts) // 3)
    measured = texts[: min(wanted.limit, len(texts) - kept)]
    return Corpus(
        wanted.name,
        wanted.positions,
        [_shorten(text, wanted.max_tokens) for text in measured],
        [_shorten(text, wanted.max_tokens) for text in texts[len(texts) - kept :]],
        sum(len(text.ids) > wanted.max_tokens for text in measured),
    )


def _read_chat(tokenizer: Any, rows: Rows) -> list[Text]:
    encoded = encode_rows(tokenizer, [(row.prompt, row.reference) for row in rows])
    opening = len(opening_ids(tokenizer))
    # Without the end of turn: a template's token is the same in every row and hardly a measure of anything.
    return [Text(row.ids[:-1], row.trained_from + opening) for row in encoded]


def _shorten(text: Text, limit: int) -> Text:
    """Return a text cut to `limit` tokens: plain text keeps its start, a chat row its end, where the response is."""
    if text.content_from == 0:
        return Text(text.ids[:limit])
    cut = max(0, len(text.ids) - limit)
    return Text(text.ids[cut:], max(0, text.content_from - cut))
