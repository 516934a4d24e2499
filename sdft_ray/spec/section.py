"""The base of every section of a recipe, compute or sweep file: frozen, and without unknown keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from sdft_ray.store.objects import read_address

WHICH_SOURCE = "has none or several of "
"""How the message begins of a section that none of several kinds fits; their keys follow."""


class Section(BaseModel):
    """A frozen part of a recipe or compute file; it refuses unknown keys, and a field's docstring is its help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )
    prefix: ClassVar[tuple[str, ...]] = ()
    """Of dotted paths in messages."""
    unhashed: ClassVar[tuple[str, ...]] = ()
    """Fields that move no number, such as paths and gates: they are not part of an id."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Fields that are not part of an id while they are None or have their default."""

    def hashed(self) -> dict[str, Any]:
        """Return the fields that are part of an id, as plain JSON."""
        plain = self.model_dump(mode="json")
        names = [name for name in type(self).model_fields if name not in self.unhashed and not self._is_absent(name)]
        return {self._key(name): _hashed(getattr(self, name), plain[name]) for name in names}

    def _key(self, name: str) -> str:
        return type(self).model_fields[name].serialization_alias or name

    def _is_absent(self, name: str) -> bool:
        value = getattr(self, name)
        return name in self.optional and (value is None or value == type(self).model_fields[name].default)


def _hashed(value: Any, plain: Any) -> Any:
    """Return the plain form of a field without the unhashed fields of its sections."""
    if isinstance(value, Section):
        return value.hashed()
    if isinstance(value, tuple):
        return [_hashed(*pair) for pair in zip(value, plain, strict=True)]
    return plain


def require_path(value: str) -> str:
    """Return a local path; raises ValueError for an address, and for nothing."""
    if not value.strip():
        raise ValueError("is empty. Give a path")
    if address := read_address(value):
        do = f"Write {address[1]}" if address[0] == "file" else "Give the path of a copy"
        raise ValueError(f"{value} is an address, and a path is needed. {do}")
    try:
        Path(value).expanduser()
    except RuntimeError:
        raise ValueError(f"{value} begins with the home of nobody here. Write the whole path") from None
    return value


Name = Annotated[str, Field(min_length=1)]
LocalPath = Annotated[Name, AfterValidator(require_path)]


def _require_place(value: str) -> str:
    address = read_address(value)
    if address is None or address[0] == "file":
        return require_path(value)
    scheme, path = address
    if "@" in path.partition("/")[0]:  # the address itself is not repeated: it holds a secret
        raise ValueError("the address holds credentials, which would end up in logs. Give them by the environment")
    if not path or value.rstrip("/") != (right := f"{scheme}://{path}"):
        raise ValueError(f"{value} is no address. Write {scheme}://{path or 'BUCKET/PATH'}")
    return right


DataPath = Annotated[Name, AfterValidator(_require_place)]
"""A path, or the address of files in an object store."""


def _require_commit(revision: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"'{revision}' moves. Pin a commit: git ls-remote https://huggingface.co/REPO")
    return revision


Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every library takes


Commit = Annotated[
    str, AfterValidator(_require_commit), WithJsonSchema({"type": "string", "pattern": "^[0-9a-f]{40}$"})
]


N = TypeVar("N", bound=str)


def require_distinct(names: tuple[N, ...]) -> tuple[N, ...]:
    """Return names; raises ValueError where one occurs twice."""
    if len(set(names)) != len(names):
        raise ValueError("has a name twice. Remove one")
    return names
