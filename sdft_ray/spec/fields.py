"""The fields of recipe, compute and sweep files: path, type, default and help of each.

In: the JSON Schemas. Out: one tree of `Entry` for each kind of file, which the reference page and `sdft explain` show.
They are read from the schemas and not from pydantic, so that editor, page and command agree.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from sdft_ray.spec.schema import KINDS, Kind, schema_of
from sdft_ray.spec.sources import TableRows

NAME = "NAME"
"""Placeholder in a path for a key that the author of a file chooses."""
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_BOUNDS = {
    "exclusiveMinimum": "above {}",
    "minimum": "{} or more",
    "exclusiveMaximum": "below {}",
    "maximum": "up to {}",
}
_PLURALS = {
    "whole number": "whole numbers",
    "number": "numbers",
    "text": "texts",
    "section": "sections",
    "any value": "values",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One field; a section has fields of its own."""

    kind: Kind
    """The kind of file that it belongs to."""
    path: str
    """Dotted, as in messages: fields of a compute file begin with `compute.`."""
    type: str
    default: str | None
    """As YAML; None where the field is required."""
    help: str
    only_with: tuple[str, ...] = ()
    """Keys of the alternative sections that have this field; empty where all have it."""
    sections: tuple[str, ...] = ()
    """Names of the sections that are allowed here; entries with the same names have the same fields."""
    about: tuple[str, ...] = ()
    """The help of each section."""
    fields: tuple[Entry, ...] = ()

    @property
    def name(self) -> str:
        """The path, or the kind of file for the whole file."""
        return self.path or self.kind


@functools.cache
def tree(kind: Kind) -> Entry:
    """Return a kind of file as the entry that holds all others."""
    schema = schema_of(kind)
    path = "compute" if kind == "compute" else ""
    sections = {KINDS[kind].__name__: schema}
    fields = tuple(_fields(kind, path, sections, schema["$defs"]))
    return Entry(kind, path, "file", None, schema["description"], sections=tuple(sections), fields=fields)


def entries(top: Entry) -> Iterator[Entry]:
    """Yield an entry and all entries below it, in the order of the file."""
    yield top
    for field in top.fields:
        yield from entries(field)


def _fields(
    kind: Kind, parent: str, sections: Mapping[str, dict[str, Any]], definitions: Mapping[str, Any]
) -> Iterator[Entry]:
    """Yield the fields of a section, or of all alternative sections, each once."""
    keys = {_key(section): section["properties"] for section in sections.values()}
    for name in dict.fromkeys(name for properties in keys.values() for name in properties):
        only_with = tuple(key for key, properties in keys.items() if name in properties)
        first = keys[only_with[0]][name]
        required = all(
            name in section.get("required", ()) for section in sections.values() if _key(section) in only_with
        )
        path = f"{parent}.{name}" if parent else name
        inner = dict(_sections(first, definitions))
        yield Entry(
            kind,
            path,
            _words(first, definitions),
            None if required else _yaml(first.get("default")),
            first.get("description") or " ".join(section["description"] for section in inner.values()),
            only_with if len(only_with) < len(keys) else (),
            tuple(inner),
            _about(inner),
            tuple(_fields(kind, f"{path}.{NAME}" if _is_named(first) else path, inner, definitions)),
        )


def _about(sections: Mapping[str, dict[str, Any]]) -> tuple[str, ...]:
    texts = [section["description"] for section in sections.values()]
    if len(texts) < 2:
        return tuple(texts)
    return tuple(f"`{_key(section)}`: {text}" for section, text in zip(sections.values(), texts, strict=True))


def _key(section: Mapping[str, Any]) -> str:
    """Return the key that distinguishes a section from its alternatives: the first that it requires.

    What several sections inherit (`fields`) comes before what each has of its own.
    """
    required = [name for name in section.get("required", ()) if name not in TableRows.model_fields]
    return str(next(iter(required), ""))


def _sections(value: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the sections that a place of the schema allows: one section, or those of a list or a mapping."""
    name = value.get("$ref", "").rpartition("/")[2]
    if "properties" in definitions.get(name, ()):
        yield name, definitions[name]
    for inner in (*_options(value), value.get("items"), value.get("additionalProperties")):
        if isinstance(inner, Mapping):
            yield from _sections(inner, definitions)


def _options(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    return value.get("anyOf") or value.get("oneOf") or []


def _is_named(value: Mapping[str, Any]) -> bool:
    """Return whether the keys at a place of the schema are the author's own."""
    return isinstance(value.get("additionalProperties"), Mapping) or any(map(_is_named, _options(value)))


def _words(value: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Return in plain words the values that a place of the schema allows."""
    if "$ref" in value:
        return "section" if dict(_sections(value, definitions)) else "any value"
    if options := _options(value):
        return _either(options, definitions)
    if "const" in value or "enum" in value:
        return _join(f"`{word}`" for word in value.get("enum", [value.get("const")]))
    if value["type"] == "array":
        return f"list of {_several(_words(value['items'], definitions))}"
    if value["type"] == "object":
        return f"mapping of names to {_several(_words(value['additionalProperties'], definitions))}"
    bounds = ", ".join(text.format(value[bound]) for bound, text in _BOUNDS.items() if bound in value)
    return f"{_TYPES[value['type']]} {bounds}".strip()


def _either(options: list[dict[str, Any]], definitions: Mapping[str, Any]) -> str:
    """Return the alternatives of a union; sections are named by their keys."""
    sections = [section for option in options if "$ref" in option for _, section in _sections(option, definitions)]
    words = [_words(option, definitions) for option in options]
    if len(sections) > 1:
        keys = _join(f"`{_key(section)}`" for section in sections)
        words = [word for word in words if word != "section"] + [f"section with {keys}"]
    if "number" in words:
        words = [word for word in words if word != "whole number"]
    words = ["list of such" if word == f"list of {_several(words[0])}" else word for word in words]
    text = " or ".join(dict.fromkeys(word for word in words if word != "null"))
    return f"{text}, or null" if "null" in words else text


def _join(words: Iterable[str]) -> str:
    """Return words as `a, b or c`."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def _several(words: str) -> str:
    for one, many in _PLURALS.items():
        if words.startswith(one):
            return many + words.removeprefix(one)
    return f"({words})" if " or " in words else words


def _yaml(value: Any) -> str:
    """Return a default as people write it in a file."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("...\n").strip()
