"""What a chain costs beside the arithmetic of its models: `python -m benchmarks.start`.

In: nothing; the tiny model and the recipe of benchmarks/sweep.py, whose arithmetic takes next to no time. Out: seconds
of the command by layer (each kind of stage, what lies between stages, and the imports that every process which needs
them pays), and the figures as the last line. Takes about 5 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.apart import measure_apart
from benchmarks.report import median_and_range, print_figures
from benchmarks.sweep import seconds_by_stage, seconds_of, write_inputs

IMPORTS = ("sdft_ray.pipeline", "ray.data", "ray.train.torch", "transformers", "vllm", "deepspeed", "lm_eval.tasks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)  # the same script, in a process of its own
    options = parser.parse_args()
    if options.once:
        print(
            json.dumps({"seconds": seconds_of(options.once.parent, "run", "recipe.yaml", "--root", options.once.name)})
        )
        return
    with tempfile.TemporaryDirectory(prefix="start-") as folder:
        measure(Path(folder), options.runs)


def measure(folder: Path, runs: int) -> None:
    """Run and print everything."""
    write_inputs(folder)
    commands: list[dict[str, Any]] = []
    layers: dict[str, list[float]] = {}
    for run in range(runs):
        root = folder / f"root-{run}"
        commands.append(measure_apart("benchmarks.start", "--once", root))
        stages = seconds_by_stage(root)
        for name, seconds in {**stages, "between": commands[-1]["seconds"] - sum(stages.values())}.items():
            layers.setdefault(name, []).append(seconds)
        print(f"run {run + 1}: {commands[-1]['seconds']:.1f} s, {commands[-1]['cpu_seconds']:.1f} s of CPU", flush=True)
    medians = {name: round(statistics.median(seconds), 1) for name, seconds in layers.items()}
    imports = {name: round(seconds_to_import(name), 1) for name in IMPORTS}
    for title, table in (("layer", medians), ("import", imports)):
        print(f"\n{title:<20} {'s':>6}")
        for name, seconds in table.items():
            print(f"{name:<20} {seconds:>6.1f}", flush=True)
    figures: dict[str, dict[str, Any] | float] = {
        "fixed_overhead_seconds": median_and_range([command["seconds"] for command in commands]),
        "fixed_overhead_cpu_seconds": median_and_range([command["cpu_seconds"] for command in commands]),
        **{f"{name}_seconds": seconds for name, seconds in medians.items()},
        **{f"import_{name.split('.')[0]}_seconds": seconds for name, seconds in imports.items()},
    }
    print_figures("start", figures)


def seconds_to_import(module: str) -> float:
    """Return how long a new process takes to import a module, its own start left out."""
    code = f"import time; begun = time.perf_counter(); import {module}; print(time.perf_counter() - begun)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
