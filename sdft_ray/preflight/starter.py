"""`sdft init`: a commented starter recipe for a model and a file of rows.

In: a model directory, .gguf file or hub name, and a file of rows. Out: a recipe file that `sdft check` accepts. A
comment gives the reason of each guess (columns, how answers are checked, sizes): a silent guess would train on the
wrong column. Where no guess is possible, an error names the option to give.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import jinja2
import yaml

from sdft_ray.core.rows import Row
from sdft_ray.core.spelling import final_part, has_words
from sdft_ray.data.checkers import read_answer
from sdft_ray.data.conversations import find_conversations, is_answered, roles_in
from sdft_ray.data.files import expand, find_files
from sdft_ray.data.readers import is_missing, read_json, read_refusal, read_rows
from sdft_ray.data.records import ROW_FILE, read_records
from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.models.sources import describe_model
from sdft_ray.preflight import limits
from sdft_ray.spec.sources import Fields, FileRows, HubModel, LocalModel
from sdft_ray.stages.rows import split_rows

_MOST_ROWS = 1000  # enough to learn something in an hour or two on a CPU
_RESPONSES = (
    *("response", "output", "completion", "solution", "generated_solution", "reference", "target"),
    *("answer", "assistant", "chosen", "a"),
)
_SYSTEM = ("system", "system_prompt")
_GUESSES = {
    "prompt": ("instruction", "question", "prompt", "problem", "query", "input", "user", "q"),
    "response": _RESPONSES,
    "context": ("context", "passage", "document", "input"),
    "answer": ("expected_answer", "final_answer", "answer"),
}
"""Names of columns, the clearest first, by the field that they are guessed for."""
_FILL_IN = "FILL_IN"


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns that the command line names; None where they are to be guessed."""

    prompt: str | None = None
    response: str | None = None
    context: str | None = None
    answer: str | None = None


@dataclasses.dataclass(frozen=True)
class _Model:
    """The facts of a model that a starter recipe needs, as far as they are known."""

    name: str
    revision: str | None = None
    """The commit of a hub model; None where the hub did not answer."""
    is_hub: bool = False
    blocks: int | None = None
    context: int | None = None


def write(model: str, rows: str, out: Path, columns: Columns) -> str:
    """Write a starter recipe to `out` and return the chosen columns, in one line.

    Raises UserError where the file exists already, or where model or rows cannot be read or columns not guessed.
    """
    if out.exists():
        raise UserError(problem(str(out), "exists already", "Give another --out"))
    if not out.absolute().parent.is_dir():
        raise UserError(problem("--out", f"{out.parent} is no directory", f"Make {out.parent}"))
    if not model:
        raise UserError(problem("--model", "is empty", "Give a model directory, a .gguf file or a hub name"))
    fields, known = choose_columns(rows, columns)
    facts = _describe(model)
    values = _describe_rows(rows, fields, facts) | _describe_depth(facts)
    chosen = ", ".join(f"{key} {column}" for key, column in fields.items())
    text = _render(
        out=_scalar(str(out)),
        repo=facts.is_hub,
        model=_scalar(facts.name),
        revision=facts.revision or _FILL_IN,
        revision_note=_describe_revision(facts),
        rows=_scalar(rows),
        fields={key: _scalar(column) for key, column in fields.items()},
        columns_note=_describe_columns(columns, fields, known),
        **values,
    )
    with out.open("x", encoding="utf-8") as file:
        file.write(text)
    is_open = facts.is_hub and not facts.revision
    do = f"Fill in model.revision: {_how_to_pin(facts)}" if is_open else f"Check it: sdft check {out}"
    return f"Wrote {out} with the columns {chosen}. {do}"


# --- columns --------------------------------------------------------------------------------------------------


def choose_columns(rows: str, columns: Columns) -> tuple[dict[str, str], list[str]]:
    """Return the column of each field, and all columns; raises UserError where a needed one cannot be guessed."""
    path = expand(rows, "--rows")
    all_records = (record.values for file in find_files(rows, "--rows") for record in read_records(file))
    records = list(itertools.islice(all_records, _MOST_ROWS))
    if not records:
        raise UserError(problem("--rows", f"{path} has no rows", f"Give {ROW_FILE} with rows"))
    known = list(dict.fromkeys(name for record in records for name in record))
    if columns == Columns() and find_conversations(records[0]):
        return _choose_turns(records, known, path), known
    given = {key: name for key, name in dataclasses.asdict(columns).items() if name is not None}
    _require_columns(given, known, path)
    chosen: dict[str, str] = {}
    for key, names in _GUESSES.items():
        taken = {*chosen.values(), *given.values()}
        free = [name for name in _texts(records, known, or_numbers=key == "answer") if name not in taken]
        if (column := given.get(key) or _guess(names, free)) is not None:
            chosen[key] = column
    if missing := [key for key in ("prompt", "response") if key not in chosen]:
        what = f"no column of {path} is known to be the {' or the '.join(missing)} (columns: {', '.join(known)})"
        raise UserError(problem("--rows", what, f"Give {' and '.join(f'--{key} COL' for key in missing)}"))
    return chosen, known


def _choose_turns(records: Sequence[Mapping[str, Any]], known: Sequence[str], path: Path) -> dict[str, str]:
    """Return the columns of conversations; raises UserError for ones that end before the response, which is not found.

    Of several, one that holds the response comes first, and last the worse of two responses, as for DPO.
    """
    found = find_conversations(records[0])
    answered = [name for name, form in found.items() if any(is_answered(each.get(name), form) for each in records)]
    asked = [name for name in found if name not in answered and not _guess(_RESPONSES, [name])]
    turns = min(found, key=lambda name: (name not in answered, name not in asked, name.lower() == "rejected"))
    chosen = {"messages": turns}
    if not answered:
        others = [name for name in found if name != turns] or _texts(records, known, or_numbers=False)
        if (response := _guess(_RESPONSES, others)) is None:
            what = f"the conversations of {turns} in {path} end before a response (columns: {', '.join(known)})"
            raise UserError(problem("--rows", what, "Put the response behind them, as a turn of the assistant"))
        chosen |= {"response": response}
    if (system := _guess(_SYSTEM, _texts(records, known, or_numbers=False))) and not any(
        "system" in roles_in(record.get(turns), found[turns]) for record in records
    ):
        chosen |= {"context": system}
    tools = {"tools": "tools"} if "tools" in known else {}
    return chosen | tools | ({"format": str(found[turns])} if found[turns] != "messages" else {})


def _require_columns(given: Mapping[str, str], known: Sequence[str], path: Path) -> None:
    """Raise UserError for columns that the rows do not have, and for one that is named for two fields."""
    wrong = {key: name for key, name in given.items() if name not in known}
    if wrong:
        lines = [problem(f"--{key}", f"{path} has no {name}", nearest(name, known)) for key, name in wrong.items()]
        raise UserError(*lines)
    for other in ("prompt", "context"):
        if other in given and given[other] == given.get("response"):
            what = f"{given[other]} is the column of the {other}, too"
            raise UserError(problem("--response", what, "Give another column"))


def _texts(records: Sequence[Mapping[str, Any]], known: Sequence[str], or_numbers: bool) -> list[str]:
    """Return the columns whose values are all text (or, if wanted, numbers) or missing."""
    kinds = {str} | ({int, float, Decimal} if or_numbers else set())
    columns = {name: [record.get(name) for record in records] for name in known}
    return [name for name in known if {type(value) for value in columns[name] if not is_missing(value)} <= kinds]


def _guess(names: Sequence[str], columns: Sequence[str]) -> str | None:
    """Return the first column of one of these names, in upper or lower case."""
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in names if name in lower), None)


def _describe_columns(given: Columns, fields: Mapping[str, str], known: Sequence[str]) -> str:
    guessed = [key for key in fields if getattr(given, key, None) is None]
    if not guessed:
        return "Columns as they were given."
    names = ", ".join(_scalar(name) for name in known)
    return f"Columns of {', '.join(guessed)} guessed from: {names}. Check them."


# --- rows -----------------------------------------------------------------------------------------------------


def _describe_rows(rows: str, fields: Mapping[str, str], facts: _Model) -> dict[str, Any]:
    """Return the values of a recipe that follow from the rows: sizes, lengths, and how answers are checked."""
    source = FileRows(path=rows, fields=Fields.model_validate(fields), limit=_MOST_ROWS + 1)
    raw = read_rows(source)
    more, raw = len(raw) > _MOST_ROWS, raw[:_MOST_ROWS]
    answer, note = guess_checker(raw)
    usable = split_rows(raw, "none" if answer == "math" else answer, 0, 0, 0)[0].train
    held_out = 0 if answer == "none" else min(100, len(usable) // 10)
    return {
        "read": len(raw),
        "usable": len(usable),
        "limit": _MOST_ROWS if more else None,
        "held_out": held_out,
        "validation": min(32, len(usable) // 10),
        "answer": answer,
        "answer_note": note,
        **_fit_lengths(usable, facts),
    }


def guess_checker(rows: Sequence[Row]) -> tuple[str, str]:
    """Return how the answers of rows are checked, and why.

    Only what is plainly an answer counts: one in a column of its own, one that is marked (`####`, \\boxed{}), or a
    response without words. The last number of an essay is no answer.
    """
    some = rows[:200]
    plain = [row for row in some if row.answer is not None or _is_plain(row.reference)]
    for checker, count in (("number", 200), ("choice", 200), ("math", 20)):  # expressions are slow to read
        tried = plain[:count]
        known = sum(read_answer(checker, row.reference, row.answer) is not None for row in tried)
        if len(plain) >= 0.9 * len(some) and known >= 0.9 * len(tried):
            kind = {"number": "numbers", "choice": "letters", "math": "expressions"}[checker]
            return checker, f"Guessed: {known} of the first {len(tried)} answers are {kind}."
    return "none", "Guessed: the responses end in no marked number, letter or expression."


def _is_plain(text: str) -> bool:
    part, marked = final_part(text)
    return marked or not has_words(part)


def _fit_lengths(rows: Sequence[Row], facts: _Model) -> dict[str, int]:
    """Return numbers of tokens that hold 99 % of the rows, as far as the model's context goes."""
    source = HubModel(repo=facts.name, revision="0" * 40) if facts.is_hub else LocalModel(path=facts.name)
    context, count = facts.context or 1 << 20, limits.token_counter(source)
    whole = _longest(["\n".join(row.texts) for row in rows], count)
    response = _longest([row.reference for row in rows], count)
    return {
        "max_tokens": min(context, max(512, _power_of_two(whole + 64))),  # the chat template adds some
        "new_tokens": max(1, min(context // 4, max(128, _power_of_two(response)))),
        "calibration_tokens": min(context, 256),
    }


def _longest(texts: Sequence[str], count: limits.Counter) -> int:
    """Return the length in tokens that 99 % of the texts do not exceed, counted in bytes where it is short in these."""
    at = max(0, len(texts) - 1 - len(texts) // 100)
    by_bytes = sorted(len(text.encode()) for text in texts)[at]
    return by_bytes if by_bytes <= 128 else sorted(count(text) for text in texts)[at]


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


# --- model ----------------------------------------------------------------------------------------------------


def _describe(model: str) -> _Model:
    """Return the known facts of a model: from the headers of a path, or from the hub if it answers."""
    if expand(model, "--model").exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        facts = describe_model(LocalModel(path=model), "--model")
        assert facts is not None, "a path has headers"
        return _Model(model, blocks=facts.blocks, context=facts.context)
    return _look_up(model)


def _look_up(repo: str) -> _Model:
    """Return the hub's facts of a model; only its name where the hub does not answer."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    revision = None
    try:
        revision = HfApi().model_info(repo, timeout=10).sha
        config = read_json(Path(hf_hub_download(repo, "config.json", revision=revision)))
    except RepositoryNotFoundError as error:
        if not isinstance(error, GatedRepoError):
            raise UserError(problem("--model", f"{repo} {read_refusal(error)[0]}", read_refusal(error)[1])) from None
        config = {}
    except Exception:  # noqa: BLE001 - an unreachable hub can fail in any way, and a comment reports it
        config = {}
    return _Model(repo, revision, True, config.get("num_hidden_layers"), config.get("max_position_embeddings"))


def _describe_depth(facts: _Model) -> dict[str, Any]:
    if facts.blocks is None:
        note = "About a quarter of the model's blocks is a start. How many it has was not known: check this number."
        return {"blocks": 4, "blocks_note": note}
    note = f"Number of blocks to remove: about a quarter of the model's {facts.blocks}."
    return {"blocks": max(1, facts.blocks // 4), "blocks_note": note}


def _describe_revision(facts: _Model) -> str:
    if facts.revision:
        return "The newest when this file was written."
    return f"The hub did not answer. Take the hash from: {_how_to_pin(facts)}"


def _how_to_pin(facts: _Model) -> str:
    return f"git ls-remote https://huggingface.co/{facts.name} HEAD"


# --- text -----------------------------------------------------------------------------------------------------


def _render(**values: Any) -> str:
    rules = jinja2.Environment(
        loader=jinja2.PackageLoader("sdft_ray", "preflight"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return rules.get_template("recipe.yaml.jinja").render(values)


def _scalar(text: str) -> str:
    """Return a text as YAML on one line, in quotes unless it is plainly a word or a path."""
    is_plain = re.fullmatch(r"(\.{0,2}/)?[A-Za-z_][\w./-]*", text) and yaml.safe_load(text) == text
    return text if is_plain else json.dumps(text, ensure_ascii=not text.isprintable())
