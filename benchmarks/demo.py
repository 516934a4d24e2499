"""How long `make demo` takes once set up, here and on a CPU without bfloat16: `python -m benchmarks.demo`.

In: nothing, or another recipe. Out: the seconds of every kind of stage, and the figures as the last line. The recipe is
run and its models verified in a root of their own, as the Makefile does, once as this machine is and once with
oneDNN's and PyTorch's matrix products held to AVX2 (a machine with AVX2 alone runs the same twice). vLLM picks its own
kernels by the CPU's flags, independent of these variables (docs/footguns.md). Takes about 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import print_figures
from benchmarks.sweep import seconds_by_stage

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("configs/recipes/demo.yaml"))
    recipe = parser.parse_args().recipe
    figures: dict[str, float] = {}
    for name, variables in (("demo_seconds", {}), ("demo_seconds_avx2", AVX2)):
        with tempfile.TemporaryDirectory(prefix="demo-") as root:
            figures[name] = round(run(recipe, Path(root), variables), 1)
            print(f"\n{name}: {figures[name]:.0f}", flush=True)
            for stage, seconds in seconds_by_stage(Path(root)).items():
                print(f"{stage:<10} {seconds:>8.1f}", flush=True)
    print_figures("demo", figures)


def run(recipe: Path, root: Path, variables: dict[str, str]) -> float:
    """Return how long running and verifying a recipe takes."""
    begun = time.perf_counter()
    for command in (["run", str(recipe), "--html", str(root / "demo.html")], ["verify", str(recipe)]):
        words = [sys.executable, "-m", "sdft_ray.cli", *command, "--root", str(root)]
        subprocess.run(words, check=True, env={**os.environ, **variables})
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
