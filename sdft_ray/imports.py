"""A shorter start of every process that uses transformers: without scikit-learn, SciPy and pandas.

transformers imports scikit-learn wherever it is installed (lm-eval brings it), for one function of assisted generation:
2 of the 7 CPU seconds that `from transformers import AutoTokenizer` takes. Ray starts many processes. Here the function
is imported when it is called; nothing else changes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_MODULE = "transformers.generation.candidate_generator"


def shorten() -> None:
    """Let this process import transformers without scikit-learn."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and spec.origin:
            spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        from transformers import utils

        there = utils.is_sklearn_available
        utils.is_sklearn_available = lambda: False
        try:
            super().exec_module(module)
        finally:
            utils.is_sklearn_available = there
        module.__dict__.update(is_sklearn_available=there, roc_curve=_roc_curve)


def _roc_curve(*arguments: Any, **named: Any) -> Any:
    from sklearn.metrics import roc_curve

    return roc_curve(*arguments, **named)
