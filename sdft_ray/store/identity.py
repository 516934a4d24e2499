"""The identity of an artifact: a stage, and an id that moves exactly when a number could move.

In: a stage's name, version, settings and inputs. Out: 12 hex digits over canonical JSON.
The hashed payload stays in the manifest, so that `sdft diff` can explain why two ids differ.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

S = TypeVar("S", bound="Hashed | Mapping[str, Any]", covariant=True)


@dataclasses.dataclass(frozen=True)
class Stage(Generic[S]):
    """One unit of the chain: its settings, and the stages whose artifacts are its inputs."""

    name: str
    slug: str
    """Its name for people; never parsed."""
    version: int
    settings: S
    """Its settings: a section (`spec/section.py`), which marks its hashed fields, or plain JSON."""
    inputs: Mapping[str, Stage[Any]] = dataclasses.field(default_factory=dict)
    location: Path | None = None
    """Set where the result exists outside the root, such as a user's own model directory: never built."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The hashed payload: plain JSON."""
        return {
            "stage": self.name,
            "version": self.version,
            "settings": _plain(self.settings),
            "inputs": {name: stage.id for name, stage in sorted(self.inputs.items())},
        }

    @cached_property
    def id(self) -> str:
        """The first 12 hex digits of sha256 over the canonical JSON of the identity."""
        return short_id(self.identity)

    def keys(self, name: str) -> list[str]:
        """Return the keys of all inputs of one kind: name, name_1, name_2 …"""
        keys = itertools.chain([name], (numbered(name, i) for i in itertools.count(1)))
        return list(itertools.takewhile(lambda key: key in self.inputs, keys))

    @property
    def model(self) -> Stage[Any]:
        """The model that it works on."""
        return self.inputs["model"]

    @property
    def rows(self) -> Stage[Any]:
        """The rows that it reads: those of one source, or a mixture."""
        return self.inputs["rows"]

    @property
    def lineage(self) -> dict[str, Any]:
        """The identity with each input's own lineage in place of its id, to explain drift."""
        return {**self.identity, "inputs": {name: stage.lineage for name, stage in sorted(self.inputs.items())}}

    @property
    def directory_name(self) -> str:
        return f"{self.slug}-{self.id}"


def ancestors(stages: Sequence[Stage[Any]]) -> list[Stage[Any]]:
    """Return all that stages are made from, each once."""
    found: dict[str, Stage[Any]] = {}
    left = [*stages]
    while left:
        new = {stage.id: stage for stage in left.pop().inputs.values() if stage.id not in found}
        found |= new
        left += new.values()
    return list(found.values())


class Hashed(Protocol):
    """Settings that know which part of them bears identity."""

    def hashed(self) -> dict[str, Any]:
        """Return the hashed part as plain JSON."""
        ...


def _plain(settings: Hashed | Mapping[str, Any]) -> dict[str, Any]:
    return dict(settings) if isinstance(settings, Mapping) else settings.hashed()


def numbered(name: str, i: int) -> str:
    """Return the key of the input `i`, from 0, of several of one kind."""
    return f"{name}_{i}" if i else name


def canonical_json(value: Any) -> str:
    """Return one spelling for equal plain JSON; raises TypeError on anything that is not plain JSON.

    >>> canonical_json({"b": 1, "a": [True, None]})
    '{"a":[true,null],"b":1}'
    """
    _require_plain(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def short_id(payload: Any) -> str:
    """Return the first 12 hex digits of sha256 over canonical JSON."""
    return hashlib.sha256(canonical_json(payload).encode()).hexdigest()[:12]


def slugify(text: str) -> str:
    """Return `text` as a short directory-safe name.

    >>> slugify("HuggingFaceTB/SmolLM2-135M Instruct")
    'huggingfacetb-smollm2-135m-instruct'
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:48] or "artifact"


def distinct(names: Sequence[str]) -> list[str]:
    """Return names with a number behind those that occurred before.

    >>> distinct(["gsm8k", "dolly", "gsm8k"])
    ['gsm8k', 'dolly', 'gsm8k-2']
    """
    used: list[str] = []
    for name in names:
        numbers = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        used.append(next(each for each in numbers if each not in used))
    return used


def _require_plain(value: Any) -> None:
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"identity must be plain JSON; a key of {value!r} is not a string")
        for inner in value.values():
            _require_plain(inner)
    elif isinstance(value, list):
        for inner in value:
            _require_plain(inner)
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"identity must be plain JSON; got {type(value).__name__}: {value!r}")
