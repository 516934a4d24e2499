"""Find rows that share text with a benchmark: training on its items would make the evaluation a test of memory.

In: the texts of rows and of tasks. Out: for each row and task that share a run of words, that run. Plain words are
compared, without case and punctuation (characters, where a script sets no spaces), through sets of hashes: one pass
over the tasks and one over the rows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from sdft_ray.core.words import count_words, runs, split_unspaced

# A task's text of fewer than n words counts where a row holds all of it. Shorter ones than this are everyday speech: in
# 9,473 rows of GSM8K and Dolly texts of 5 to 7 words occurred 22 times, all by chance ("the position of the sun"),
# texts of 8 and more words once.
SHORTEST_WORDS = 8


@dataclasses.dataclass(frozen=True)
class Overlap:
    """A row and a task that share a run of words."""

    row: str
    task: str
    ngram: str
    """The first shared run, lower case, one space between words."""


def ngrams(text: str, n: int) -> Iterator[str]:
    """Yield every run of n words of a text, in order.

    >>> list(ngrams("It's 4, isn't it?", 4))
    ['it s 4 isn', 's 4 isn t', '4 isn t it']
    """
    return map(" ".join, runs(_split(text), n))


def _split(text: str) -> list[str]:
    return split_unspaced(re.findall(r"\w+", text.lower()))


def find_overlaps(rows: Mapping[str, Iterable[str]], tasks: Mapping[str, Iterable[str]], n: int) -> list[Overlap]:
    """Return one overlap for each row and task that share n words in a row, or the whole of a task's shorter text.

    A row before: "r1": ["Tell me: which of these gases do green plants take in?", "CO2"], and a task "quiz" that asks
    "Which of these gases do green plants take in?". After: Overlap("r1", "quiz", "which of these gases do green plants
    take in").
    """
    indexes = {task: _index(texts, n) for task, texts in tasks.items()}
    sizes = sorted({size for hashes in indexes.values() for size in hashes}, reverse=True)
    overlaps = []
    for row, texts in rows.items():
        grams = [(size, hash(gram), gram) for text in texts for size in sizes for gram in ngrams(text, size)]
        for task, hashes in indexes.items():
            shared = next((gram for size, key, gram in grams if key in hashes.get(size, ())), None)
            if shared is not None:
                overlaps.append(Overlap(row, task, shared))
    return overlaps


def _index(texts: Iterable[str], n: int) -> dict[int, set[int]]:
    """Return the hashes of the runs that no row may hold, by their length in words."""
    hashes: dict[int, set[int]] = {}
    for text in texts:
        size = min(n, count_words(_split(text)))
        if size >= min(n, SHORTEST_WORDS):
            hashes.setdefault(size, set()).update(map(hash, ngrams(text, size)))
    return hashes
