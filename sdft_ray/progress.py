"""The progress of a stage for people: one live line on a terminal, an occasional line elsewhere.

In: counts and phases from the stages. Out: text on stderr, so that stdout stays free for results and `--json`. A thread
writes it, not the stage: loading a model or waiting for a node is silent, and a silent command looks dead. Ray's own
progress output is switched off: it names operators, people think in rows and steps.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 200
"""The width of what is cut nowhere: paths are to be copied."""
QUIET_SECONDS = 15.0  # the longest without a line where nobody watches live: often enough to trust, never a flood
_LIVE_SECONDS = 0.5

_last_line = time.monotonic()


def log(text: str) -> None:
    """Write one line for people to stderr, clear of a live line."""
    global _last_line
    print(f"\r\x1b[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
    _last_line = time.monotonic()


def open_console(width: int) -> Console:
    """Return the place of results: as wide as the terminal, elsewhere so many characters. Brackets and colons in a path
    or a text are no markup; a character that the encoding lacks is a question mark."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    on_terminal = sys.stdout.isatty()
    return Console(width=None if on_terminal else width, soft_wrap=width == WIDE, markup=False, emoji=False)


class Progress:
    """The progress of one stage: `done` of `total` units, their rate, the time left, and a note.

    Inside `with` it is shown by itself: on a terminal as one live line, elsewhere whenever nothing was written for
    QUIET_SECONDS, whether or not the stage has counted anything.
    """

    def __init__(self, stage: str, unit: str = "", total: int = 0) -> None:
        self.stage, self.unit, self.total = stage, unit, total
        self.done = 0
        self._note = self._phase = ""
        self._entered = self._begun = time.monotonic()
        self._done_at_begin = 0
        self._live = sys.stderr.isatty()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_showing, daemon=True)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let Tune pickle its callbacks; a copy shows nothing."""
        return Progress, (self.stage, self.unit, self.total)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._live:  # the stage's result comes next, on a line of its own
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def begin(self, total: int, done: int = 0) -> None:
        """Set how many units there are and how many an earlier run finished; the rate counts from now."""
        self.total, self.done, self._done_at_begin = total, done, done
        self._begun = time.monotonic()
        if done:
            log(f"{self.stage}: {done} of {total} {self.unit} are done already")

    def update(self, done: int, note: str = "") -> None:
        """Note that `done` units are finished by now."""
        self.done, self._note, self._phase = done, note, ""

    def enter(self, phase: str) -> None:
        """Name the stage's activity where there is nothing to count, such as "loading the model"."""
        self._phase = phase

    def _keep_showing(self) -> None:
        while not self._ended.wait(_LIVE_SECONDS if self._live else min(1.0, QUIET_SECONDS / 5)):
            if self._live:
                print(f"\r\x1b[K{self.line()[:118]}", end="", file=sys.stderr, flush=True)
            elif time.monotonic() - _last_line >= QUIET_SECONDS:
                log(self.line())

    def line(self) -> str:
        """Return the line that is shown now.

        >>> Progress("distill", "rows", total=288).line()
        'distill: 0/288 rows, 0s'
        """
        now = time.monotonic()
        counted = f"{self.done}/{self.total} {self.unit}" if self.total else ""
        since = duration(now - self._entered)
        if self._phase or self.done == self._done_at_begin:  # no rate yet
            return f"{self.stage}: {', '.join(part for part in (counted, self._phase, since) if part)}"
        rate = (self.done - self._done_at_begin) / max(now - self._begun, 1e-6)
        left = f"{duration((self.total - self.done) / rate)} left" if self.done < self.total else ""
        return f"{self.stage}: {', '.join(part for part in (counted, f'{rate:.1f}/s', left, self._note) if part)}"


def duration(seconds: float) -> str:
    """Return seconds as text.

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
