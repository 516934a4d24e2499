"""The recipe's own held-out rows: answers that are generated greedily and, where asked for, sampled; and the
likelihood of the references."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sdft_ray.core.rows import Row, TrainingRow
from sdft_ray.core.selection import strip_thoughts
from sdft_ray.data.chat import encode_rows, opening_ids
from sdft_ray.data.checkers import is_correct
from sdft_ray.errors import UserError, problem
from sdft_ray.generated import HeldOutItem
from sdft_ray.models.generation import Draw, Written, sampling_seed
from sdft_ray.results import Score
from sdft_ray.spec.evaluation import PassAt
from sdft_ray.stages.evaluate.harness import Loaded
from sdft_ray.stages.evaluate.scores import make_score
from sdft_ray.stages.evaluate.settings import Source


class _Bits(NamedTuple):
    """The likelihood of a reference."""

    bits: float
    bytes: int


def evaluate_held_out(
    model: Loaded, rows: list[Row], sources: Sequence[Source], max_new_tokens: int, pass_at: PassAt | None = None
) -> tuple[Score, list[HeldOutItem]]:
    """Return exact match of greedily generated answers, and bits per byte of the references, on the held-out rows.

    What is generated begins where the loss of training begins, and its thoughts are no part of the answer. Bits per
    byte separate models where exact match is on the floor: they need no answer to be right. Rows of sources whose
    answers are not checked count for them alone. Of several sources each has both figures among the other metrics.
    Sampled answers move no score: how many of them are right is kept with each item.
    """
    encoded = list(encode_rows(model.tokenizer, [row.exchange for row in rows]))
    checked = [i for i, row in enumerate(rows) if sources[row.origin].answer != "none"]
    if not checked:
        do = "Hold out rows of a source with checkable answers"
        raise UserError(problem("evaluate.tasks", "held_out has no row with an answer that is checked", do))
    prompts = [encoded[i].ids[: encoded[i].trained_from] for i in checked]
    answers = model.answer(prompts, max_new_tokens)
    right = _count_right(model, [rows[i] for i in checked], prompts, sources, max_new_tokens, pass_at)
    references = _measure(model, rows, encoded)
    items = [
        HeldOutItem(
            id=rows[i].id,
            value=float(_is_right(rows[i], written, sources)),
            generated=written.text,
            ended=written.ended,
            **references[i]._asdict(),
            **more,
        )
        for i, written, more in zip(checked, answers, right, strict=True)
    ]
    values = [item.value for item in items]
    chances = _chances(rows, sources)
    by_source = _by_source(rows, sources, {i: item.value for i, item in zip(checked, items, strict=True)}, references)
    return make_score(
        "exact_match",
        values,
        sum(chances[rows[i].origin] for i in checked) / len(checked),
        limited=False,
        bits_per_byte=_per_byte(references),
        **({"other_metrics": by_source} if len(sources) > 1 else {}),
    ), items


def _is_right(row: Row, written: Written, sources: Sequence[Source]) -> bool:
    answer = strip_thoughts(written.text)
    return None not in (answer, row.answer) and is_correct(sources[row.origin].answer, str(row.answer), str(answer))


def _count_right(
    model: Loaded,
    rows: Sequence[Row],
    prompts: Sequence[list[int]],
    sources: Sequence[Source],
    max_new_tokens: int,
    wanted: PassAt | None,
) -> list[dict[str, int]]:
    """Return how many sampled answers to each row are right, as the field of its item; none where none are wanted."""
    if not wanted:
        return [{} for _ in rows]
    samples = range(wanted.samples)
    draws = [
        Draw(wanted.temperature, wanted.top_p, sampling_seed(row.id, wanted.seed, sample))
        for row in rows
        for sample in samples
    ]
    written = iter(model.answer([prompt for prompt in prompts for _ in samples], max_new_tokens, draws))
    return [{"right": sum(_is_right(row, next(written), sources) for _ in samples)} for row in rows]


def _measure(model: Loaded, rows: Sequence[Row], encoded: Sequence[TrainingRow]) -> list[_Bits]:
    """Return the likelihood of each reference.

    What the template writes around a response is the format's, not the reference's: its bits are left out.
    """
    requests = []
    for row, each in zip(rows, encoded, strict=True):
        if row.exchange.is_plain:
            requests.append((each.ids[:1], each.ids[1:]))
        else:
            start = each.trained_from + len(opening_ids(model.tokenizer))
            requests.append((each.ids[:start], each.ids[start:-1]))
    return [
        _Bits(-likelihood / math.log(2), len(row.reference.encode()))
        for row, (likelihood, _) in zip(rows, model.score(requests), strict=True)
    ]


def _per_byte(references: Sequence[_Bits]) -> float:
    return sum(each.bits for each in references) / sum(each.bytes for each in references)


def _chances(rows: Sequence[Row], sources: Sequence[Source]) -> list[float]:
    """Return what guessing scores on each source.

    Letters can be guessed; how many there are to choose from is seen in the answers.
    """
    answers = [{row.answer for row in rows if row.origin == i} for i, _ in enumerate(sources)]
    return [
        1 / max(1, len(those)) if each.answer == "choice" else 0.0 for each, those in zip(sources, answers, strict=True)
    ]


def _by_source(
    rows: Sequence[Row], sources: Sequence[Source], values: Mapping[int, float], references: Sequence[_Bits]
) -> dict[str, float]:
    """Return the figures of each source that has some; values: of rows that are checked, by their numbers."""
    figures: dict[str, float] = {}
    for number, source in enumerate(sources):
        mine = [i for i, row in enumerate(rows) if row.origin == number]
        if matches := [values[i] for i in mine if i in values]:
            figures[f"exact_match {source.name}"] = sum(matches) / len(matches)
        if mine:
            figures[f"bits_per_byte {source.name}"] = _per_byte([references[i] for i in mine])
    return figures
