"""Writes llms.txt into the site: what there is to read, for programs that read it; and the pages as Markdown beside.

In: mkdocs calls `on_post_build` (mkdocs.yml names this file as a hook). Out: site/llms.txt, with a link and the first
sentence of each page in the order of the site. The format: https://llmstxt.org.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def on_post_build(config: Mapping[str, Any]) -> None:
    """Write llms.txt and copy the pages."""
    docs, site = Path(config["docs_dir"]), Path(config["site_dir"])
    text = render(config["site_name"], config["site_description"], config["nav"], docs)
    (site / "llms.txt").write_text(text, encoding="utf-8")
    for page in docs.glob("*.md"):
        shutil.copy(page, site)


def render(name: str, description: str, nav: Sequence[Mapping[str, str]], docs: Path) -> str:
    """Return the text; nav: one mapping a page, of its title to its file."""
    lines = [f"# {name}", "", f"> {description}", "", "## Docs", ""]
    for title, file in (item for entry in nav for item in entry.items()):
        lines.append(f"- [{title}]({file}): {first_sentence((docs / file).read_text(encoding='utf-8'))}")
    return "\n".join([*lines, ""])


def first_sentence(page: str) -> str:
    """Return the first sentence of a page of Markdown as plain text.

    >>> first_sentence("# Title\\n\\nThis is [a link](a.md)\\nand more. The rest.")
    'This is a link and more.'
    """
    blocks = (block for block in re.split(r"\n\s*\n", page) if block[:1].isalpha() or block[:1] in "*`[")
    words = " ".join(next(blocks, "").split())
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[*`]", r"\1", words)
    return re.match(r".*?\.(?= |$)|.*", plain)[0]  # type: ignore[index] # it matches anything
