"""sdft_ray: depth pruning and self-data distillation of instruction-tuned LLMs on Ray.

`run`, `sweep` and `report` are its functions for Python (surface.py). Nothing is imported before one is asked for:
`sdft --help` must answer before torch or ray could load.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sdft_ray import imports

if TYPE_CHECKING:
    from sdft_ray.surface import report, run, sweep

__all__ = ("report", "run", "sweep")
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sdft_ray import surface

    return getattr(surface, name)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """Keep `sdft_ray.sweep` and `sdft_ray.report` functions: Python would bind the folders to these names once
        something in one is imported. `from sdft_ray.sweep import planning` finds the folder all the same."""
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
imports.shorten()
