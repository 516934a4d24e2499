"""The cost of scoring: one pass for every span of every size, beside a plain forward pass and beside the usual way.

    python -m benchmarks.score

The usual way runs the model once for each number of blocks, with `output_hidden_states=True`. Same texts, same batches,
alternating runs. The last line is JSON: `one_pass_over_forward` and `per_size_over_one_pass` are ratios of wall time,
`peak_mb` is memory above the loaded model's at 8 texts of 256 tokens, each measured in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

from benchmarks.apart import status_bytes
from benchmarks.report import median_and_range, print_figures
from sdft_ray import pipeline
from sdft_ray.data import calibration
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.loading import load_recipe
from sdft_ray.store.storage import Storage

SIZES = (2, 4, 6, 8, 10)
TOKENS, BATCH = 256, 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("configs/recipes/demo.yaml"), help="for its model")
    parser.add_argument("--root", default="./artifacts", help="where that model is or will be built")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model, storage = pipeline.chain(load_recipe(options.recipe)).base, Storage(options.root)
    pipeline.build([model], load_compute(), storage)
    directory = storage.place(model)
    if options.peak:
        print(_peak_mb(directory, options.peak))
        return

    loaded, batches = _load(directory), _batches(directory, options.texts)
    for way in WAYS.values():  # once, to warm up
        way(loaded, batches[:1])
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(options.runs):
        for name, way in WAYS.items():
            begun = time.perf_counter()
            way(loaded, batches)
            seconds[name].append(time.perf_counter() - begun)
    for name, runs in seconds.items():
        print(f"{name:14} " + "  ".join(f"{value:6.2f} s" for value in runs))
    command = [sys.executable, "-m", "benchmarks.score", "--recipe", options.recipe, "--root", options.root, "--peak"]
    peaks = {
        name: float(subprocess.run([*command, name], capture_output=True, text=True, check=True).stdout.split()[-1])
        for name in WAYS
    }
    ratios = {
        "one_pass_over_forward": _ratios(seconds["one pass"], seconds["forward"]),
        "per_size_over_one_pass": _ratios(seconds["a pass a size"], seconds["one pass"]),
    }
    print_figures("score", {name: median_and_range(runs) for name, runs in ratios.items()} | {"peak_mb": peaks})


def _ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def _load(directory: Path) -> Any:
    import torch
    from transformers import AutoModel

    return AutoModel.from_pretrained(directory, dtype=torch.float32).eval()


def _batches(directory: Path, count: int) -> list[list[list[int]]]:
    """Return BoolQ passages as token ids, in batches of similar length, as the score stage makes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = calibration.read_calibration(calibration.calibration_file("boolq"), "text", count)
    ids = sorted((tokenizer(text)["input_ids"][:TOKENS] for text in texts), key=len, reverse=True)
    return [ids[i : i + BATCH] for i in range(0, len(ids), BATCH)]


def _padded(batch: list[list[int]]) -> dict[str, Any]:
    import torch

    width = max(map(len, batch))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in batch]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch]),
        "use_cache": False,
    }


def _forward(model: Any, batches: list[list[list[int]]]) -> None:
    import torch

    with torch.inference_mode():
        for batch in batches:
            model(**_padded(batch))


def _one_pass(model: Any, batches: list[list[list[int]]]) -> None:
    from sdft_ray.core.walking import Walk
    from sdft_ray.stages.score import pass_by

    walk = Walk(model)
    for batch in batches:
        for _ in pass_by(walk, [[(row, len(row) - 1) for row in batch]]):
            pass


def _a_pass_a_size(model: Any, batches: list[list[list[int]]]) -> None:
    import torch

    with torch.inference_mode():
        for size in SIZES:
            for batch in batches:
                states = model(**_padded(batch), output_hidden_states=True).hidden_states
                last = torch.tensor([len(row) - 1 for row in batch])
                ends = [state[torch.arange(len(batch)), last] for state in states]
                for before, after in zip(ends, ends[size:], strict=False):
                    torch.arccos(torch.nn.functional.cosine_similarity(before, after).clamp(-1, 1)) / torch.pi


WAYS: dict[str, Callable[[Any, list[list[list[int]]]], None]] = {
    "forward": _forward,
    "one pass": _one_pass,
    "a pass a size": _a_pass_a_size,
}


def _peak_mb(directory: Path, way: str) -> float:
    """Return how far the memory of this process rises above that of the loaded model."""
    model = _load(directory)
    for parameter in model.parameters():  # weights are mapped from the file: read them, so that they count before
        parameter.sum()
    batch = [[7] * TOKENS] * BATCH
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = status_bytes("VmRSS")
    WAYS[way](model, [batch])
    return round((status_bytes("VmHWM") - before) / 1e6, 1)


if __name__ == "__main__":
    main()
