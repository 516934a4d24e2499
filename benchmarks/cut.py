"""The speed of `cut` against `cp` of the bytes that it keeps, and its memory: `python -m benchmarks.cut`.

In: nothing; a synthetic Llama of some gigabytes is written to a temporary directory and removed. Out: a table, and the
figures as the last line. Runs of cp and of ours alternate, and both read from the page cache, so that neither
has the better disk. Ours is all work of the stage on the files: copying, comparing each tensor with the base's on the
way, the strict load, and the hashes of the manifest. Importing torch and transformers is not: a run does that once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.apart import status_bytes
from benchmarks.merge import write_tokenizer
from benchmarks.report import median_and_range, print_figures
from sdft_ray.stages import cut
from sdft_ray.store.manifest import list_files

BLOCKS, REMOVED = 16, range(5, 9)
WIDTH, VOCABULARY = 2048, 32_000
SHARD_BYTES = 500_000_000
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)  # the same script, in a process of its own
    options = parser.parse_args()
    if options.memory_of:
        print(peak_mb(options.memory_of))
        return
    with tempfile.TemporaryDirectory(prefix="cut-") as folder:
        measure(Path(folder), options.runs)


def measure(folder: Path, runs: int) -> None:
    """Run and print everything."""
    base = make_model(folder / "base")
    shards = sorted(base.glob("*.safetensors"))
    whole, largest = sum(path.stat().st_size for path in shards), max(path.stat().st_size for path in shards)
    kept = folder / "kept"
    kept.mkdir()
    parameters = cut.remove_blocks(base, kept, REMOVED)  # for cp to copy; this also imports torch
    kept_bytes = sum(path.stat().st_size for path in kept.glob("*.safetensors"))
    print(f"base: {whole / 1e9:.2f} GB in {len(shards)} shards, {parameters.before:,} parameters, {BLOCKS} blocks")
    print(f"kept: {kept_bytes / 1e9:.2f} GB, {parameters.after:,} parameters\n")
    print(f"{'run':>3}  {'cp s':>6}  {'ours s':>6}  {'speed against cp':>16}")
    ratios = []
    for run in range(1, runs + 1):
        copied = seconds_of(lambda target: subprocess.run(["cp", "-r", str(kept), str(target)], check=True), folder)
        ours = seconds_of(lambda target: cut_and_hash(base, target), folder)
        ratios.append(copied / ours)
        print(f"{run:>3}  {copied:>6.2f}  {ours:>6.2f}  {copied / ours:>16.2f}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cut", "--memory-of", str(base)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    above = float(done.stdout.split()[-1]) - largest / 1e6
    print(f"\nlargest shard: {largest / 1e6:.0f} MB; peak memory of the process: {above + largest / 1e6:.0f} MB")
    figures: dict[str, dict[str, Any] | float] = {
        "cut_over_cp_speed": median_and_range(ratios),
        "peak_mb_over_largest_shard": round(above, 1),
    }
    print_figures("cut", figures)


def make_model(directory: Path) -> Path:
    """Write a Llama with random bits for weights, in shards, as any tool would."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    shards: list[dict[str, Any]] = [{}]
    shard_bytes = 0
    for name, tensor in model.state_dict().items():
        if shard_bytes + 2 * tensor.numel() > SHARD_BYTES:
            shards.append({})
            shard_bytes = 0
        shard_bytes += 2 * tensor.numel()
        shards[-1][name] = tensor.shape
    write_tokenizer(directory)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {name: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16) for name, shape in shapes.items()}
        save_file(
            {name: tensor.view(torch.bfloat16) for name, tensor in weights.items()},
            directory / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(shapes, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def seconds_of(work: Callable[[Path], object], folder: Path) -> float:
    """Return how long `work` takes to fill a new directory, which is removed after; earlier writes are on the disk."""
    target = folder / "made"
    os.sync()
    begun = time.perf_counter()
    work(target)
    seconds = time.perf_counter() - begun
    shutil.rmtree(target, ignore_errors=True)
    return seconds


def cut_and_hash(base: Path, target: Path) -> None:
    target.mkdir()
    cut.remove_blocks(base, target, REMOVED)
    list_files(target)


def peak_mb(base: Path) -> float:
    """Return the peak resident memory (MB) of this process while it cuts, imports included."""
    Path("/proc/self/clear_refs").write_text("5")  # from here on
    with tempfile.TemporaryDirectory(dir=base.parent) as folder:
        cut_and_hash(base, Path(folder) / "made")
    return status_bytes("VmHWM") / 1e6


if __name__ == "__main__":
    main()
