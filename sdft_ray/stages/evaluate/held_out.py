"""The recipe's own held-out rows: answers that are generated greedily, and the likelihood of the references."""

from __future__ import annotations

import math
from typing import Any

from sdft_ray.core.rows import Row
from sdft_ray.core.selection import strip_thoughts
from sdft_ray.data.chat import encode_rows, opening_ids
from sdft_ray.data.checkers import is_correct
from sdft_ray.results import Item, Score
from sdft_ray.stages.evaluate.generation import generate_greedily
from sdft_ray.stages.evaluate.likelihoods import score_requests
from sdft_ray.stages.evaluate.scores import make_score


class _HeldOutItem(Item):
    generated: str
    bits: float
    """Of the reference."""
    bytes: int
    """Of the reference."""


def evaluate_held_out(
    lm: Any, rows: list[Row], checker: str, max_new_tokens: int, batch_size: int
) -> tuple[Score, list[Item]]:
    """Return exact match of greedily generated answers, and bits per byte of the references, on the held-out rows.

    What is generated begins where the loss of training begins, and its thoughts are no part of the answer. Bits per
    byte separate models where exact match is on the floor: they need no answer to be right.
    """
    model, tokenizer = lm.model, lm.tokenizer
    encoded = list(encode_rows(tokenizer, [row.exchange for row in rows]))
    prompts = [row.ids[: row.trained_from] for row in encoded]
    texts = generate_greedily(model, tokenizer, prompts, max_new_tokens, batch_size)
    # What the template writes around a response is the format's, not the reference's: its bits are left out.
    starts = [row.trained_from + len(opening_ids(tokenizer)) for row in encoded]
    requests = [(row.ids[:start], row.ids[start:-1]) for row, start in zip(encoded, starts, strict=True)]
    likelihoods = score_requests(model, requests, lm.max_length, batch_size)
    items = []
    for row, text, (likelihood, _) in zip(rows, texts, likelihoods, strict=True):
        answer = strip_thoughts(text)
        items.append(
            _HeldOutItem(
                id=row.id,
                value=float(None not in (answer, row.answer) and is_correct(checker, str(row.answer), str(answer))),
                generated=text,
                bits=-likelihood / math.log(2),
                bytes=len(row.reference.encode()),
            )
        )
    values = [item.value for item in items]
    # Letters can be guessed; how many there are to choose from is seen in the answers.
    chance = 1 / len({row.answer for row in rows}) if checker == "choice" else 0.0
    bits = sum(item.bits for item in items) / sum(item.bytes for item in items)
    return make_score("exact_match", values, chance, limited=False, bits_per_byte=bits), list(items)
