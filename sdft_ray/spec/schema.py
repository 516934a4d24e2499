"""JSON Schema of recipe, compute and sweep files, for editors and the reference page.

In: the typed sections. Out: draft 2020-12 as plain data. It accepts all that the loader accepts; only the loader
compares fields with each other, because JSON Schema cannot express that.
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
"""The section of each kind of file."""


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
    """Return a schema whose descriptions are one line each: docstrings are wrapped, an editor's texts are not."""
    if isinstance(value, list):
        return [_unwrap(inner) for inner in value]
    if isinstance(value, dict):
        return {
            key: " ".join(inner.split()) if key == "description" and isinstance(inner, str) else _unwrap(inner)
            for key, inner in value.items()
        }
    return value
