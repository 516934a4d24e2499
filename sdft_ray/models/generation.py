"""Greedy answers of a loaded model, up to where a response ends.

In: prompts as token ids. Out: tokens and texts. Nothing of a model's own generation settings moves them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sdft_ray.data.chat import opened_thought, read_generated, response_ends


class Written(NamedTuple):
    """What a model wrote behind a prompt."""

    ids: list[int]
    """With the token that ended it, where one did."""
    text: str
    """With the thought that the prompt opened."""
    ended: bool
    """Whether it ended by itself, and not at the limit."""


def generate_greedily(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int
) -> list[Written]:
    """Return the greedy continuation of each prompt (token ids) up to its end of turn; longest prompts first, padded
    left.

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
        with torch.inference_mode():
            made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens)
        for i, tokens in zip(batch, made[:, width:].tolist(), strict=True):
            written[i] = read_written(tokenizer, tokens, ends, opened)
    return [written[i] for i in range(len(prompts))]


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


# Answers that are generated at once for each sequence of a scoring pass: a step reads all weights for one token a row.
_ROWS_A_SEQUENCE = 4
