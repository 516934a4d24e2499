"""Read files of rows and texts: their values with file and line, or one line that names the mistake.

In: .json, .jsonl, .parquet and .txt files. Out: records and paragraphs, each with its place. This module does not
know the meaning of the values.
"""

from __future__ import annotations

import codecs
import importlib.util
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from sdft_ray.core.rows import Row
from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.spec.section import Section
from sdft_ray.spec.sources import Fields, FileRows, GymRows, HubRows, RowSource
from sdft_ray.store.files import hash_source

ROW_FILE = "a .json, .jsonl or .parquet file"
_LFS_POINTER = b"version https://git-lfs"


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line or row number, record) of a .json, .jsonl or .parquet file; raises UserError with the place."""
    require_text(path)
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
    """Return the problem of a file without a known suffix."""
    return f"is a {suffix} file, which is not known" if suffix else "has no suffix that names its format"


def is_missing(value: Any) -> bool:
    """Return whether a value stands for no value in files and tables: null, or NaN."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def kind_of(value: Any) -> str:
    """Return the kind of a value of a file, in words."""
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
        do = "Fix this line: write one {...}"
        raise UserError(problem(where, f"is not JSON ({error.msg} at column {error.colno})", do)) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(problem(where, f"cannot be read ({_first_line(error)})", "Fix this line")) from None
    if not isinstance(record, dict):
        raise UserError(problem(where, "is not an object", "Write one {...} a line"))
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
    what, do = "is not a list", "Give a list of objects"
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
    """Raise UserError for a file that is empty, or a pointer to another one."""
    if _first_bytes(path) == b"":
        raise UserError(problem(str(path), "is empty", "Copy or download it again"))


def require_text(path: Path) -> None:
    """Raise UserError for a file of rows or texts that is a pointer to another, or is in UTF-16 or UTF-32."""
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


# reasoning-gym makes row i of seed s from s + i: neighbouring seeds would share nearly all rows.
GYM_SEED_SPACING = 1_000_000


def read_refusal(error: BaseException) -> tuple[str, str]:
    """Return the problem and the remedy where a hub does not give a repository."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # a download reports only that there is no local copy
        error = error.__cause__ or error
    match error:
        case errors.GatedRepoError():
            return "is gated, and the hub does not let you in", "Ask for access on its page and set HF_TOKEN"
        case errors.RevisionNotFoundError():
            return "has no such revision", "Check the commit"
        case errors.RepositoryNotFoundError():
            return "is not on the hub, or private", "Check the name and HF_TOKEN"
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return "the hub refuses your token", "Set a valid HF_TOKEN"
        case errors.HfHubHTTPError():
            return f"the hub answers {error.response.status_code}", "Try again later"
        case errors.OfflineModeIsEnabled():
            return "the hub is not asked: offline mode is on", "Unset HF_HUB_OFFLINE"
        case _:
            return f"no hub in reach ({error})", "Check the network and HF_ENDPOINT"


# --- rows -----------------------------------------------------------------------------------------------------


class GymContent(Section):
    """Rows that reasoning-gym generates. The generator is the data: another version may make other rows."""

    gym: str
    options: dict[str, JsonValue]
    version: str


class FileContent(Section):
    """Rows of a file."""

    sha256: str
    fields: Fields


class HubContent(Section):
    """Rows of a dataset on a hub."""

    repo: str
    revision: str
    subset: str | None
    split: str
    fields: Fields


RowsContent = GymContent | FileContent | HubContent


def rows_content(source: RowSource) -> RowsContent:
    """Return the content of rows as ids hash it: a hash, commit or generator, never a local path."""
    match source:
        case GymRows():
            return GymContent(gym=source.gym, options=source.options, version=metadata.version("reasoning-gym"))
        case FileRows():
            return FileContent(sha256=hash_source(_row_file(source.path)), fields=source.fields)
        case HubRows():
            return HubContent(**{name: getattr(source, name) for name in HubContent.model_fields})


def read_rows(source: RowSource) -> list[Row]:
    """Return the raw rows of a source without ids, at most `limit`, in the source's order.

    `answer` is None where the source has no column for it. A worked row of GSM8K:
    {"question": "Weng earns…", "answer": "…#### 10"} becomes
    Row("Weng earns…", "…#### 10", None).
    """
    if isinstance(source, GymRows):
        return _gym_rows(source)
    if isinstance(source, FileRows):
        path = _row_file(source.path)
        where, records = str(path), read_records(path)
    else:
        where, records = source.repo, _hub_records(source)
    rows: list[Row] = []
    for number, record in records:
        if source.limit is not None and len(rows) == source.limit:
            break
        rows.append(_map_fields(record, source.fields, f"{where}:{number}"))
    return rows


def _row_file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        what = f"{path} {'is a directory' if path.is_dir() else 'does not exist'}"
        raise UserError(problem("rows.path", what, f"Give {ROW_FILE}"))
    return path


def _gym_rows(source: GymRows) -> list[Row]:
    with warnings.catch_warnings():
        # Python compiles a module where it is imported for the first time, and one of its dependencies is careless.
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

    if source.gym not in DATASETS:
        raise UserError(problem("rows.gym", f"{source.gym} is no task of reasoning-gym", nearest(source.gym, DATASETS)))
    try:
        seed = source.seed * GYM_SEED_SPACING
        dataset = reasoning_gym.create_dataset(source.gym, size=source.limit, seed=seed, **source.options)
    except (TypeError, AssertionError, ValueError) as error:
        what = f"{source.gym} refuses them ({error})"
        raise UserError(problem("rows.options", what, "Change rows.options")) from None
    # A generated problem has no worked response: its answer is the reference.
    return [Row(item["question"], answer := str(item["answer"]), answer) for item in dataset]


def _hub_records(source: HubRows) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        dataset = datasets.load_dataset(source.repo, source.subset, split=source.split, revision=source.revision)
    except (ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(problem(source.repo, str(error), "Check repo, subset and split")) from None
    except (ConnectionError, FileNotFoundError, HfHubHTTPError) as error:
        what = f"cannot be downloaded ({' '.join(str(error).split())})"
        raise UserError(problem(source.repo, what, "Check the network and HF_ENDPOINT")) from None
    yield from enumerate(dataset, 1)


def _map_fields(record: Mapping[str, Any], fields: Fields, where: str) -> Row:
    columns = fields.model_dump(exclude_none=True)
    for key, column in columns.items():
        if column not in record or isinstance(record[column], list):
            _refuse_conversation(record, where)
        if column not in record:
            raise UserError(problem(f"rows.fields.{key}", f"{where} has no {column}", nearest(column, record)))
    texts = {key: None if is_missing(record[column]) else record[column] for key, column in columns.items()}
    for key, value in texts.items():
        optional = key in ("context", "answer")
        is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
        if not (isinstance(value, str) or (optional and value is None) or (key == "answer" and is_number)):
            what = f"{columns[key]} is {kind_of(value)}, not {'text or a number' if key == 'answer' else 'text'}"
            raise UserError(problem(where, what, "Fix this row"))
        require_characters(str(value), where)
    context, answer = (texts.get("context") or "").strip(), texts.get("answer")
    prompt = f"{texts['context']}\n\n{texts['prompt']}" if context else texts["prompt"]
    return Row(str(prompt), str(texts["response"]), None if answer is None else str(answer))


def _refuse_conversation(record: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a record that holds its texts as the turns of a conversation."""
    for name, turns in record.items():
        keys = [turn.keys() for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        if any({"role", "content"} <= names or {"from", "value"} <= names for names in keys):
            what = f"{name} is a conversation, and conversations are not supported yet"
            do = "Save its question and its answer as two columns of text, and name them in rows.fields"
            raise UserError(problem(where, what, do))


def read_json(path: Path, missing: str = "does not exist") -> Any:
    """Return a parsed JSON file; raises UserError with the place of a mistake."""
    try:
        return parse_json(read_text(path), path)
    except FileNotFoundError:
        raise UserError(problem(str(path), missing, "Check the path")) from None


def read_text(path: Path) -> str:
    """Return the text of a file that other programs also read, less tolerantly."""
    require_whole(path)
    content = path.read_bytes()
    if content.startswith(codecs.BOM_UTF8):
        what = "begins with a byte-order mark, which other programs take for text"
        raise UserError(problem(str(path), what, "Save it as UTF-8 without one"))
    return decode(content, str(path))


def read_object(path: Path, missing: str = "does not exist") -> dict[str, Any]:
    value = read_json(path, missing)
    if not isinstance(value, dict):
        raise UserError(problem(str(path), "is not an object", "Copy or download it again"))
    return value


def package_file(package: str, file: str, where: str) -> Path:
    """Return a file inside an installed package, found without importing the package."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of the package that a dotted name lies in
        spec = None
    if spec is None or not spec.submodule_search_locations:
        do = f"Install it: pip install {package.replace('_', '-')}"
        raise UserError(problem(f"{where}.package", f"{package} is not installed", do))
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / file).is_file():
        names = [path.name for path in folder.iterdir() if path.suffix == Path(file).suffix]
        raise UserError(
            problem(f"{where}.file", f"{package} has no {file}", nearest(file, names or ["nothing like it"]))
        )
    return folder / file
