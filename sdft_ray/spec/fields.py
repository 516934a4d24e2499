"""The fields of recipe, compute and sweep files: path, type, default and help of each.

In: the JSON Schemas. Out: one tree of `Entry` for each kind of file, which the reference page and `sdft explain` show.
They are read from the schemas and not from pydantic, so that editor, page and command agree.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, Field

from sdft_ray.spec.schema import KINDS, Kind, schema_of
from sdft_ray.spec.sources import TableRows

NAME = "NAME"
"""Placeholder in a path for a key that the author of a file chooses."""
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_BOUNDS = {"above": "above {}", "least": "{} or more", "below": "below {}", "most": "up to {}"}
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


class _Place(BaseModel):
    """What a schema says of a place in a file."""

    ref: str = Field("", alias="$ref")
    definitions: dict[str, _Place] = Field({}, alias="$defs")
    """The sections, of a whole file."""
    type: str = ""
    description: str = ""
    default: Any = None
    properties: dict[str, _Place] = {}
    required: list[str] = []
    items: _Place | None = None
    named: bool | _Place = Field(False, alias="additionalProperties")
    """What stands below keys that are the author's own."""
    any_of: list[_Place] = Field([], alias="anyOf")
    one_of: list[_Place] = Field([], alias="oneOf")
    const: Any = None
    enum: list[Any] = []
    above: float | int | None = Field(None, alias="exclusiveMinimum")
    least: float | int | None = Field(None, alias="minimum")
    below: float | int | None = Field(None, alias="exclusiveMaximum")
    most: float | int | None = Field(None, alias="maximum")

    @property
    def options(self) -> list[_Place]:
        return self.any_of or self.one_of

    @property
    def is_named(self) -> bool:
        """Whether the keys at this place are the author's own."""
        return isinstance(self.named, _Place) or any(option.is_named for option in self.options)

    @property
    def key(self) -> str:
        """The key that distinguishes a section from its alternatives: the first that it requires.

        What several sections inherit (`fields`) comes before what each has of its own.
        """
        return next((name for name in self.required if name not in TableRows.model_fields), "")


Sections = Mapping[str, _Place]


@functools.cache
def tree(kind: Kind) -> Entry:
    """Return a kind of file as the entry that holds all others."""
    schema = _Place.model_validate(schema_of(kind))
    path = "compute" if kind == "compute" else ""
    sections = {KINDS[kind].__name__: schema}
    fields = tuple(_fields(kind, path, sections, schema.definitions))
    return Entry(kind, path, "file", None, schema.description, sections=tuple(sections), fields=fields)


def entries(top: Entry) -> Iterator[Entry]:
    """Yield an entry and all entries below it, in the order of the file."""
    yield top
    for field in top.fields:
        yield from entries(field)


def _fields(kind: Kind, parent: str, sections: Sections, definitions: Sections) -> Iterator[Entry]:
    """Yield the fields of a section, or of all alternative sections, each once."""
    keys = {section.key: section.properties for section in sections.values()}
    for name in dict.fromkeys(name for properties in keys.values() for name in properties):
        only_with = tuple(key for key, properties in keys.items() if name in properties)
        first = keys[only_with[0]][name]
        required = all(name in section.required for section in sections.values() if section.key in only_with)
        path = f"{parent}.{name}" if parent else name
        inner = dict(_sections(first, definitions))
        yield Entry(
            kind,
            path,
            _words(first, definitions),
            None if required else _yaml(first.default),
            first.description or " ".join(section.description for section in inner.values()),
            only_with if len(only_with) < len(keys) else (),
            tuple(inner),
            _about(inner),
            tuple(_fields(kind, f"{path}.{NAME}" if first.is_named else path, inner, definitions)),
        )


def _about(sections: Sections) -> tuple[str, ...]:
    if len(sections) < 2:
        return tuple(section.description for section in sections.values())
    return tuple(f"`{section.key}`: {section.description}" for section in sections.values())


def _sections(place: _Place, definitions: Sections) -> Iterator[tuple[str, _Place]]:
    """Yield the sections that a place allows: one section, or those of a list or a mapping."""
    name = place.ref.rpartition("/")[2]
    if name in definitions and definitions[name].properties:
        yield name, definitions[name]
    for inner in (*place.options, place.items, place.named):
        if isinstance(inner, _Place):
            yield from _sections(inner, definitions)


def _words(place: _Place, definitions: Sections) -> str:
    """Return in plain words the values that a place allows."""
    if place.ref:
        return "section" if dict(_sections(place, definitions)) else "any value"
    if place.options:
        return _either(place.options, definitions)
    if words := place.enum or ([place.const] if "const" in place.model_fields_set else []):
        return _join(f"`{word}`" for word in words)
    if place.items:
        return f"list of {_several(_words(place.items, definitions))}"
    if isinstance(place.named, _Place):
        return f"mapping of names to {_several(_words(place.named, definitions))}"
    bounds = {text: bound for name, text in _BOUNDS.items() if (bound := getattr(place, name)) is not None}
    return f"{_TYPES[place.type]} {', '.join(text.format(bound) for text, bound in bounds.items())}".strip()


def _either(options: Sequence[_Place], definitions: Sections) -> str:
    """Return the alternatives of a union; sections are named by their keys."""
    sections = [section for option in options if option.ref for _, section in _sections(option, definitions)]
    words = [_words(option, definitions) for option in options]
    if len(sections) > 1:
        keys = _join(f"`{section.key}`" for section in sections)
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
