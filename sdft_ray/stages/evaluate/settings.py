"""What an evaluation computes: a benchmark task, or the recipe's held-out rows."""

from __future__ import annotations

from typing import Literal

from sdft_ray.spec.evaluation import PassAt
from sdft_ray.spec.section import Section


class Source(Section):
    """One of several sources of held-out rows."""

    unhashed = ("name",)
    name: str
    """For people."""
    answer: str


class HeldOutSettings(Section):
    """The recipe's own held-out rows, answered greedily."""

    unhashed, optional = ("offline",), ("sources", "engine", "pass_at")
    task: Literal["held_out"] = "held_out"
    dtype: str
    engine: str = "transformers"
    max_new_tokens: int
    answer: str | None
    """How they are checked; None where each source has its own way."""
    sources: tuple[Source, ...] | None = None
    """Where there are several."""
    pass_at: PassAt | None = None
    """How they are answered with sampling, too, where they are."""
    offline: bool = True
    """Whether no other task of the recipe needs a hub: a worker that is offline once stays so."""


class TaskSettings(Section):
    """A benchmark task of lm-eval."""

    unhashed, optional = ("file",), ("revision", "sha256", "engine")
    task: str
    dtype: str
    engine: str = "transformers"
    metric: str | None
    shots: int
    revision: str | None = None
    limit: int | None
    chat_template: bool
    sha256: str | None = None
    """Of the file that holds the items, where one does."""
    file: str | None = None
    """Where that file is."""

    @property
    def offline(self) -> bool:
        """Whether it needs no hub."""
        return self.file is not None


Settings = HeldOutSettings | TaskSettings
