"""JSON Schema of recipe, compute and sweep files: what an editor completes and checks, and what the reference says.

In: the typed sections. Out: draft 2020-12 as plain data. It accepts whatever the loader accepts; checks that compare
several fields are the loader's alone, because JSON Schema has no words for them.
"""

from __future__ import annotations

import json
from typing import Any, Literal, cast

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import CoreSchema

from sdft_ray.spec.compute import Compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.section import Section
from sdft_ray.spec.sweep import Sweep

Kind = Literal["recipe", "compute", "sweep"]
KINDS: dict[Kind, type[Section]] = {"recipe": Recipe, "compute": Compute, "sweep": Sweep}
"""The files that people write, by what they are called."""


class _Plain(GenerateJsonSchema):
    """pydantic's schema without titles that repeat the keys, and with defaults as short as people write them."""

    def generate(self, schema: CoreSchema, mode: JsonSchemaMode = "validation") -> JsonSchemaValue:
        return {"$schema": self.schema_dialect, **super().generate(schema, mode)}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def encode_default(self, dft: Any) -> Any:
        if isinstance(dft, tuple):
            return [self.encode_default(value) for value in dft]
        if isinstance(dft, BaseModel):
            return dft.model_dump(mode="json", exclude_defaults=True)
        return super().encode_default(dft)


def schema_of(kind: Kind) -> dict[str, Any]:
    """Return the JSON Schema of one kind of file."""
    return cast(dict[str, Any], _unwrap(KINDS[kind].model_json_schema(schema_generator=_Plain)))


def render(kind: Kind) -> str:
    """Return the JSON Schema of one kind of file as text."""
    return json.dumps(schema_of(kind), indent=1, ensure_ascii=False) + "\n"


def _unwrap(value: Any) -> Any:
    """Return a schema whose descriptions are one line each: how docstrings are wrapped is no matter of an editor's."""
    if isinstance(value, list):
        return [_unwrap(inner) for inner in value]
    if isinstance(value, dict):
        return {
            key: " ".join(inner.split()) if key == "description" and isinstance(inner, str) else _unwrap(inner)
            for key, inner in value.items()
        }
    return value
