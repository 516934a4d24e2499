"""Shorter starts: libraries that others import, and of which nothing is used, stay out of a process.

transformers imports scikit-learn wherever it is installed (lm-eval brings it) for one function of assisted generation,
and SciPy for one of object detection: a quarter of the CPU seconds that importing a model's class takes, and Ray starts
many processes. Here the function is imported when it is called; nothing else changes. A check of the demo takes less
time without what `gguf` imports to convert vocabularies, and reasoning-gym to run a game of life.
"""

from __future__ import annotations

import builtins
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType, SimpleNamespace
from typing import Any

_DETECTION = ("deformable_detr", "for_object_detection", "grounding_dino", "lw_detr", "rf_detr", "rt_detr")
# By module: what it imports early, and the function there that it wants.
_LATER = {
    "transformers.generation.candidate_generator": ("sklearn.metrics", "roc_curve"),
    **{f"transformers.loss.loss_{name}": ("scipy.optimize", "linear_sum_assignment") for name in _DETECTION},
}


def shorten() -> None:
    """Let this process import transformers without scikit-learn and SciPy."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


@contextmanager
def without(library: str) -> Iterator[None]:
    """Let imports inside believe that a library which they can do without is not installed."""
    if library in sys.modules:
        yield
        return
    sys.modules[library] = None  # type: ignore[assignment] # Python's own sign of a module that cannot be imported
    try:
        yield
    finally:
        del sys.modules[library]


def postpone(library: str) -> None:
    """Let `import library` load it when something of it is used: the recipe of the documentation of importlib."""
    if library in sys.modules or not (spec := importlib.util.find_spec(library)) or not spec.loader:
        return
    spec.loader = importlib.util.LazyLoader(spec.loader)
    sys.modules[library] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[library])


class _Finder:
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _LATER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and spec.origin:
            spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        early, function = _LATER[self.name]

        def import_later(name: str, *rest: Any) -> Any:
            return SimpleNamespace(**{function: called}) if name == early else __import__(name, *rest)

        def called(*arguments: Any, **named: Any) -> Any:
            return getattr(importlib.import_module(early), function)(*arguments, **named)

        # Of this module alone: other threads may import at the same time.
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_later}
        super().exec_module(module)
