"""Our merge against mergekit's, of the same models: `python -m benchmarks.merge --mergekit PYTHON`.

In: a Python that has mergekit (an environment of its own: it wants other versions than we do). Out: a table, and the
figures as the last line. Two Llamas of one origin are written to a temporary directory and removed: some of their
tensors are turned far enough for SLERP, others fall back to the mean, norms are identical. Runs alternate; both are
timed without their imports, and ours includes the strict load and the cosines that it records.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import median_and_range, print_figures
from sdft_ray.stages.merge import LinearSettings, Settings, SlerpSettings, merge_models

T, WEIGHTS = 0.3, (1.0, 3.0)
# Reads lines of (method, directory), answers each with the seconds that the merge took.
_OTHER = """
import json, sys, time
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
for line in sys.stdin:
    config, out = json.loads(line)
    begun = time.perf_counter()
    run_merge(MergeConfiguration.model_validate(config), out, MergeOptions(lazy_unpickle=True, copy_tokenizer=False))
    print("seconds", time.perf_counter() - begun, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", required=True, metavar="PYTHON", help="a Python that can import mergekit")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-") as folder:
        measure(Path(folder), options.mergekit, options.runs, options.width)


def measure(folder: Path, python: str, runs: int, width: int) -> None:
    """Print how far our merges are from mergekit's, and how fast they are against its."""
    models = [folder / name for name in ("one", "other")]
    make_models(models, width)
    other = subprocess.Popen(
        [python, "-c", _OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    difference, figures = 0.0, {}
    ways: dict[str, Settings] = {"slerp": SlerpSettings(t=T), "linear": LinearSettings(weights=WEIGHTS)}
    for method, settings in ways.items():
        speeds = []
        for run in range(runs + 1):
            ours, theirs = folder / f"ours-{method}-{run}", folder / f"theirs-{method}-{run}"
            ours.mkdir()
            begun = time.perf_counter()
            facts = merge_models(dict(zip(("one", "other"), models, strict=True)), ours, settings)
            own_seconds = time.perf_counter() - begun
            their_seconds = run_mergekit(other, describe(method, models), theirs)
            speeds.append(their_seconds / own_seconds)
            difference = max(difference, greatest_difference(ours, theirs))
            print(f"{method} {run}: ours {own_seconds:.2f} s, mergekit {their_seconds:.2f} s", flush=True)
        print(f"{method}: {facts.fell_back_to_linear} of {facts.tensors} tensors fell back")
        figures[f"speed_over_mergekit_{method}"] = median_and_range(speeds[1:])  # the first pair warms up
    assert other.stdin
    other.stdin.close()
    other.wait()
    figures["speed_over_mergekit"] = figures["speed_over_mergekit_slerp"]
    print_figures("merge", {"max_abs_difference_to_mergekit": difference, **figures})


def make_models(models: list[Path], width: int) -> None:
    """Write two models of one origin."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=8,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    origin = LlamaForCausalLM(config).state_dict()
    for seed, directory in enumerate(models):
        torch.manual_seed(seed + 1)
        model = LlamaForCausalLM(config)
        tuned = {}
        for i, (name, weights) in enumerate(origin.items()):
            noise = torch.randn_like(weights) * weights.std()  # of norms, which are all ones, 0
            tuned[name] = weights + (0.001 if i % 2 else 0.1) * noise
        model.load_state_dict(tuned)
        model.save_pretrained(directory)
        write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    """Write a small tokenizer: merging compares the parents'."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={chr(i): i - 32 for i in range(32, 127)}, merges=[]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="~")
    fast.chat_template = "{% for message in messages %}{{ message['content'] + '~' }}{% endfor %}"
    fast.save_pretrained(directory)


def describe(method: str, models: list[Path]) -> dict[str, Any]:
    """Return the same merge in mergekit's words."""
    if method == "slerp":
        inputs: list[dict[str, Any]] = [{"model": str(model)} for model in models]
        more: dict[str, Any] = {"base_model": str(models[0]), "parameters": {"t": T}}
    else:
        inputs = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, WEIGHTS, strict=True)]
        more = {}
    return {"merge_method": method, "models": inputs, "dtype": "float32", **more}


def run_mergekit(process: Any, config: dict[str, Any], out: Path) -> float:
    """Return the seconds of one merge by mergekit."""
    process.stdin.write(json.dumps([config, str(out)]) + "\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("seconds "):
            return float(line.split()[1])
    raise RuntimeError("mergekit ended without a result: run it by hand to see why")


def greatest_difference(one: Path, other: Path) -> float:
    """Return the largest difference of any weight of two models."""
    from safetensors.torch import load_file

    first, second = (
        {name: tensor for shard in model.glob("*.safetensors") for name, tensor in load_file(shard).items()}
        for model in (one, other)
    )
    assert first.keys() == second.keys(), sorted(first.keys() ^ second.keys())
    return max(float((first[name] - second[name]).abs().max()) for name in first)


if __name__ == "__main__":
    main()
