"""YAML files and `--set` overrides, to typed sections.

In: a path. Out: a validated section, or a UserError with every problem at once.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from sdft_ray.errors import UserError, problem
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.wording import S, validate


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a number (`1e-4` is one), no silently repeated keys, and no aliases: a few of them can stand
    for more than a machine holds, or for themselves."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not taken: write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} occurs twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_recipe(path: Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in `path`, or of such content, with `--set` overrides (`train.lr=2e-4`) applied.

    Raises UserError with all problems of the file at once.
    """
    return load_section(Recipe, path, overrides)


def load_section(kind: type[S], path: Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> S:
    """Return the YAML file at `path`, or such content, as a `kind`; relative paths in it are left as they are (to the
    caller's cwd)."""
    data = read_yaml(path) if isinstance(path, Path) else copy.deepcopy(dict(path))
    for override in overrides:
        _apply(override, data)
    return validate(kind, data)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file, unchecked."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(problem(str(path), f"cannot be read ({error.strerror})", "Check the path")) from None
    except UnicodeDecodeError:
        raise UserError(problem(str(path), "is not UTF-8 text", "Give a YAML file")) from None
    data = _parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise UserError(problem(str(path), "is not a mapping of keys to values", "See configs/ for examples"))
    return data


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) for every leaf of nested mappings, models, and lists of mappings.

    >>> list(leaves({"train": {"lr": 1e-4, "lora": {"rank": 8}}}))
    [('train.lr', 0.0001), ('train.lora.rank', 8)]
    """
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, list | tuple) and value and all(isinstance(inner, Mapping) for inner in value):
        value = {str(i): inner for i, inner in enumerate(value)}
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{where}:{mark.line + 1}" if mark else where
        what = getattr(error, "problem", None) or "is not YAML"
        raise UserError(problem(line, f"not valid YAML ({what})", "Fix this line")) from None
    except (ValueError, RecursionError) as error:  # a date that is none, a thousand brackets
        raise UserError(problem(where, f"not valid YAML ({error})", "Fix this file")) from None


def _apply(override: str, data: dict[str, Any]) -> None:
    """Set one `dotted.key=value` in plain data; the value is YAML, and a number in the key a place in a list."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(problem(f"--set {override}", "is not KEY=VALUE", "Write for example --set train.lr=2e-4"))
    *parents, last = key.split(".")
    at: Any = data
    for parent in parents:
        place = _place(at, parent, key)
        if isinstance(at, dict) and at.get(place) is None:
            at[place] = {}
        at = at[place]
        if not isinstance(at, dict | list):
            raise UserError(problem(f"--set {key}", f"{parent} has no keys below it", "Check the dotted path"))
    at[_place(at, last, key)] = _parse_yaml(text, f"--set {key}")


def _place(at: dict[str, Any] | list[Any], part: str, key: str) -> Any:
    """Return one part of a dotted key as the key of a mapping or the place in a list."""
    if isinstance(at, dict):
        return part
    if not (part.isdecimal() and int(part) < len(at)):
        what = f"{part} is no place in a list of {len(at)}"
        raise UserError(problem(f"--set {key}", what, f"Give a number from 0 to {len(at) - 1}"))
    return int(part)
