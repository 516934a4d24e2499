"""What both places of artifacts have in common: a directory (local.py) and an object store (remote.py).

Names are paths below the root, with slashes; ids stand at the ends of names of directories.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sdft_ray.errors import UserError, problem


class Listing(NamedTuple):
    """The content of a folder of the root."""

    sizes: dict[str, int]
    """The bytes of every object below the folder, by name; empty for a directory."""
    names: dict[str, list[str]]
    """The names of the directories in the folder, by the ids at their ends."""


def id_in(name: str) -> str:
    """Return the id at the end of a directory's name."""
    return name.rpartition("-")[2]


def by_id(names: Iterable[str]) -> dict[str, list[str]]:
    """Return names by the ids at their ends."""
    names_by_id: dict[str, list[str]] = {}
    for name in names:
        names_by_id.setdefault(id_in(name), []).append(name)
    return names_by_id


def make_directory(path: Path) -> Path:
    """Make a directory where it is missing, and return it."""
    path.mkdir(parents=True, exist_ok=True)
    return path


def require_here(directory: Path, where: str = "--root") -> Path:
    """Return a directory; raises UserError on a node that does not have it."""
    if not directory.is_dir():
        what = f"{directory} is not on {socket.gethostname()}"
        raise UserError(problem(where, what, "Give a directory that every node sees"))
    return directory
