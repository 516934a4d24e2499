"""`sdft explain KEY`: one field of a recipe, compute or sweep file, or the fields of a section.

In: a key as people write it. Out: every field of that name with type, default and help, or a UserError with the
nearest spelling. Recipes and compute files both have a `train`: both are shown, because the key does not say which.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.spec.fields import NAME, Entry, entries, tree
from sdft_ray.spec.schema import KINDS

_WIDTH = 110


def explain(key: str) -> list[Entry]:
    """Return the entries that a key names, in recipe, compute and sweep files; raises UserError where there is none."""
    wanted = [part for part in key.split(".") if not part.isdigit()]  # the place in a list
    named = [entry for entry in _all() if any(_is_at(wanted, name) for name in _names(entry))]
    if not named:
        raise UserError(problem(key, "unknown key", _suggest(wanted)))
    return named


def show(named: Sequence[Entry]) -> str:
    """Return entries as text: a section with the first sentence of each field, any other field with all its facts."""
    return "\n\n".join("\n".join(_lines(entry)) for entry in named)


def as_data(named: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return entries as plain data for `--json`."""
    shown = ("kind", "path", "type", "default", "help")
    return [
        {name: getattr(entry, name) for name in shown}
        | {"only_with": list(entry.only_with), "fields": [field.path for field in entry.fields]}
        for entry in named
    ]


def _all() -> list[Entry]:
    return [entry for kind in KINDS for entry in entries(tree(kind))]


def _names(entry: Entry) -> set[str]:
    """Return how people may name an entry: with the kind of file in front or without."""
    plain = entry.path.removeprefix(f"{entry.kind}.")
    return {entry.name, plain, f"{entry.kind}.{plain}"} - {""}


def _is_at(wanted: Sequence[str], name: str) -> bool:
    parts = name.split(".")
    return len(parts) == len(wanted) and all(part in (NAME, want) for part, want in zip(parts, wanted, strict=True))


def _suggest(wanted: Sequence[str]) -> str:
    """Return the advice for an unknown key: the nearest of all paths, or of the keys of the section that it names."""
    key, named = ".".join(wanted).lower(), [entry for entry in _all() if entry.path]
    paths = {name: entry.path for entry in named for name in sorted(_names(entry))}
    ends = sorted((name for name in paths if name.endswith(f".{key}")), key=lambda name: name.count("."))
    if close := ends or difflib.get_close_matches(key, paths, 1, 0.75):
        return f"Did you mean {paths[close[0]]}?"
    for length in range(len(wanted) - 1, 0, -1):
        above = [entry for entry in _all() if any(_is_at(wanted[:length], name) for name in _names(entry))]
        if known := [field.path.rpartition(".")[2] for entry in above for field in entry.fields]:
            return nearest(wanted[length], known)
    return "List the keys: sdft explain recipe, sdft explain compute, sdft explain sweep"


def _lines(entry: Entry) -> Iterator[str]:
    yield f"{entry.name} ({entry.kind} file)" if entry.path != entry.kind else f"{entry.name} (file)"
    if entry.path not in ("", entry.kind):
        yield f"  type:     {entry.type}"
        yield f"  default:  {'none, it is required' if entry.default is None else entry.default}"
    if entry.only_with:
        yield f"  only with {' or '.join(entry.only_with)}"
    about = [text for text in entry.about if text != entry.help]
    for text in (entry.help, *about):
        yield from textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ")
    width = max((len(field.path) for field in entry.fields), default=0)
    for field in entry.fields:
        first_sentence = field.help.partition(". ")[0].removesuffix(".")
        name = f"  {field.path:<{width}}  "
        yield from textwrap.wrap(f"{first_sentence}.", _WIDTH, initial_indent=name, subsequent_indent=" " * len(name))
