"""Split texts into runs of words, also in scripts that set no spaces between them.

In: a text cut into pieces at spaces or punctuation. Out: its runs of n words. Where a script has no spaces, characters
are counted instead of looked up in a dictionary: two of Chinese or Japanese and four of Thai, Lao, Burmese or Khmer are
about as much as a word elsewhere. Runs of other scripts do not change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_TWO_A_WORD = (
    r"\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"
)
_FOUR_A_WORD = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
INVISIBLE = dict.fromkeys([*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0x61C, 0xFEFF])
"""Characters that no reader sees (also those that turn the direction of writing), for `str.translate`."""
UNSPACED = re.compile(f"[{_TWO_A_WORD}{_FOUR_A_WORD}]")
_PIECE = re.compile(rf"{UNSPACED.pattern}|[^{UNSPACED.pattern[1:-1]}]+")
_QUARTER = re.compile(f"[{_FOUR_A_WORD}]")


def split_unspaced(pieces: Sequence[str]) -> list[str]:
    """Return pieces of a text with each character of a script without spaces as a piece of its own.

    >>> split_unspaced(["CO2", "和氧气"])
    ['CO2', '和', '氧', '气']
    """
    return [part for piece in pieces for part in ([piece] if piece.isascii() else _PIECE.findall(piece))]


def count_words(pieces: Sequence[str]) -> int:
    """Return the number of words in the pieces of a text."""
    return sum(map(_quarters, pieces)) // 4


def runs(pieces: Sequence[str], words: int) -> Iterator[tuple[str, ...]]:
    """Yield every run of `words` words, in order.

    >>> list(runs(["a", "b", "c"], 2)), list(runs(["绿", "色", "植"], 1))
    ([('a', 'b'), ('b', 'c')], [('绿', '色'), ('色', '植')])
    """
    if not UNSPACED.search("".join(pieces)):
        yield from zip(*(pieces[i:] for i in range(words)), strict=False)
        return
    sizes = list(map(_quarters, pieces))
    stop = size = 0
    for start in range(len(pieces)):
        while size < 4 * words and stop < len(pieces):
            size += sizes[stop]
            stop += 1
        if size < 4 * words:
            return
        yield tuple(pieces[start:stop])
        size -= sizes[start]


def _quarters(piece: str) -> int:
    """Return the size of a piece in quarters of a word."""
    if piece.isascii() or not UNSPACED.match(piece):
        return 4
    return 1 if _QUARTER.match(piece) else 2
