"""The cost of a sweep against its recipes run one by one: `python -m benchmarks.sweep`.

In: nothing; a tiny random model of 6 blocks and generated sums. Out: seconds of every kind of stage, and the figures as
the last line. The sweep is 3 depths x 2 sizes x 2 arms, built by `sdft sweep` in a root of its own; then each of its
six recipes is built by `sdft run`, each in a root of its own, as someone without sweeps would. The same compute file in
both, a core for each process, so that two can be at work; the real engine and real Ray; starting Ray counts, since it
is paid each time. A tiny model trains in seconds, so the shared part (scoring, generation, the evaluations of base and
pruned models) is most of a recipe: where training is most of it, a sweep saves less; the parts show how much. Takes
about 12 minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import print_figures

RECIPE: dict[str, Any] = {
    "rows": {"path": "sums.jsonl", "fields": {"prompt": "q", "response": "a"}, "held_out": 16, "validation": 8},
    "prune": {"blocks": 2, "calibration": {"text": "texts.txt", "limit": 32, "max_tokens": 64}},
    "distill": {"max_new_tokens": 192, "dtype": "float32"},
    "train": {"global_batch_size": 16, "lr": 1e-3},
    "evaluate": {"tasks": ["arc_easy", "held_out"], "limit": 40, "max_new_tokens": 8, "dtype": "float32"},
}
AXES = {"prune.blocks": [1, 2, 3], "train.rows": [128, 256]}
COMPUTE = {
    "score": {"cpus": 1},
    "distill": {"cpus": 1, "engine": {"kv_cache_gib": 1.0, "max_num_seqs": 64}},
    "train": {"workers": 1, "cpus": 1, "micro_batch": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        measure(Path(folder))


def measure(folder: Path) -> None:
    """Run and print everything."""
    write_inputs(folder)
    swept = seconds_of(folder, "sweep", "sweep.yaml", "--root", "swept")
    shared = seconds_by_stage(folder / "swept")
    print(f"sweep: {swept:.0f} s", flush=True)
    alone, parts = 0.0, Counter[str]()
    for blocks in AXES["prune.blocks"]:
        for rows in AXES["train.rows"]:
            root, cell = f"alone-{blocks}-{rows}", [f"prune.blocks={blocks}", f"train.rows={rows}"]
            overrides = [word for value in cell for word in ("--set", value)]
            seconds = seconds_of(folder, "run", "recipe.yaml", "--root", root, *overrides)
            print(f"alone, {blocks} blocks, {rows} rows: {seconds:.0f} s", flush=True)
            alone += seconds
            parts += Counter(seconds_by_stage(folder / root))
    print(f"\n{'stage':<10} {'alone s':>8} {'sweep s':>8} {'ratio':>6}")
    for stage, seconds in parts.items():
        print(f"{stage:<10} {seconds:>8.1f} {shared[stage]:>8.1f} {shared[stage] / seconds:>6.2f}")
    print(f"{'command':<10} {alone:>8.1f} {swept:>8.1f} {swept / alone:>6.2f}\n")
    figures: dict[str, dict[str, Any] | float] = {
        "sweep_over_separate": round(swept / alone, 4),
        "sweep_seconds": round(swept, 1),
        "separate_seconds": round(alone, 1),
        **{f"{stage}_over_separate": round(shared[stage] / seconds, 4) for stage, seconds in parts.items()},
    }
    print_figures("sweep", figures)


def write_inputs(folder: Path) -> None:
    """Write the model, the rows, the texts, the recipe, the sweep and the compute file."""
    importlib.import_module("tests.tiny").make_tiny_model(folder / "tiny", max_position_embeddings=2048)
    with (folder / "sums.jsonl").open("w") as lines:
        for i in range(280):
            lines.write(json.dumps({"q": f"What is {i} + {i}?", "a": f"{i} + {i} = {2 * i}\n#### {2 * i}"}) + "\n")
    (folder / "texts.txt").write_text("\n\n".join(f"Text number {i} about nothing much at all." for i in range(64)))
    recipe = {"model": {"path": str(folder / "tiny")}, **RECIPE}
    sweep = {"recipe": "recipe.yaml", "axes": AXES}
    for name, content in {"recipe": recipe, "sweep": sweep, "compute": COMPUTE}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def seconds_of(folder: Path, *words: str) -> float:
    """Return the seconds of a whole command."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "sdft_ray.cli", *words, "--compute", "compute.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - begun


def seconds_by_stage(root: Path) -> dict[str, float]:
    """Return the seconds of each kind of stage, from the manifests under a root."""
    seconds: Counter[str] = Counter()
    for path in root.glob("*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        seconds[manifest["stage"]] += manifest["provenance"]["wall_seconds"]
    return dict(seconds)


if __name__ == "__main__":
    main()
