"""Writes docs/reference.md and docs/schema/: every field of recipe, compute and sweep files, from their docstrings.

In: the typed sections of sdft_ray.spec. Out: one page with a table for each section, and one JSON Schema for each kind
of file. `python tools/reference.py` writes both anew; tests/test_reference.py fails where they are out of date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from sdft_ray.spec import schema
from sdft_ray.spec.fields import Entry, entries, tree

DOCS = Path(__file__).parents[1] / "docs"
_OPENING = """# Reference of recipe, compute and sweep files

A **recipe** says what is computed and is hashed into the ids of artifacts. A **compute** file says where and how, and
moves no id. A **sweep** names fields of recipes and the values that they take. Unknown keys are refused.

`sdft explain train.lr` prints one of these fields, `sdft schema recipe` the JSON Schema for an editor. A key is a
dotted path: `--set train.lr=2e-4` sets `lr` in the section `train` of a recipe. Fields of a compute file are written
with `compute.` in front here and in messages, and without it in the file. `NAME` stands for a name that you choose.
Of several `--set` for one key the last one counts.

Files and the values of `--set` are YAML 1.2, without aliases and tags of your own: a switch is `true` or `false`, and
`yes`, `on`, `1_000` and `1:30` are texts.

This page is written by `python tools/reference.py` from the docstrings in `sdft_ray/spec`. Change it there.
"""


def pages() -> dict[Path, str]:
    """Return the text of every generated file."""
    texts = {DOCS / "schema" / f"{kind}.json": schema.render(kind) for kind in schema.KINDS}
    return {DOCS / "reference.md": reference()} | texts


def reference() -> str:
    """Return the page as Markdown."""
    lines = [_OPENING]
    for kind in schema.KINDS:
        homes = _homes(kind)
        for entry in entries(tree(kind)):
            if entry.fields and homes[entry.sections] == entry.path:
                lines.append(f"## {kind.capitalize()}\n" if entry.type == "file" else f"### {entry.path}\n")
                lines += [*_describe(entry, homes), ""]
    return "\n".join(lines)


def _homes(kind: schema.Kind) -> dict[tuple[str, ...], str]:
    """Return where sections are described: at the first of equal ones, such as the rows of recipe and corpus."""
    homes: dict[tuple[str, ...], str] = {}
    for entry in entries(tree(kind)):
        homes.setdefault(entry.sections, entry.path)
    return homes


def _describe(entry: Entry, homes: Mapping[tuple[str, ...], str]) -> Iterator[str]:
    """Yield the text and the table of one section."""
    about = [text for text in entry.about if text != entry.help]
    if len(about) > 1:
        yield f"{_escape(entry.help)} One of:\n"
        yield from (f"- {_escape(text)}" for text in about)
    else:
        yield _escape(" ".join([entry.help, *about]))
    yield "\n| key | type | default | meaning |\n|---|---|---|---|"
    yield from (_row(field, homes) for field in entry.fields)


def _row(field: Entry, homes: Mapping[tuple[str, ...], str]) -> str:
    words, text = field.type, field.help
    if field.fields:
        words = re.sub("sections?", rf"[\g<0>](#{anchor(homes[field.sections])})", words, count=1)
    if field.only_with:
        text = f"Only with {' or '.join(f'`{key}`' for key in field.only_with)}. {text}"
    default = "required" if field.default is None else f"`{field.default}`"
    return f"| `{field.path}` | {words} | {default} | {_escape(text)} |"


def anchor(path: str) -> str:
    """Return the address of a section's heading on the page, as GitHub and MkDocs make it."""
    return re.sub(r"[^\w-]", "", path.lower())


def _escape(text: str) -> str:
    """Return plain text that Markdown shows as it is, code between backticks included."""
    return text.replace("|", r"\|").replace("<", "&lt;")


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)
