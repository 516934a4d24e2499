"""The model that rewrites: the base, another one, or one behind an endpoint of which only the tokenizer is here.

In: the stage. Out: whose tokenizer writes the prompts, where its files are, what people call it; or a UserError where
it cannot teach.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdft_ray.core.rows import Exchange
from sdft_ray.data.chat import require_trainable, require_writable
from sdft_ray.endpoint import Client
from sdft_ray.errors import Problem, UserError, problem
from sdft_ray.results import Conversation, training_batches
from sdft_ray.spec.sources import ServedModel
from sdft_ray.stages import Work, bring_tokenizer
from sdft_ray.stages.distill.draws import Settings
from sdft_ray.store.identity import Stage


def teacher_name(stage: Stage[Settings]) -> str | None:
    """Return what people call the model that rewrites; None where it is the base."""
    if isinstance(served := stage.settings.teacher, ServedModel):
        return served.model
    teacher = stage.inputs.get("teacher")
    return teacher.slug if teacher else None


def teacher_files(stage: Stage[Settings]) -> Stage[Any]:
    """Return the stage with the tokenizer that prompts are written by, and the weights where they are here."""
    return stage.inputs.get("teacher", stage.model)


def teacher_handle(work: Work[Settings]) -> Callable[[], Path]:
    """Return what gives a worker, on whatever node, the directory of the teacher there: for an endpoint without
    weights."""
    if isinstance(work.settings.teacher, ServedModel):
        return functools.partial(bring_tokenizer, work.storage, teacher_files(work.stage))
    return work.storage.handle(teacher_files(work.stage))


def require_able(work: Work[Settings]) -> None:
    """Raise UserError where rewrites could not be asked for or trained on: before the first is generated."""
    tokenizer = _require_writes(work, work.stage.model)
    if teacher := work.stage.inputs.get("teacher"):
        try:
            tokenizer = _require_writes(work, teacher)
        except UserError as error:
            raise UserError(*map(_of_teacher, error.problems)) from None
    if isinstance(served := work.settings.teacher, ServedModel):
        Client(served).require_tokenizer(tokenizer)


def _require_writes(work: Work[Settings], model: Stage[Any]) -> Any:
    """Return a model's tokenizer, whose chat template writes all conversations."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bring_tokenizer(work.storage, model))
    require_trainable(tokenizer)
    batches = training_batches(work.input("rows"), work.settings.rows, Conversation)
    require_writable(tokenizer, (Exchange("", "", row.conversation) for batch in batches for row in batch))
    return tokenizer


def _of_teacher(line: str) -> str:
    return problem("distill.teacher", line.what, line.do) if isinstance(line, Problem) else line
