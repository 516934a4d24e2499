"""The speed of evaluation: the engine against transformers, and the packed pass against plain lm-eval.

    python -m benchmarks.evaluate

Both write answers to the same first items of GSM8K (8 worked examples before each); both score the same items of the
demo's four tasks. The model is the demo's base. Ways alternate, each in a process of its own with all cores; loading
and the engine's start are reported on their own. The last line is JSON: `generate_over_transformers` and
`loglikelihood_over_lm_eval` are ratios of seconds. Takes about 8 minutes a run on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.report import median_and_range, print_figures
from sdft_ray import pipeline
from sdft_ray.spec.compute import cores, load_compute
from sdft_ray.spec.evaluation import Evaluate
from sdft_ray.spec.loading import load_recipe
from sdft_ray.spec.wording import validate
from sdft_ray.stages import evaluate
from sdft_ray.stages.evaluate import harness
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

GENERATE, SCORE = ("gsm8k_cot",), ("arc_easy", "sciq", "piqa", "hellaswag")
WAYS = {"transformers": GENERATE, "engine": GENERATE, "lm_eval": SCORE, "packed": SCORE}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each way, alternating (default: %(default)s)")
    parser.add_argument("--items", type=int, default=32, help="that are answered (default: %(default)s)")
    parser.add_argument("--choices", type=int, default=50, help="items of each scored task (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, model = options.measure
        print(json.dumps(measure(way, model, options)))
        return
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways}
    with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
        base, storage = pipeline.chain(load_recipe(Path("configs/recipes/demo.yaml"))).base, Storage(folder)
        pipeline.build([base], load_compute(), storage)
        for number in range(options.runs):
            for way in options.ways:
                again = [sys.executable, "-m", "benchmarks.evaluate", *sys.argv[1:], "--measure", way]
                done = subprocess.run([*again, str(storage.place(base))], stdout=subprocess.PIPE, text=True, check=True)
                runs[way].append(json.loads(done.stdout.splitlines()[-1]))
                told = {name: value for name, value in runs[way][-1].items() if name != "said"}
                print(f"run {number + 1}, {way}: {told}", flush=True)
    print_figures("evaluate", figures_of(runs))


def figures_of(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the figures of the ways that were measured."""
    figures: dict[str, Any] = {}
    pairs = {
        "generate_over_transformers": ("transformers", "engine"),
        "loglikelihood_over_lm_eval": ("lm_eval", "packed"),
    }
    for name, (slow, fast) in pairs.items():
        if slow in runs and fast in runs:
            both = [*zip(runs[slow], runs[fast], strict=True)]
            figures[name] = median_and_range([a["seconds"] / b["seconds"] for a, b in both])
            alike = [a == b for a, b in zip(both[0][0]["said"], both[0][1]["said"], strict=True)]
            figures[f"{fast}_said_alike"] = round(sum(alike) / len(alike), 4)
    for way, each in runs.items():
        for name in ("seconds", "start_seconds"):
            figures[f"{way}_{name}"] = median_and_range([run[name] for run in each])
    return figures


def measure(way: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Take the model through the tasks of a way, and return the seconds and what it said or chose."""
    import torch

    torch.set_num_threads(cores())
    plan, begun = load_compute().evaluate, time.perf_counter()
    if way == "engine":
        from sdft_ray.stages.evaluate.by_engine import load_engine

        lm = load_engine(model, options.dtype, plan.batch_size, "cpu", plan.engine_options()).lm
        assert lm.engine  # started
    elif way == "lm_eval":
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=model, dtype=options.dtype, device="cpu", batch_size=plan.batch_size)
    else:
        lm = harness.load_model(model, options.dtype, plan.batch_size, "cpu").lm
    ready, said = time.perf_counter(), []
    for task in WAYS[way]:
        limit = options.items if task in GENERATE else options.choices
        wanted = validate(Evaluate, {"tasks": [task], "dtype": options.dtype, "limit": limit})
        settings = evaluate.stage(wanted, task, "base", Stage("model", "base", 1, {}), [], {}).settings
        assert isinstance(settings, evaluate.TaskSettings)
        for samples in harness.ask_harness(lm, settings).samples.values():
            said += [sample["resps"] if task in GENERATE else sample["acc"] for sample in samples]
    ended = time.perf_counter()
    return {"seconds": round(ended - ready, 2), "start_seconds": round(ready - begun, 2), "said": said}


if __name__ == "__main__":
    main()
