"""The instructions that ask the unpruned model for a rewrite.

In: a prompt and its reference, or a conversation that ends in one. Out: what the model is given. Both templates are
part of the ledger's identity.
"""

from __future__ import annotations

import re

from sdft_ray.core.rows import Given, Message, Row

# Part of the ledger's identity, beside the template's text: bump when rendering changes.
RENDERING_VERSION = 2
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


def rewriting_template(answer: str, own: str | None = None) -> str:
    """Return the template for rows whose answers are checked in a way, or not (`none`): the recipe's own, if any."""
    return own or (OPEN if answer == "none" else CHECKABLE)


def rewrite_instruction(prompt: str, reference: str, template: str) -> str:
    """Return the user message that asks the unpruned model to rewrite a reference.

    >>> rewrite_instruction("2 + 2?", "4", "Q: {prompt} A: {reference}")
    'Q: 2 + 2? A: 4'
    """
    values = {"prompt": prompt, "reference": reference}
    # Not str.format: prompts hold braces of their own.
    return re.sub(r"\{(prompt|reference)\}", lambda m: values[m[1]], template)


def ask_for_rewrite(row: Row, template: str) -> Given:
    """Return what the unpruned model is given to rewrite a row's reference: its true history, with the instruction in
    place of what the user asks last; after a tool's result, behind it."""
    given = row.exchange.given
    message = Message("user", rewrite_instruction(row.prompt, row.reference, template))
    history = given.messages if given.messages[-1].role != "user" else given.messages[:-1]
    return Given([*history, message], given.tools)
