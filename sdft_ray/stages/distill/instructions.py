"""The token ids that ask the unpruned model for a rewrite of each row.

In: rows. Out: what the model is given for each, and the token ids of that. Many rows at once: a tokenizer takes a
batch in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdft_ray.core.prompts import ask_for_rewrite
from sdft_ray.core.rows import Given, Row
from sdft_ray.data.chat import render_prompts
from sdft_ray.stages.distill.draws import Settings, instruction_template


def instructions_of(rows: Sequence[Row], settings: Settings) -> list[Given]:
    """Return what the model is given for each row."""
    templates = {origin: instruction_template(settings, origin) for origin in {row.origin for row in rows}}
    return [ask_for_rewrite(row, templates[row.origin]) for row in rows]


def prompts_of(tokenizer: Any, rows: Sequence[Row], settings: Settings) -> list[list[int]]:
    """Return the token ids that the engine gets for each row."""
    given = instructions_of(rows, settings)
    return render_prompts(tokenizer, given, settings.template_options) if given else []
