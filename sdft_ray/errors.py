"""The errors that end a command, and the form of their messages.

In: the parts of a problem. Out: one line that a person can act on, and the exit code of the process.
A user's mistake never shows a stack trace; a failed stage names the work that is kept.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A mistake in a recipe, a file or the usage: exit code 2, one line a problem, no trace."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        assert problems, "a UserError names at least one problem"
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class StageFailed(Exception):
    """A stage did not finish: exit code 1. The message names the work that is kept and the next command."""

    exit_code = 1


class Problem(str):
    """One line `where: what. Do this.`, with its parts as attributes."""

    where: str
    what: str
    do: str


def problem(where: str, what: str, do: str) -> Problem:
    """Return the one line that every user-facing error consists of."""
    what, do = what.rstrip("."), do if do.endswith((".", "?")) else f"{do}."
    line = Problem(f"{where}: {what}. {do}")
    line.where, line.what, line.do = where, what, do
    return line


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the advice for an unknown key: the closest known spelling, else all of them.

    >>> nearest("tempreature", ["temperature", "top_p"])
    'Did you mean temperature?'
    """
    names = sorted(known)
    close = [name for name in names if name.casefold() == word.casefold()] or difflib.get_close_matches(
        word, names, n=1, cutoff=0.6
    )
    return f"Did you mean {close[0]}?" if close else f"Known: {listed(names)}."


def counted(number: float, noun: str) -> str:
    """Return a number with its noun, for a line.

    >>> counted(1, "block"), counted(2, "block")
    ('1 block', '2 blocks')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str], most: int = 60) -> str:
    """Return names for a line, which stays readable: a dictionary of thousands is cut off.

    >>> listed(["b", "a", "c"], most=2)
    'b, a and 1 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
