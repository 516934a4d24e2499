"""Bytes of a user's file as text and JSON, or one line that names the file, the line and the mistake.

In: bytes, and the place they come from. Out: text, or a parsed value. Every reader of files uses these, so that the
same mistake has the same message everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdft_ray.errors import UserError, problem

_LFS_POINTER = b"version https://git-lfs"
# What the first bytes of a file say that it is, and the suffix of that; none where we do not read it.
_SIGNATURES = {
    b"\x1f\x8b": ("packed with gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("packed with zstd", ".zst"),
    b"\x50\x2a\x4d\x18": ("packed with zstd", ".zst"),  # begins with a frame without data, as pzstd writes it
    b"PAR1": ("a Parquet file", ".parquet"),
    b"ARROW1": ("an Arrow file", ".arrow"),
    b"PK\x03\x04": ("a zip archive", ""),
    b"BZh": ("packed with bzip2", ""),
    b"\xfd7zXZ": ("packed with xz", ""),
}


def first_bytes(path: Path) -> bytes:
    """Return the start of a file; raises UserError for a directory, and for a pointer to another file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except IsADirectoryError:
        raise UserError(problem(str(path), "is a directory, not a file", "Put the file in its place")) from None
    if start == _LFS_POINTER:
        what = "is a Git LFS pointer, not the file itself"
        raise UserError(problem(str(path), what, "Do: git lfs pull"))
    return start


def require_format(start: bytes, path: Path) -> None:
    """Raise UserError for a file whose first bytes are of another format than its name says."""
    suffix = path.suffix.lower()
    for signature, (what, own) in _SIGNATURES.items():
        if start.startswith(signature) and suffix != own:
            name = path.name + own if "packed" in what else path.stem + own
            do = f"Rename it to {name}" if own else "Unpack it, or save it in another format"
            raise UserError(problem(str(path), f"is {what}, in spite of its name", do))
    if start and suffix in (".gz", ".zst") and not any(map(start.startswith, _SIGNATURES)):
        raise UserError(problem(str(path), f"is not packed, in spite of its {suffix}", f"Rename it to {path.stem}"))


def require_text(start: bytes, path: Path) -> None:
    """Raise UserError for a text file whose first bytes are UTF-16 or UTF-32."""
    encoding = json.detect_encoding(start[: len(_LFS_POINTER)])  # by its byte-order mark or its zeros
    if not encoding.startswith("utf-8"):
        raise UserError(problem(str(path), f"is {encoding[:6].upper()} text", "Save it as UTF-8"))


def decode(content: bytes, where: str) -> str:
    """Return UTF-8 text without its byte-order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(problem(where, "is not UTF-8 text", "Save the file as UTF-8")) from None


class DoubleKey(ValueError):
    """An object of JSON has a key twice."""


def _require_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DoubleKey(f"it has the key {next(key for key in keys if keys.count(key) > 1)} twice")
    return value


def load_json(text: str) -> Any:
    """Return the value of JSON; raises ValueError also for an object that has a key twice, whose other value would be
    lost."""
    return json.loads(text, object_pairs_hook=_require_distinct_keys)


def parse_json(text: str, path: Path, load: Callable[[str], Any] = json.loads) -> Any:
    """Return the value that a JSON file holds; raises UserError with the line of a mistake."""
    try:
        return load(text)
    except json.JSONDecodeError as error:
        raise UserError(problem(f"{path}:{error.lineno}", f"is not JSON ({error.msg})", "Fix this line")) from None
    except (ValueError, RecursionError) as error:
        raise UserError(problem(str(path), f"cannot be read ({first_line(error)})", "Fix this file")) from None


def first_line(error: object) -> str:
    """Return the first line of an error's message without its end, with the next one where that is what it announces;
    its kind where it has no words."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    first = first.partition("; use sys.")[0]  # advice to programmers
    if isinstance(error, KeyError):  # its message is the key
        first = f"{type(error).__name__}: {first}"
    return (f"{first} {more[0].strip()}" if first.endswith(":") and more else first)[:200].rstrip(".")
