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

# YAML 1.2's words that are no texts, as editors have them: of YAML 1.1, which PyYAML reads, `010` is 8, `1:30` is 90,
# `1e-4` is a text, and a column called `on` or `no` is true or false.
_WORDS = (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", re.compile(r"[-+]?\d+|0o[0-7]+|0x[\da-fA-F]+"), list("-+0123456789")),
    (
        "float",
        re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        list("-+.0123456789"),
    ),
)


_NAMES = {"Recipe": "recipe", "Compute": "compute file", "Sweep": "sweep"}
_OWN_KEYS = {"recipe": {"model", "rows", "prune"}, "compute file": {"ray", "score", "throughput", "track"}}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's words, no silently repeated keys, no number or text that JSON cannot hold, no tags of other values
    (dates, bytes, sets), and no aliases: a few of them can stand for more than a machine holds, or for themselves."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not taken: write the value out", mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError):  # of a tag: `!!bool maybe`
            what = f"{node.value!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} occurs twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        # Python reads no number of thousands of digits.
        if len(text) > 99 or (number := int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))).bit_length() > 63:
            raise yaml.constructor.ConstructorError(None, None, "a number is too large", node.start_mark)
        return number

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        if re.search("[\ud800-\udfff]", text):
            raise yaml.constructor.ConstructorError(None, None, "a text holds half a character", node.start_mark)
        return text


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader`, too, would read as something else than text."""


_Loader.yaml_implicit_resolvers = {}
for _kind, _word, _first in _WORDS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_word.pattern})$"), _first)
_KINDS: Sequence[Any] = (*(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "float", "seq", "map")), None)
_Loader.yaml_constructors = {kind: yaml.SafeLoader.yaml_constructors[kind] for kind in _KINDS}  # None: of all others
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)


def load_recipe(path: Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in `path`, or of such content, with `--set` overrides (`train.lr=2e-4`) applied.

    Raises UserError with all problems of the file at once.
    """
    return load_section(Recipe, path, overrides)


def is_yaml(path: Path) -> bool:
    """Return whether a file is named as recipes, compute files and sweeps are."""
    return path.suffix.lower() in (".yaml", ".yml")


def names_recipe(name: str) -> bool:
    """Return whether a name is that of a recipe file, and not of an artifact."""
    path = Path(name)
    return is_yaml(path) or (not path.suffix and path.is_file())


def is_sweep(path: Path | Mapping[str, Any]) -> bool:
    """Return whether a file, or such content, is a sweep and not a recipe: it has axes, or names a recipe."""
    return kind_of(read_yaml(path) if isinstance(path, Path) else path) == "sweep"


def kind_of(data: Mapping[str, Any]) -> str | None:
    """Return what kind of file has such content, by keys that no other kind has; None where they do not decide."""
    if "axes" in data or isinstance(data.get("recipe"), str | list):
        return "sweep"
    kinds = [kind for kind, keys in _OWN_KEYS.items() if keys & data.keys()]
    return kinds[0] if len(kinds) == 1 else None


def load_section(kind: type[S], path: Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> S:
    """Return the YAML file at `path`, or such content, as a `kind`; relative paths in it are left as they are (to the
    caller's cwd)."""
    data = read_yaml(path) if isinstance(path, Path) else copy.deepcopy(dict(path))
    wanted, given = _NAMES.get(kind.__name__), kind_of(data)
    if isinstance(path, Path) and wanted and given not in (wanted, None):
        raise UserError(problem(str(path), f"is a {given}, not a {wanted}", f"Give a {wanted}"))
    keys: list[str] = []
    for override in overrides:
        keys.append(key := _apply(override, data))
        if undone := [each for each in keys if each.startswith(f"{key}.")]:
            raise UserError(problem(f"--set {undone[0]}", f"a later --set {key} undoes it", f"Give --set {key} first"))
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


def dump_yaml(data: Any) -> str:
    """Return plain data as YAML text that `read_yaml` reads as the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) for every leaf of nested mappings, models, and lists of mappings.

    >>> list(leaves({"train": {"lr": 1e-4, "lora": {"rank": 8}}}))
    [('train.lr', 0.0001), ('train.lora.rank', 8)]
    """
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, list | tuple) and value and all(isinstance(inner, Mapping) for inner in value):
        value = {str(i): inner for i, inner in enumerate(value)}
    if isinstance(value, Mapping) and (value or not prefix):
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
    except (ValueError, OverflowError, RecursionError) as error:  # a character that is none, a thousand brackets
        raise UserError(problem(where, f"not valid YAML ({error})", "Fix this file")) from None


def _apply(override: str, data: dict[str, Any]) -> str:
    """Set one `dotted.key=value` in plain data, and return the key; the value is YAML, and a number in the key a place
    in a list."""
    key, equals, text = override.partition("=")
    *parents, last = (key := key.strip()).split(".")
    if not equals or not all([*parents, last]):
        raise UserError(problem(f"--set {override}", "is not KEY=VALUE", "Write for example --set train.lr=2e-4"))
    at: Any = data
    for parent in parents:
        place = _place(at, parent, key)
        if isinstance(at, dict) and at.get(place) is None:
            at[place] = {}
        at = at[place]
        if not isinstance(at, dict | list):
            raise UserError(problem(f"--set {key}", f"{parent} has no keys below it", "Check the dotted path"))
    at[_place(at, last, key)] = _parse_yaml(text, f"--set {key}")
    return key


def _place(at: dict[str, Any] | list[Any], part: str, key: str) -> Any:
    """Return one part of a dotted key as the key of a mapping or the place in a list."""
    if isinstance(at, dict):
        return part
    if not (part.isdecimal() and int(part) < len(at)):
        what = f"{part} is no place in a list of {len(at)}"
        raise UserError(problem(f"--set {key}", what, f"Give a number from 0 to {len(at) - 1}"))
    return int(part)
