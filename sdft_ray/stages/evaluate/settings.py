"""What an evaluation computes: a benchmark task, or the recipe's held-out rows."""

from __future__ import annotations

from typing import Literal

from sdft_ray.spec.section import Section


class Source(Section):
    """One of several sources of held-out rows."""

    unhashed = ("name",)
    name: str
    """For people."""
    answer: str


class HeldOutSettings(Section):
    """The recipe's own held-out rows, answered greedily."""

    optional = ("sources",)
    task: Literal["held_out"] = "held_out"
    dtype: str
    max_new_tokens: int
    answer: str | None
    """How they are checked; None where each source has its own way."""
    sources: tuple[Source, ...] | None = None
    """Where there are several."""


class TaskSettings(Section):
    """A benchmark task of lm-eval."""

    unhashed, optional = ("file",), ("revision", "sha256")
    task: str
    dtype: str
    metric: str | None
    shots: int
    revision: str | None = None
    limit: int | None
    chat_template: bool
    sha256: str | None = None
    """Of the file that holds the items, where one does."""
    file: str | None = None
    """Where that file is."""


Settings = HeldOutSettings | TaskSettings
