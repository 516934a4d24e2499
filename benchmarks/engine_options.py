"""The speed of the distill stage with each engine option of vLLM's CPU build, beside the defaults.

    python -m benchmarks.engine_options

Runs `benchmarks.generate` for one option after the other, and all of them again in each round, so that a ratio is of
neighbours in time. The last line is JSON: `<option>_over_defaults` is the ratio of output tokens per second, steady
state, without the engine's start; `<option>_start_seconds` is that start. Takes about 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import median_and_range, print_figures

OPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "defaults": ({}, []),
    "one_core": ({"cpus": 1}, []),
    "two_engines": ({"actors": 2}, []),
    "compiled": ({"engine": {"enforce_eager": False}}, []),
    "max_num_seqs_32": ({"engine": {"max_num_seqs": 32}}, []),
    "max_num_seqs_64": ({"engine": {"max_num_seqs": 64}}, []),
    "kv_cache_half_gib": ({"engine": {"kv_cache_gib": 0.5}}, []),
    "no_prefix_caching": ({"engine": {"enable_prefix_caching": False}}, []),
    "float32": ({}, ["--dtype", "float32"]),
}
"""The `distill` section of a compute file, and words for generate.py where the option is one of the recipe."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", nargs="+", choices=list(OPTIONS)[1:], default=list(OPTIONS)[1:])
    chosen = parser.parse_args()
    names = ["defaults", *chosen.options]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(chosen.rounds):
            for name in names:
                runs[name].append(measure(name, chosen.rows, Path(folder) / "compute.yaml"))
                print(f"round {number + 1}, {name}: {runs[name][-1]}", flush=True)
    speeds = {name: [run["tokens_per_second"] for run in own] for name, own in runs.items()}
    figures: dict[str, Any] = {}
    for name in names:
        ratios = [a / b for a, b in zip(speeds[name], speeds["defaults"], strict=True)]
        figures[f"{name}_over_defaults"] = median_and_range(ratios)
        figures[f"{name}_start_seconds"] = median_and_range([run["start_seconds"] for run in runs[name]])
    figures["defaults_tokens_per_second"] = median_and_range(speeds["defaults"])
    del figures["defaults_over_defaults"]
    print_figures("engine_options", figures)


def measure(name: str, rows: int, compute: Path) -> dict[str, float]:
    """Return tokens per second and seconds to start with one option."""
    section, words = OPTIONS[name]
    compute.write_text(yaml.safe_dump({"distill": section}))
    generate = [sys.executable, "-m", "benchmarks.generate", "--ways", "stage", "--runs", "1"]
    generate += ["--rows", str(rows), "--compute", str(compute), *words]
    done = subprocess.run(generate, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    return {name: figures[f"stage_{name}"]["median"] for name in ("tokens_per_second", "start_seconds")}


if __name__ == "__main__":
    main()
