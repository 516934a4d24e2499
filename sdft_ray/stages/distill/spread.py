"""Work on ranges of the training rows, in this process or as tasks of Ray Data.

In: a function and items. Out: its results, in order. What the function makes lies in a `Folder`, in which every node
finds it. Ranges are so large that what a task costs does not matter, and so small that their rows fit in any process:
memory does not grow with the number of rows. What is one range is done here: starting a task takes longer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sdft_ray.cluster import in_tasks
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

RANGE_ROWS = 2**14
A = TypeVar("A")
B = TypeVar("B")


class Range(NamedTuple):
    """Training rows that lie side by side."""

    number: int
    """Among the ranges."""
    start: int
    stop: int


def ranges_of(rows: int) -> list[Range]:
    """Return the ranges of so many rows."""
    starts = range(0, rows, RANGE_ROWS)
    return [Range(number, start, min(start + RANGE_ROWS, rows)) for number, start in enumerate(starts)]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of pieces of a stage's work, on whatever node."""

    storage: Storage
    stage: Stage[Any]
    name: str

    @property
    def path(self) -> Path:
        """Where it is on this node."""
        path = self.storage.resumable(self.stage) / self.name
        path.mkdir(exist_ok=True)
        return path

    def keep(self, name: str) -> None:
        """Let other nodes find a file that was written here."""
        self.storage.publish(self.path / name)

    def find(self, name: str) -> Path:
        """Return a file of the folder, or those that match, brought from other nodes where they were written there."""
        self.storage.bring(self.path, name)
        return self.path / name

    def drop(self) -> None:
        """Delete the folder."""
        self.storage.drop(self.path)


def spread(function: Callable[[A], B], items: Sequence[A], here: bool) -> Iterator[B]:
    """Yield what a function makes of each item, in order: in this process, or in tasks of one CPU each."""
    return map(function, items) if here else in_tasks(function, items)
