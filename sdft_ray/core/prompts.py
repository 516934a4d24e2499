"""The instructions that ask the unpruned model for a rewrite.

In: a prompt and its reference. Out: the user message. Both templates are part of the ledger's identity.
"""

from __future__ import annotations

import re

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


def rewrite_instruction(prompt: str, reference: str, template: str) -> str:
    """Return the user message that asks the unpruned model to rewrite a reference.

    >>> rewrite_instruction("2 + 2?", "4", "Q: {prompt} A: {reference}")
    'Q: 2 + 2? A: 4'
    """
    values = {"prompt": prompt, "reference": reference}
    # Not str.format: prompts hold braces of their own.
    return re.sub(r"\{(prompt|reference)\}", lambda m: values[m[1]], template)
