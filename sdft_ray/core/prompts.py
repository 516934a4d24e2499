"""From a row to token ids: the chat prompt, the rewriting prompt, and the training sequence with its mask.

In: a tokenizer with a chat template, and strings. Out: lists of token ids. Text is templated and tokenised exactly
once: a templated string tokenised again would get a second BOS.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

# Part of the ledger's identity, beside the template's text: bump when prompts are rendered otherwise.
RENDERING_VERSION = 1

# For rows whose answer is checked: the model may find its own way, but must arrive. Both templates are the ones of
# six that a 135M model followed best (docs/results.md).
CHECKABLE = """{prompt}

The correct answer is:
{reference}

Answer the question in your own words and end with that same answer."""

# For open-ended rows: same content, own words.
OPEN = """Rewrite the answer to this question in your own words. Keep what it says.

Question: {prompt}

Answer: {reference}"""


# What Llama 3.1's template says by itself.
_DATE = "26 Jul 2024"

# A template that thinks by default would put its thoughts into the responses.
_NO_THINKING = {"enable_thinking": False}


@dataclasses.dataclass(frozen=True)
class TrainingRow:
    """A row as the model sees it in training."""

    ids: list[int]
    """Prompt, response and end of turn."""
    trained_from: int
    """Index of the first token that carries loss."""


def rewrite_instruction(prompt: str, reference: str, template: str) -> str:
    """Return the user message that asks the unpruned model to rewrite a reference.

    >>> rewrite_instruction("2 + 2?", "4", "Q: {prompt} A: {reference}")
    'Q: 2 + 2? A: 4'
    """
    values = {"prompt": prompt, "reference": reference}
    # Not str.format: prompts hold braces of their own.
    return re.sub(r"\{(prompt|reference)\}", lambda m: values[m[1]], template)


def render_prompt(tokenizer: Any, prompt: str, template_options: Mapping[str, Any] = _NO_THINKING) -> list[int]:
    """Return the token ids of a user message up to where the assistant begins to speak."""
    messages = [{"role": "user", "content": prompt}]
    return list(_apply(tokenizer, messages, template_options, add_generation_prompt=True))


@functools.lru_cache
def end_of_turn(tokenizer: Any) -> int:
    """Return the id of the token with which the chat template closes an assistant turn, else the EOS token."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "RESPONSE"}]
    text = _apply(tokenizer, messages, _NO_THINKING, tokenize=False)
    after = tokenizer(text.rpartition("RESPONSE")[2].lstrip(), add_special_tokens=False)["input_ids"]
    marks = tokenizer.added_tokens_decoder
    if after and after[0] in marks and marks[after[0]].special:
        return int(after[0])
    return int(tokenizer.eos_token_id)


def _apply(tokenizer: Any, messages: list[dict[str, str]], template_options: Mapping[str, Any], **kind: Any) -> Any:
    # return_dict: transformers 5 would otherwise hand back a BatchEncoding. The date: some templates print today's, and
    # the same recipe would be another one tomorrow. Templates that know no such things ignore them.
    options = {"date_string": _DATE, "strftime_now": lambda _format: _DATE, **template_options}
    return tokenizer.apply_chat_template(messages, return_dict=False, **options, **kind)


def encode_row(tokenizer: Any, prompt: str, response: str) -> TrainingRow:
    """Return prompt + response + end of turn, where only response and end of turn carry loss.

    A row before: prompt "2 + 2?", response "4". After, decoded: `<|im_start|>user\\n2 + 2?<|im_end|>\\n
    <|im_start|>assistant\\n` without loss, then `4<|im_end|>` with loss.
    """
    before = render_prompt(tokenizer, prompt)
    after = tokenizer(response, add_special_tokens=False)["input_ids"]
    return TrainingRow(before + list(after) + [end_of_turn(tokenizer)], len(before))
