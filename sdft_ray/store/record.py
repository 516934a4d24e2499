"""The base of what is written as JSON and read again, maybe by another version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, JsonValue, SerializerFunctionWrapHandler, model_serializer

from sdft_ray.store.files import write_atomically


class Record(BaseModel):
    """A frozen piece of an artifact or a report; what another version of it holds beside is not read."""

    model_config = ConfigDict(frozen=True, defer_build=True, ser_json_inf_nan="constants")

    def plain(self) -> dict[str, JsonValue]:
        """Return it as JSON has it: what it was made with, and no defaults."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def to_file(self, path: Path, indent: int | None = None) -> None:
        """Write it as a JSON file, which appears whole."""
        write_atomically(path, json.dumps(self.plain(), indent=indent) + ("\n" if indent else ""))

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Return what a JSON file holds."""
        return cls.model_validate_json(path.read_bytes())


class Flat(Record):
    """A record whose JSON has the fields of some inner records among its own."""

    flat: ClassVar[tuple[str, ...]]

    @model_serializer(mode="wrap")
    def _spread(self, serialize: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        plain: dict[str, JsonValue] = {}
        for name, value in serialize(self).items():
            plain |= (value or {}) if name in self.flat else {name: value}
        return plain
