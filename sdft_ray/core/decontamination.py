"""Find rows that share text with a benchmark: training on its items would make the evaluation a test of memory.

In: the texts of tasks, once, and those of rows, one row at a time. Out: for each task that shares a run of words with
a row, that run. Plain words are compared, without case and punctuation (characters, where a script sets no spaces) and
in one spelling: full-width letters, ligatures, digits of other scripts, commas in numbers, entities of HTML and accents
apart from their letters are as usual, and signs that Arabic and Hebrew mostly leave out do not count.
Nearly all rows share nothing, so a row is first asked for a few short runs, at a distance that no shared run fits in
between; only a row that has one of those is compared run by run.
"""

from __future__ import annotations

import dataclasses
import html
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from sdft_ray.core.words import INVISIBLE, UNSPACED, count_words, runs, split_unspaced

# A task's text of fewer than n words counts where a row holds all of it. Shorter ones than this are everyday speech: in
# 9,473 rows of GSM8K and Dolly texts of 5 to 7 words occurred 22 times, all by chance ("the position of the sun"),
# texts of 8 and more words once.
SHORTEST_WORDS = 8

# \w lacks the signs that other scripts write on their letters: Hebrew, Arabic, those of India.
_WORD = re.compile(r"[\w\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff]+")
# It has the underscore, which is a mark: _so_, x_{1} or x_1.
_UNDERSCORES = dict.fromkeys([0x5F, 0xFE33, 0xFE34, *range(0xFE4D, 0xFE50), 0xFF3F], " ")
_VOWELS = dict.fromkeys([*range(0x591, 0x5BE), 0x5BF, 0x5C1, 0x5C2, 0x5C7, 0x640, *range(0x64B, 0x653), 0x670])
_DIGITS = {i: str(unicodedata.decimal(c)) for i in range(0x660, 0xABFA) if (c := chr(i)).isdecimal()}
_UNSEEN = INVISIBLE | _UNDERSCORES | _VOWELS | _DIGITS | {0xAD: None}  # and hyphens that show only where a line breaks
# What \w+ finds in lower-case ASCII, as one table: a third of the time.
_ASCII = str.maketrans({i: c.lower() if (c := chr(i)).isalnum() else " " for i in range(128)})
# 1,200 or 1200: the comma comes first, as one letter is found fast.
_THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3}(?!\d))")


@dataclasses.dataclass(frozen=True)
class Overlap:
    """A row and a task that share a run of words."""

    row: str
    task: str
    ngram: str
    """The first shared run, lower case, one space between words."""


def split_words(text: str) -> list[str]:
    """Return the words of a text without case and punctuation, and single characters of scripts without spaces.

    >>> split_words("It's 4, isn't it?")
    ['it', 's', '4', 'isn', 't', 'it']
    """
    if "&" in text:
        text = html.unescape(text)
    text = _THOUSANDS.sub("", text.replace("{,}", ","))  # as LaTeX has it
    if text.isascii():
        return text.translate(_ASCII).split()
    lower = unicodedata.normalize("NFKC", text.translate(_UNSEEN)).casefold()
    words = _WORD.findall(lower)
    return split_unspaced(words) if UNSPACED.search(lower) else words


class TaskIndex:
    """The runs of words that no row may hold. It is built once and asked for each row.

    Runs are held as hashes, which Python makes anew in each process: a copy in another process builds its own.
    """

    def __init__(self, tasks: Mapping[str, Iterable[str]], n: int) -> None:
        self._tasks = {task: tuple(texts) for task, texts in tasks.items()}
        self._n = n
        self._owners: dict[int, dict[int, int]] = {}
        """For each size in words: for the hash of each run, the tasks that hold it, as bits."""
        # A run of so many words has as many pieces or more. Wherever it lies in a row, one of the row's short runs,
        # taken at every stride, lies inside it.
        self._shortest = min(n, SHORTEST_WORDS)
        self._length = max(1, self._shortest - 2)
        self._stride = self._shortest - self._length + 1
        self._short: set[int] = set()
        for number, texts in enumerate(self._tasks.values()):
            for text in texts:
                self._add(split_words(text), 1 << number)
        self._sizes = sorted(self._owners, reverse=True)

    def __reduce__(self) -> tuple[type[TaskIndex], tuple[Mapping[str, Sequence[str]], int]]:
        return TaskIndex, (self._tasks, self._n)

    def find(self, row: str, texts: Iterable[str]) -> list[Overlap]:
        """Return one overlap for each task that shares a run with a row, in the order of the tasks.

        A row before: "r1", ["Tell me: which of these gases do green plants take in?", "CO2"], and a task "quiz" that
        asks "Which of these gases do green plants take in?". After: Overlap("r1", "quiz", "which of these gases do
        green plants take in"). A task's text of fewer words than n counts where a row holds all of it.
        """
        shared: dict[int, str] = {}
        for text in texts:
            words = split_words(text)
            if not self._short.isdisjoint(_hashes(words, self._length, self._stride)):
                self._compare(words, shared)
        names = list(self._tasks)
        return [Overlap(row, names[task], shared[task]) for task in sorted(shared)]

    def _add(self, words: Sequence[str], task: int) -> None:
        """Index the runs of a text that is long enough to count."""
        size = min(self._n, count_words(words))
        if size < self._shortest:
            return
        owners = self._owners.setdefault(size, {})
        for key in map(hash, runs(words, size)):
            owners[key] = owners.get(key, 0) | task
        self._short.update(_hashes(words, self._length, 1))

    def _compare(self, words: Sequence[str], shared: dict[int, str]) -> None:
        """Note the first run that a text shares with each task that shares none so far."""
        for size in self._sizes:
            owners = self._owners[size]
            for run in runs(words, size):
                if tasks := owners.get(hash(run)):
                    for task in range(tasks.bit_length()):
                        if tasks >> task & 1:
                            shared.setdefault(task, " ".join(run))


def _hashes(words: Sequence[str], length: int, stride: int) -> Iterator[int]:
    """Yield the hash of a run of `length` pieces at every stride."""
    return map(hash, zip(*(words[i::stride] for i in range(length)), strict=False))
