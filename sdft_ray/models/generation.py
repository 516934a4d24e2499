"""Answers of a loaded model, up to where a response ends: greedy, or drawn by a seed of their own.

In: prompts as token ids. Out: tokens and texts. Nothing of a model's own generation settings moves them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sdft_ray.data.chat import opened_thought, read_generated, response_ends

if TYPE_CHECKING:
    import torch

# Answers that are generated at once for each sequence of a scoring pass: a step reads all weights for one token a row.
_ROWS_A_SEQUENCE = 4


class Draw(NamedTuple):
    """How the tokens of one answer are drawn."""

    temperature: float
    top_p: float
    seed: int


class Written(NamedTuple):
    """What a model wrote behind a prompt."""

    ids: list[int]
    """With the token that ended it, where one did."""
    text: str
    """With the thought that the prompt opened."""
    ended: bool
    """Whether it ended by itself, and not at the limit."""


class Answer(Protocol):
    """What answers prompts."""

    def __call__(
        self, prompts: Sequence[list[int]], max_new_tokens: int, draws: Sequence[Draw] | None = None
    ) -> list[Written]:
        """Return the continuation of each prompt (token ids) up to where a response ends, drawn as its own of `draws`
        says, else greedy."""
        ...


def sampling_seed(row_id: str, seed: int, sample: int = 0) -> int:
    """Return the seed of one sample of a row: it depends on nothing but these and the recipe's seed."""
    name = f"{seed}:{row_id}" + (f":{sample}" if sample else "")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    draws: Sequence[Draw] | None = None,
    *,
    batch_size: int,
) -> list[Written]:
    """Return the continuation of each prompt (token ids) up to its end of turn, greedy or as its draw says; longest
    prompts first, padded left.

    The model's own settings of generation, such as a penalty on repetition, are replaced for good.
    """
    import torch

    opened = opened_thought(tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    written: dict[int, Written] = {}
    # What a config leaves open is filled in from the model's own: it must not have one.
    model.generation_config = plain = plain_generation(model, tokenizer)
    ends, pad = plain.eos_token_id, plain.pad_token_id
    rows_at_once = _ROWS_A_SEQUENCE * batch_size
    for begin in range(0, len(order), rows_at_once):
        batch = order[begin : begin + rows_at_once]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in batch], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=model.device
        )
        drawn = {"logits_processor": [_drawing([draws[i] for i in batch])]} if draws else {}
        with torch.inference_mode():
            made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **drawn)
        for i, tokens in zip(batch, made[:, width:].tolist(), strict=True):
            written[i] = read_written(tokenizer, tokens, ends, opened)
    return [written[i] for i in range(len(prompts))]


def _drawing(draws: Sequence[Draw]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Return what makes the drawn token of each row the likeliest one, in logits (B, V).

    The largest of log p + Gumbel noise is a draw from p. transformers draws all rows by one generator, so that a row's
    text would hang on the others of its batch.
    """
    import torch
    from transformers import TopPLogitsWarper

    generators = [torch.Generator().manual_seed(draw.seed) for draw in draws]

    def draw_tokens(_ids: Any, logits: torch.Tensor) -> torch.Tensor:
        noisy = []
        for row, draw, generator in zip(logits.float().split(1), draws, generators, strict=True):
            kept = TopPLogitsWarper(draw.top_p)(None, row / draw.temperature)  # (1, V)
            waits = torch.empty(kept.shape).exponential_(generator=generator)
            noisy.append(kept - waits.clamp_min(torch.finfo(waits.dtype).tiny).log().to(kept.device))
        return torch.cat(noisy)

    return draw_tokens


def read_written(tokenizer: Any, tokens: list[int], ends: Collection[int], opened: str) -> Written:
    """Return what generated tokens say up to the first that ends a response; opened: the thought that the prompt
    opened."""
    stop = next((place for place, token in enumerate(tokens) if token in ends), None)
    own = tokens[:stop]
    text = read_generated(tokenizer, own, tokenizer.decode(own, skip_special_tokens=True), opened)
    return Written(own if stop is None else tokens[: stop + 1], text, stop is not None)


def plain_generation(model: Any, tokenizer: Any) -> Any:
    """Return greedy generation up to where a response ends.

    Nothing of the model's generation_config.json, which may ask for sampling or penalties, moves a score.
    """
    from transformers import GenerationConfig

    ends = response_ends(tokenizer, model.config.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    return GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=pad)
