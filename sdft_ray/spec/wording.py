"""Validation errors as lines that a person can act on: dotted path, mistake, remedy."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.spec.section import Section

S = TypeVar("S", bound=Section)


def validate(kind: type[S], data: Mapping[str, Any]) -> S:
    """Return plain data as a `kind`, or raise UserError naming each wrong field by its dotted path."""
    try:
        # Strict JSON mode: "8" is not a number and true is not 1, yet lists may become tuples.
        return kind.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise UserError(*_describe_all(kind, data, error.errors(include_url=False))) from None


def _describe_all(kind: type[BaseModel], data: Mapping[str, Any], items: Sequence[Any]) -> Iterator[str]:
    """Yield one line a wrong field; pydantic's errors for each type that a field may have become one line."""
    alternatives: dict[tuple[Any, ...], list[Any]] = {}
    parents_of_wrong = {item["loc"][:end] for item in items for end in range(len(item["loc"]))}
    for item in items:
        if item["type"] == "too_short" and item["loc"] in parents_of_wrong:
            continue  # only what is wrong in it was not counted
        *parents, last = item["loc"] or ("",)
        # Where a field may be of several types, the location ends with the name of the type that was tried.
        tried = isinstance(last, str) and item["type"] not in ("extra_forbidden", "missing", "value_error")
        if tried and parents and last not in _keys_at(kind, parents):
            alternatives.setdefault(tuple(parents), []).append(item)
        else:
            yield _describe(kind, data, item)
    for location, tries in alternatives.items():
        expected = " or ".join(dict.fromkeys(item["msg"].removeprefix("Input should be ") for item in tries))
        yield _describe(kind, data, {**tries[0], "loc": location, "type": "union", "msg": expected})


def _describe(kind: type[BaseModel], data: Mapping[str, Any], item: Any) -> str:
    """Return one pydantic error as `where: what (got; expected). Do this.`"""
    path, _ = _walk(kind, item["loc"], data)
    where = ".".join(path) or "recipe"
    match item["type"]:
        case "extra_forbidden" if path[-1].isdecimal():
            return problem(where, f"{path[-1]} is a place in a list, and this is none", f"Leave out {path[-1]}")
        case "extra_forbidden":
            return problem(where, "unknown key", nearest(path[-1], _keys_at(kind, item["loc"][:-1])))
        case "missing":
            return problem(where, "is missing", "Add it")
        case "value_error":
            message = str(item["ctx"]["error"])
            inner, colon, rest = message.partition(": ")
            if colon and re.fullmatch(r"[a-z_.]+", inner):  # a check of a whole section names the field
                where, message = ".".join([*path, inner]), rest
            what, _, do = message.partition(". ")
            return problem(where, what, do or "Change this value")
        case "which_source":
            return problem(where, item["msg"], "Give exactly one of them")
        case _:
            got = json.dumps(item["input"])
            expected = item["msg"].removeprefix("Input should be ")
            return problem(where, f"got {got}; expected {expected}", "Change this value")


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
