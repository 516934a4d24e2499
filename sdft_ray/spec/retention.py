"""The section of a recipe on how near each model stays to the base."""

from __future__ import annotations

from pydantic import Field

from sdft_ray.spec.section import DataPath, Section


class Retention(Section):
    """How near each model stays to the base: divergence of their next-token distributions and agreement of their
    likeliest tokens, on what the base wrote and on plain texts; and bits per byte of held-out references."""

    rows: int = Field(64, ge=0)
    """Held-out rows, at most, that the base responds to and whose references are measured."""
    texts: int = Field(64, ge=0)
    """Plain texts."""
    text: DataPath = "boolq"
    """Where plain texts come from: as prune.calibration.text. Those that calibration reads are passed over."""
    field: str = "text"
    """Column of that file that holds the text."""
    max_tokens: int = Field(128, gt=1)
    """Tokens of a plain text; a longer one keeps its start."""
