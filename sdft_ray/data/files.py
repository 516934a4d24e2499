"""Which files a path in a recipe names: one file, a directory of files, a glob, or what `datasets` saved to disk.

In: the text of a path. Out: the files in the order in which they are read, their hash, and a name for people. The hash
of several files is over their contents in order: names and places may change, and nothing is built again.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.data.copies import is_address, local_path
from sdft_ray.data.records import KINDS, ROW_FILE, kind, stem
from sdft_ray.data.text import decode, parse_json
from sdft_ray.errors import UserError, problem
from sdft_ray.store.files import hash_files, hash_source, inside
from sdft_ray.store.identity import canonical_json

ROWS = f"{ROW_FILE}, a directory or a glob"
# Files that lie beside rows and hold none. Names in lower case.
_BESIDE = ("*.md", "dataset_info.json", "dataset_infos.json", "_success")
_WORDS = ("readme*", "license*", "licence*")  # and these, unless they are of a kind that holds rows
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # of datasets' save_to_disk


def path_of(text: str, where: str = "rows.path") -> Path:
    """Return the path of files that a recipe names: of an address that of its copy, which is brought up to date."""
    return expand(local_path(text, where) if is_address(text) else text, where)


def expand(text: str, where: str) -> Path:
    """Return a path with the home that a ~ at its beginning means; raises UserError for a user whom nobody knows."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(problem(where, f"{text} begins with the home of nobody here", "Write the whole path")) from None


def find_files(text: str, where: str = "rows.path", kinds: Sequence[str] = KINDS, do: str = ROWS) -> list[Path]:
    """Return the files that a path names, in the order of their names; raises UserError where there are none.

    where: the key that the path stands at. kinds: suffixes of the files that a directory or glob may hold. do: what
    may be given, in words.
    """
    path = path_of(text, where)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _saved_files(path, where) or _directory_files(path, where, kinds)
    base, pattern = split_glob(path)
    if not pattern:
        raise UserError(problem(where, f"{path} does not exist", f"Give {do}"))
    if not (files := _row_files(matching_files(base, pattern), str(path), where, kinds)):
        raise UserError(problem(where, f"{path} matches no file", "Check the pattern"))
    return files


def split_glob(path: Path) -> tuple[Path, str]:
    """Return the directory that a glob starts at and the rest of it; an empty rest where the path is no glob.

    A part that exists under its own name is that name, whatever characters it has.

    >>> split_glob(Path("data/2024/*.jsonl")), split_glob(Path("data/rows.jsonl"))
    ((PosixPath('data/2024'), '*.jsonl'), (PosixPath('data/rows.jsonl'), ''))
    """
    base = Path()
    for i, part in enumerate(path.parts):
        if any(mark in part for mark in "*?[") and not (base / part).exists():
            return base, "/".join(path.parts[i:])
        base /= part
    return base, ""


def matching_files(base: Path, pattern: str) -> list[Path]:
    """Return what a glob matches below a directory, without directories, in the order of names."""
    names = glob.glob(pattern, root_dir=base, recursive=True)  # noqa: PTH207 - Path.glob also matches hidden files
    return [base / name for name in sorted({*names}) if not (base / name).is_dir()]


def hash_content(files: Sequence[Path], text: str) -> str:
    """Return the content hash of the files that a path names: of a single file its own, else of all in order."""
    if files == [path_of(text)]:
        return hash_source(files[0])
    return hashlib.sha256(canonical_json(hash_files(files)).encode()).hexdigest()


def name_of(text: str) -> str:
    """Return a name for people: of a file without suffixes, of a directory, or of the one that a glob starts at."""
    path = path_of(text)
    if not path.is_dir():
        base, pattern = split_glob(path)
        if not pattern:
            return stem(path)
        path = base
    return path.absolute().name


def _directory_files(path: Path, where: str, kinds: Sequence[str]) -> list[Path]:
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    if inner := [entry for entry in entries if entry.is_dir()]:
        _require_one_split(path, inner, where)
        what, do = f"{path} holds the directory {inner[0].name}", f"Give {inner[0]}"
        if [entry for entry in entries if not _is_beside(entry)] != inner[:1]:
            do = f"Give a glob of all files, such as {path}/**/*{kinds[1]}"
        raise UserError(problem(where, what, do))
    if not (files := _row_files(entries, str(path), where, kinds)):
        what = f"{path} is a directory without a file of a known kind"
        raise UserError(problem(where, what, f"Give one with {', '.join(kinds[:-1])} or {kinds[-1]} files"))
    _require_one_split(path, files, where)
    return files


def _require_one_split(path: Path, entries: Iterable[Path], where: str) -> None:
    """Raise UserError for files, or directories, of a directory whose names are those of several splits."""
    found = ((entry, split) for entry in entries if (split := _SPLIT.search(entry.name)))
    splits = {split[0]: entry.name if entry.is_dir() else f"{entry.name[: split.end()]}*" for entry, split in found}
    if len(splits) > 1:
        what = f"{path} holds several splits ({', '.join(splits)})"
        raise UserError(problem(where, what, f"Give one of them, such as {path}/{[*splits.values()][-1]}"))


def _row_files(files: Iterable[Path], source: str, where: str, kinds: Sequence[str]) -> list[Path]:
    """Return files without those that lie beside rows; raises UserError for one of another kind."""
    kept = [file for file in files if not _is_beside(file)]
    if stray := next((file for file in kept if kind(file) not in kinds or not file.is_file()), None):
        what = f"{source} holds {stray.name}, which is no file of a known kind"
        raise UserError(problem(where, what, f"Remove {stray.name} from there"))
    return kept


def _is_beside(file: Path) -> bool:
    names = _BESIDE if kind(file) in KINDS else (*_BESIDE, *_WORDS)
    return any(fnmatch.fnmatch(file.name.lower(), name) for name in names)


def _saved_files(path: Path, where: str) -> list[Path]:
    """Return the Arrow files of a directory that `datasets` saved; none for any other directory."""
    if (path / _SPLITS).is_file():
        splits = _read(path / _SPLITS).get("splits")
        splits = splits if isinstance(splits, list) else []
        what = f"{path} holds several splits ({', '.join(map(str, splits))})"
        raise UserError(problem(where, what, f"Give one of them, such as {path}/{splits[0] if splits else 'train'}"))
    state = _read(path / _STATE) if (path / _STATE).is_file() else {}
    if state.get("_indices_data_files"):
        what = f"{path} is saved by an old version of datasets, with its order in a file of its own"
        raise UserError(problem(where, what, "Save it again with a new version"))
    named = state.get("_data_files") or []
    if not (isinstance(named, list) and all(isinstance(each, dict) and each.get("filename") for each in named)):
        raise UserError(problem(where, f"{path / _STATE} names no files in _data_files", "Save the data set again"))
    files = [inside(path, str(entry["filename"])) for entry in named]
    if lost := next((file for file in files if not file.is_file()), None):
        raise UserError(problem(where, f"{path} lacks {lost.name}, which its {_STATE} names", "Copy it, too"))
    return files


def _read(path: Path) -> dict[str, Any]:
    value = parse_json(decode(path.read_bytes(), str(path)), path)
    return value if isinstance(value, dict) else {}
