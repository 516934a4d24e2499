"""The chain, or a sweep, as a Ray job: `ray job submit --runtime-env jobs/runtime-env.yaml --working-dir . -- python
jobs/run.py RECIPE|SWEEP --compute F --root D`.

In: the arguments of `sdft run` (of `sdft sweep` for a sweep). Out: its exit code. The root must be one that every node
sees. Submitted twice, it goes on.
"""

import sys
from pathlib import Path

from sdft_ray.cli import main
from sdft_ray.errors import UserError
from sdft_ray.spec.loading import is_sweep


def command(recipe: Path) -> str:
    """Return the command for a file; that command reports the mistakes in it."""
    try:
        return "sweep" if is_sweep(recipe) else "run"
    except (UserError, OSError):
        return "run"


if __name__ == "__main__":
    sys.exit(main([command(Path(*sys.argv[1:2])), *sys.argv[1:]]))
