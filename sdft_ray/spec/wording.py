"""Validation errors as lines that a person can act on: dotted path, mistake, remedy."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.spec.section import WHICH_SOURCE, Section

S = TypeVar("S", bound=Section)
_PLAIN = {
    "a valid integer, got a number with a fractional part": "a whole number",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid array": "a list",
    "an object": "a section with keys",
    "at least 1 character": "text",
}
"""Words of pydantic and JSON, and those of people who write YAML."""


def validate(kind: type[S], data: Mapping[str, Any]) -> S:
    """Return plain data as a `kind`, or raise UserError naming each wrong field by its dotted path."""
    try:
        # Strict JSON mode: "8" is not a number and true is not 1, yet lists may become tuples.
        return kind.model_validate_json(json.dumps(data, default=as_plain))
    except ValidationError as error:
        raise UserError(*_describe_all(kind, data, mistakes(error))) from None


def as_plain(value: Any) -> Any:
    """Return what JSON does not have as what it has: a number of NumPy as a number, a path or a date as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


class Mistake(NamedTuple):
    """One of pydantic's errors, by its own names."""

    type: str
    loc: tuple[int | str, ...]
    msg: str
    input: Any
    ctx: Mapping[str, Any] = MappingProxyType({})

    @property
    def reason(self) -> str:
        return str(self.ctx["error"])

    @property
    def expected(self) -> str:
        """In the words of `sdft explain`."""
        expected = re.sub(r"^Input should be |^\w+ should have | after validation, not \d+$", "", self.msg)
        for words, plain in _PLAIN.items():
            expected = expected.replace(words, plain)
        return expected


def mistakes(error: ValidationError) -> list[Mistake]:
    """Return what pydantic finds wrong."""
    errors: list[Any] = error.errors(include_url=False)
    return [Mistake(**each) for each in errors]


def _describe_all(kind: type[Section], data: Mapping[str, Any], found: Iterable[Mistake]) -> Iterator[str]:
    """Yield one line a wrong field; pydantic's errors for each type that a field may have become one line.

    Of a list with a wrong item pydantic also says that it is too short, and that it is nothing else that the field may
    be; and the item's location has the name of the list's type.
    """
    plain: list[Mistake] = []
    alternatives: dict[tuple[Any, ...], list[Mistake]] = {}
    for mistake in (each._replace(loc=_without_types(each.loc)) for each in found):
        *parents, last = mistake.loc or ("",)
        # Where a field may be of several types, the location ends with the name of the type that was tried.
        tried = isinstance(last, str) and mistake.type not in ("extra_forbidden", "missing", "value_error")
        if tried and parents and last not in _keys_at(kind, parents):
            alternatives.setdefault(tuple(parents), []).append(mistake)
        else:
            plain.append(mistake)
    above = {mistake.loc[:length] for mistake in plain for length in range(len(mistake.loc))}
    for mistake in plain:
        if not (mistake.type == "too_short" and mistake.loc in above):
            yield _describe(kind, data, mistake)
    for location, tries in alternatives.items():
        if location not in above:
            expected = " or ".join(dict.fromkeys(each.expected for each in tries))
            yield _describe(kind, data, tries[0]._replace(loc=location, type="union", msg=expected))


def _without_types(location: Sequence[str | int]) -> tuple[str | int, ...]:
    return (*(part for part in location[:-1] if not str(part).startswith("tuple[")), *location[-1:])


def _describe(kind: type[Section], data: Mapping[str, Any], mistake: Mistake) -> str:
    """Return one pydantic error as `where: what (got; expected). Do this.`"""
    path, _ = _walk(kind, mistake.loc, data)
    where = ".".join([*kind.prefix, *path]) or kind.__name__.lower()
    match mistake.type:
        case "extra_forbidden" if len(path) > 1 and path[-1].isdecimal():
            return problem(where, f"{path[-1]} is a place in a list, and this is none", f"Leave out {path[-1]}")
        case "extra_forbidden":
            return problem(where, "unknown key", nearest(path[-1], _keys_at(kind, mistake.loc[:-1])))
        case "missing":
            return problem(where, "is missing", "Add it")
        case "value_error":
            message = mistake.reason
            inner, colon, rest = message.partition(": ")
            if colon and re.fullmatch(r"[a-z_.]+", inner):  # a check of a whole section names the field
                where, message = ".".join([*kind.prefix, *path, inner]), rest
            what, _, do = message.partition(". ")
            return problem(where, what, do or "Change this value")
        case "json_invalid":  # of content that is given in Python: half a character
            return problem(where, f"cannot be written as JSON ({mistake.reason})", "Write texts whole")
        case "which_source":
            return _describe_source(where, mistake)
        case _:
            got = json.dumps(mistake.input)
            return problem(where, f"got {got}; expected {mistake.expected}", "Change this value")


def _describe_source(where: str, mistake: Mistake) -> str:
    """Return the line for a value that is none of several sections, which are told apart by a key."""
    names, _, word = mistake.msg.removeprefix(WHICH_SOURCE).partition(", or ")
    keys, given = names.split(", "), mistake.input
    if not isinstance(given, Mapping):
        got = "an address" if isinstance(given, str) and "://" in given else json.dumps(given)  # it may hold a secret
        expected = " or ".join(filter(None, (word, f"a section with one of {names}")))
        return problem(where, f"got {got}; expected {expected}", "Change this value")
    advice = () if {*keys} & {*given} else (nearest(str(name), keys) for name in given)
    do = next((line for line in advice if line.endswith("?")), "Give exactly one of them")
    return problem(where, mistake.msg, do)


def _walk(
    kind: type[BaseModel], location: Sequence[str | int], data: Any = None
) -> tuple[list[str], list[type[BaseModel]]]:
    """Return the keys that a person wrote on the way to a location, and the models that may stand there.

    pydantic adds to the location the tag of the model that it took of several, and a 0 for a value that stands for a
    list of one.
    """
    path: list[str] = []
    models, tagged = [kind], False
    for part in location:
        if tagged and isinstance(part, str):
            models = [model for model in models if part in model.model_fields] or models
            tagged = False
            continue
        if isinstance(part, int) and not isinstance(data, list):
            continue
        path.append(str(part))
        try:
            data = data[part]
        except (TypeError, KeyError, IndexError):  # a key that is missing
            data = None
        for model in models:
            if part in model.model_fields:
                models = list(_models_in(model.model_fields[str(part)].annotation))
                tagged = len(models) > 1
                break
    return path, models


def _keys_at(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Return the field names that are known at a location, for the nearest spelling."""
    fields = [field for model in _walk(kind, location)[1] for field in model.model_fields.items()]
    return [field.alias or name for name, field in fields]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)
