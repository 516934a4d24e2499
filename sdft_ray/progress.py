"""What a person sees while a stage works: one live line on a terminal, a line now and then elsewhere.

In: counts from the stages. Out: text on stderr, so that stdout stays free for results and `--json`.
Ray's own progress output is switched off: it speaks of operators, people think in rows and steps.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

_QUIET_SECONDS = 15.0  # between two lines where nobody watches live: often enough to trust, never a flood


def say(text: str) -> None:
    """Write one line for people to stderr, clear of a live line."""
    print(f"\r\x1b[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


class Progress:
    """The progress of one stage: `done` of `total` units, their rate, the time left, and a note."""

    def __init__(self, stage: str, unit: str, total: int = 0) -> None:
        self.stage, self.unit, self.total = stage, unit, total
        self.done = 0
        self._begun = self._shown = time.monotonic()
        self._done_at_begin = 0
        self._live = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(final=True)

    def begin(self, total: int, done: int = 0) -> None:
        """Set how many units there are and how many an earlier run finished; the rate counts from now."""
        self.total, self.done, self._done_at_begin = total, done, done
        self._begun = time.monotonic()
        if done:
            say(f"{self.stage}: {done} of {total} {self.unit} were there already")

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` units are finished by now."""
        self.done = done
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._live else _QUIET_SECONDS):
            self._shown = now
            self._show(note=note)

    def _show(self, note: str = "", final: bool = False) -> None:
        if not self.total or (final and not self._live):
            return
        seconds = max(time.monotonic() - self._begun, 1e-6)
        rate = (self.done - self._done_at_begin) / seconds
        left = f", {duration((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        text = f"{self.stage}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s{left}{', ' + note if note else ''}"
        if self._live:
            print(f"\r\x1b[K{text[:118]}", end="\n" if final else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return seconds as people say them.

    >>> duration(75), duration(8.2)
    ('1m15s', '8s')
    """
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def quiet_transformers() -> None:
    """Switch off the progress bars and hints of transformers in this process; errors still come as exceptions."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
