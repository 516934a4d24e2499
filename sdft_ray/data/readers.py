"""Read rows of any source, and the JSON and text files of models, or one line that names the mistake.

In: a row source, or the path of a file. Out: rows, and the content that ids hash; parsed values and texts. Columns of a
file or hub dataset become fields of a row here and nowhere else.
"""

from __future__ import annotations

import codecs
import importlib.util
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from pydantic import JsonValue

from sdft_ray import imports
from sdft_ray.core.rows import PLAIN, Row
from sdft_ray.data.conversations import add_response, find_conversations, is_answered, read_conversation
from sdft_ray.data.files import find_files, hash_content
from sdft_ray.data.records import Record, read_records, values_of
from sdft_ray.data.text import decode, first_bytes, first_line, parse_json
from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.spec.section import Section
from sdft_ray.spec.sources import Fields, FileRows, GymRows, HubRows, RowSource, TableRows, Turns

MOST_CHARACTERS = 1 << 22
"""Of a text: a million tokens. A tokenizer takes hundreds of times the memory of its text."""


def is_missing(value: Any) -> bool:
    """Return whether a value stands for no value in files and tables: null, or NaN."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def kind_of(value: Any) -> str:
    """Return the kind of a value of a file, in words."""
    names = {list: "a list", dict: "an object", bool: str(value).lower(), int: "a number", float: "a number"}
    return "empty" if is_missing(value) else names.get(type(value), f"of type {type(value).__name__}")


def require_characters(text: str, where: str) -> None:
    """Raise UserError for a text that no file and no tokenizer can hold."""
    if len(text) > MOST_CHARACTERS:
        what = f"holds a text of {len(text)} characters (expected at most {MOST_CHARACTERS})"
        raise UserError(problem(where, what, "Split or remove it"))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(problem(where, "holds half a character (a lone surrogate)", "Fix this row")) from None


def require_whole(path: Path) -> None:
    """Raise UserError for a file that is empty, or a pointer to another one."""
    if first_bytes(path) == b"":
        raise UserError(problem(str(path), "is empty", "Copy or download it again"))


_OPTIONAL = ("context", "answer", "tools")  # columns whose value may be missing, and in JSON also their key
FIRST_RECORDS = 20_000  # that are read before anything is built (a second), and show which columns there are
_BATCH_ROWS = 1000  # of a hub dataset that are read at once
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

    optional = ("turns", "plain")
    sha256: str
    fields: Fields
    turns: Turns | None = None
    plain: bool | None = None


class HubContent(Section):
    """Rows of a dataset on a hub."""

    optional = ("turns", "plain")
    repo: str
    revision: str
    subset: str | None
    split: str
    fields: Fields
    turns: Turns | None = None
    plain: bool | None = None


RowsContent = GymContent | FileContent | HubContent


def rows_content(source: RowSource) -> RowsContent:
    """Return the content of rows as ids hash it: a hash, commit or generator, never a local path."""
    match source:
        case GymRows():
            return GymContent(gym=source.gym, options=source.options, version=metadata.version("reasoning-gym"))
        case FileRows():
            sha256 = hash_content(find_files(source.path), source.path)
            return FileContent(sha256=sha256, fields=source.fields, **_kind_of_rows(source))
        case HubRows():
            names = ("repo", "revision", "subset", "split", "fields")
            return HubContent(**{name: getattr(source, name) for name in names}, **_kind_of_rows(source))


def _kind_of_rows(source: TableRows) -> dict[str, Any]:
    """Return what makes other rows of the same columns; None where it makes no difference."""
    return {"turns": source.turns if source.fields.messages else None, "plain": source.plain or None}


def read_rows(source: RowSource) -> list[Row]:
    """Return the raw rows of a source without ids, at most those of `limit` records, in the source's order.

    `answer` is None where the source has no column for it. A worked row of GSM8K:
    {"question": "Weng earns…", "answer": "…#### 10"} becomes
    Row("Weng earns…", "…#### 10", None).
    """
    return list(iterate_rows(source))


def read_first(source: FileRows, most: int) -> tuple[list[Row], bool]:
    """Return the raw rows of the first `most` records of a file, and whether these are all."""
    records = _with_columns(itertools.islice(_file_records(source), source.limit), source)
    rows = [row for record in itertools.islice(records, most) for row in rows_of(record, source)]
    return rows, next(records, None) is None


def iterate_rows(source: RowSource) -> Iterator[Row]:
    """Yield the rows of `read_rows` one at a time, whatever their number."""
    if isinstance(source, GymRows):
        yield from _gym_rows(source)
        return
    records = _file_records(source) if isinstance(source, FileRows) else _hub_records(source)
    for record in _with_columns(itertools.islice(records, source.limit), source):
        yield from rows_of(record, source)


def _with_columns(records: Iterator[Record], source: TableRows) -> Iterator[Record]:
    """Yield records; raises UserError for a column that a record may lack, and that none of the first ones has."""
    wanted = {key: column for key in _OPTIONAL if (column := getattr(source.fields, key))}
    lacking: dict[str, Record] = {}
    for record in itertools.islice(records, FIRST_RECORDS):
        for key in [key for key, column in wanted.items() if column in record.values]:
            del wanted[key]
        lacking = {key: lacking.get(key, record) for key in wanted}
        yield record
    for key, first in lacking.items():
        _refuse_absent(key, wanted[key], first)
    yield from records


def _file_records(source: FileRows) -> Iterator[Record]:
    for path in find_files(source.path):
        yield from read_records(path)


def _gym_rows(source: GymRows) -> Iterator[Row]:
    with warnings.catch_warnings():
        # Python compiles a module where it is imported for the first time, and one of its dependencies is careless.
        warnings.simplefilter("ignore", SyntaxWarning)
        imports.postpone("cellpylib")  # with matplotlib, half of the time
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
    for item in dataset:
        yield Row(item["question"], answer := str(item["answer"]), answer)


def _hub_records(source: HubRows) -> Iterator[Record]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        dataset = datasets.load_dataset(source.repo, source.subset, split=source.split, revision=source.revision)
    except datasets.exceptions.DatasetGenerationError as error:  # files whose columns differ
        what = f"cannot be read as one table ({' '.join(str(error.__cause__ or error).split())[:200]})"
        raise UserError(problem(source.repo, what, "Give a subset whose files have the same columns")) from None
    except (ValueError, RuntimeError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(problem(source.repo, first_line(error), "Check repo, subset and split")) from None
    except (ConnectionError, FileNotFoundError, HfHubHTTPError) as error:
        what = f"cannot be downloaded ({' '.join(str(error).split())})"
        raise UserError(problem(source.repo, what, "Check the network and HF_ENDPOINT")) from None
    # As Arrow: it is read as the same table in a file is, and no image is decoded.
    batches = (batch for table in dataset.with_format("arrow").iter(_BATCH_ROWS) for batch in table.to_batches())
    for number, values in enumerate(itertools.chain.from_iterable(map(values_of, batches)), 1):
        yield Record(place := f"{source.repo}:{number}", place, values)


def rows_of(read: Record, source: TableRows) -> list[Row]:
    """Return the rows of a record: one, or those of a conversation; raises UserError for what is no row."""
    where, fields = read.where, source.fields
    columns = fields.model_dump(exclude_none=True, exclude={"format"})
    _require_columns(read, columns)
    if fields.messages is None:
        texts = {key: _read_text(key, columns, read) for key in columns}
        context = (texts.get("context") or "").strip()
        prompt = f"{texts['context']}\n\n{texts.get('prompt')}" if context else texts.get("prompt")
        return [
            Row(
                prompt or "", texts["response"] or "", texts.get("answer"), conversation=PLAIN if source.plain else None
            )
        ]
    turns, tools = read.values[fields.messages], read.values.get(fields.tools) if fields.tools else None
    system, answer = (_read_text(key, columns, read) if key in columns else None for key in ("context", "answer"))
    form = fields.format or "messages"
    if fields.response:
        turns = add_response(turns, read.values[fields.response], form, where)
    rows = list(read_conversation(turns, tools, system, form, source.turns, answer, where))
    for row in rows:
        require_characters(f"{row.conversation or row.prompt}{row.reference}", where)
    return rows


def _require_columns(read: Record, columns: Mapping[str, str]) -> None:
    for key, column in columns.items():
        is_absent = column not in read.values
        if key not in ("context", "tools") and (is_absent or isinstance(read.values.get(column), list)):
            _refuse_conversation(read, column, columns)
        if is_absent and not (key in _OPTIONAL and read.names_its_own):
            _refuse_absent(key, column, read)


def _refuse_absent(key: str, column: str, read: Record) -> NoReturn:
    do = nearest(column, read.names()) if read.values else "Fix this row"
    raise UserError(problem(f"rows.fields.{key}", f"{read.named_in} has no {column}", do))


def _read_text(key: str, columns: Mapping[str, str], read: Record) -> str | None:
    """Return the text of a record's field; None where an optional one has none."""
    value = None if is_missing(given := read.values.get(columns[key])) else given
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not (isinstance(value, str) or (key in _OPTIONAL and value is None) or (key == "answer" and is_number)):
        what = f"{columns[key]} is {kind_of(value)}, not {'text or a number' if key == 'answer' else 'text'}"
        raise UserError(problem(read.where, what, "Fix this row"))
    require_characters(str(value), read.where)
    return None if value is None else str(value)


def _refuse_conversation(read: Record, column: str, columns: Mapping[str, str]) -> None:
    """Raise UserError for a record that holds its texts as the turns of a conversation, first of all in `column`."""
    conversations = {} if columns.get("messages") in read.values else find_conversations(read.values)
    if name := column if column in conversations else next(iter(conversations), None):
        form = conversations[name]
        others = ", format: sharegpt" * (form == "sharegpt")
        if not is_answered(read.values[name], form) and (response := columns.get("response")) != name:
            others += f", response: {response or 'COLUMN'}"
        do = f"Set rows.fields to {{messages: {name}{others}}}"
        raise UserError(problem(read.where, f"{name} is a conversation", do))


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
