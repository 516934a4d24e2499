"""The base of every section of a recipe, compute or sweep file: frozen, and without unknown keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
)

from sdft_ray.store.objects import read_address


class Section(BaseModel):
    """A frozen part of a recipe or compute file; unknown keys are refused, a field's docstring is its help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )


def _require_path(value: str) -> str:
    if address := read_address(value):
        do = f"Write {address[1]}" if address[0] == "file" else "Copy it to a directory and give that path"
        raise ValueError(f"{value} is an address, and a path is needed. {do}")
    return value


LocalPath = Annotated[str, AfterValidator(_require_path)]
