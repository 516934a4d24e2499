"""The command `sdft`, as a user's shell runs it."""

import subprocess
import sys
from pathlib import Path


def sdft(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run `sdft` with these arguments in a directory and return what came of it."""
    command = [sys.executable, "-m", "sdft_ray.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
