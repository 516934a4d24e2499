"""Calibration texts: which file they are in, and its texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdft_ray.data.benchmarks import olmo_file, read_arrow
from sdft_ray.data.readers import decode, describe_suffix, read_records, require_characters, require_text
from sdft_ray.errors import UserError, nearest, problem


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
