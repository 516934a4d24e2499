"""Files of rows and texts as people have them: their values with file and line, or one line that says what is wrong.

In: .json, .jsonl, .parquet and .txt files. Out: records and paragraphs, each with its place. What the values mean is
not known here: that is `sources.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from sdft_ray.errors import UserError, problem

ROW_FILE = "a .json, .jsonl or .parquet file"
_LFS_POINTER = b"version https://git-lfs"


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line or row number, record) of a .json, .jsonl or .parquet file; raises UserError with the place."""
    _require_text(path)
    match path.suffix.lower():
        case ".jsonl":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if text := decode(line, f"{path}:{number}").strip():
                        yield number, _parse_record(text, path, number)
        case ".json":
            for number, record in enumerate(_read_list(path), 1):
                if not isinstance(record, dict):
                    raise UserError(problem(f"{path}:{number}", "is not an object", "Give a list of objects"))
                yield number, record
        case ".parquet":
            import pyarrow
            import pyarrow.parquet as pq

            try:
                yield from enumerate(pq.read_table(path).to_pylist(), 1)
            except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
                what = f"cannot be read as Parquet ({_first_line(error)})"
                raise UserError(problem(str(path), what, "Give a valid file")) from None
        case suffix:
            raise UserError(problem(str(path), describe_suffix(suffix), f"Save it as {ROW_FILE}"))


def describe_suffix(suffix: str) -> str:
    """Return what is wrong with a file that has no known suffix."""
    return f"is a {suffix} file, which is not known" if suffix else "has no suffix that says what it is"


def read_paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number of its last line, text) of what empty lines part."""
    _require_text(path)
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


def is_missing(value: Any) -> bool:
    """Return whether a value is how files and tables write that there is none: null, or NaN."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def kind_of(value: Any) -> str:
    """Return what a value of a file is, in words."""
    names = {list: "a list", dict: "an object", bool: str(value).lower(), int: "a number", float: "a number"}
    return "empty" if is_missing(value) else names.get(type(value), f"of type {type(value).__name__}")


def require_characters(text: str, where: str) -> None:
    """Raise UserError for a text that no file and no tokenizer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(problem(where, "holds half a character (a lone surrogate)", "Fix this row")) from None


def _parse_record(line: str, path: Path, number: int) -> dict[str, Any]:
    where = f"{path}:{number}"
    if number == 1 and line.startswith("["):
        raise UserError(problem(str(path), "is a JSON list, not one object a line", "Rename it to end in .json"))
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        do = "Fix this line: each line is one {...}"
        raise UserError(problem(where, f"is not JSON ({error.msg} at column {error.colno})", do)) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(problem(where, f"cannot be read ({_first_line(error)})", "Fix this line")) from None
    if not isinstance(record, dict):
        raise UserError(problem(where, "is not an object", "Each line is one {...}"))
    return record


def _read_list(path: Path) -> list[Any]:
    text = decode(path.read_bytes(), str(path))
    try:
        records = parse_json(text, path) if text.strip() else []
    except UserError:
        if _is_object(text.strip().partition("\n")[0]):
            raise UserError(problem(str(path), "holds JSON lines, not a list", "Rename it to end in .jsonl")) from None
        raise
    if isinstance(records, list):
        return records
    what, do = "is not a list", "Give a list of objects, or a .jsonl file"
    if isinstance(records, dict):
        lists = [name for name, value in records.items() if isinstance(value, list)]
        what = f"is an object, not a list ({'with a list in' if lists else 'of'} {', '.join(lists or records)})"
        do = "Save one list of objects by itself" if lists else do
    raise UserError(problem(str(path), what, do))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def parse_json(text: str, path: Path) -> Any:
    """Return the value that a JSON file holds; raises UserError with the line of a mistake."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(problem(f"{path}:{error.lineno}", f"is not JSON ({error.msg})", "Fix this line")) from None
    except (ValueError, RecursionError) as error:
        raise UserError(problem(str(path), f"cannot be read ({_first_line(error)})", "Fix this file")) from None


def require_whole(path: Path) -> None:
    """Raise UserError for a file that is empty, or only stands for the one that it should be."""
    if _first_bytes(path) == b"":
        raise UserError(problem(str(path), "is empty", "Copy or download it again"))


def _require_text(path: Path) -> None:
    """Raise UserError for a file of rows or texts that only stands for another, or is in UTF-16 or UTF-32."""
    encoding = json.detect_encoding(_first_bytes(path))  # by its byte-order mark or its zeros
    if not encoding.startswith("utf-8"):
        raise UserError(problem(str(path), f"is {encoding[:6].upper()} text", "Save it as UTF-8"))


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        what = "is a Git LFS pointer, not the file itself"
        raise UserError(problem(str(path), what, "Do: git lfs pull"))
    return start


def decode(content: bytes, where: str) -> str:
    """Return UTF-8 text without its byte-order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(problem(where, "is not UTF-8 text", "Save the file as UTF-8")) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
