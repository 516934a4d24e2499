"""The chain, or a sweep, as a Ray job: `ray job submit --runtime-env jobs/runtime-env.yaml --working-dir . -- python
jobs/run.py RECIPE|SWEEP --compute F --root D`.

In: the arguments of `sdft run` (of `sdft sweep` for a sweep). Out: its exit code. The root must be one that every node
sees. Submitted twice, it goes on.
"""

import sys
from pathlib import Path

from sdft_ray.cli import main
from sdft_ray.sweep import is_sweep

if __name__ == "__main__":
    recipe = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    command = "sweep" if recipe and recipe.is_file() and is_sweep(recipe) else "run"
    sys.exit(main([command, *sys.argv[1:]]))
