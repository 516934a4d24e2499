"""The cost of training: the stage's steps beside a plain PyTorch loop on the same batches, and packing beside padding.

    python -m benchmarks.train [--rows F.jsonl] [--prompt instruction --response response --context context]
                               [--trl PYTHON]

One worker of one thread a core, LoRA, float32, SmolLM2. Useful tokens are those of prompts and responses, no padding.
Without --rows, rows have the lengths of databricks-dolly-15k (its quantiles, drawn with a seed). Alternating runs. The
last line is JSON: `stage_over_plain_loop` (a step under DeepSpeed over the same forward, backward and AdamW without),
`packed_over_padded` (over the same rows, in batches of similar length, padded to their longest),
`packed_over_padded_to_max` (padded to max_tokens; one step, one run), and with --trl, the Python of an environment that
has TRL, `stage_over_trl` (over SFTTrainer at the fastest of its settings). All are ratios of useful tokens a second.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"}

import numpy as np

from benchmarks.report import median_and_range, print_figures
from sdft_ray import pipeline
from sdft_ray.core.rows import TrainingRow
from sdft_ray.spec import compute, loading, training, wording
from sdft_ray.store.storage import Storage

# Tokens of Dolly's prompts and responses under SmolLM2's tokenizer and template, at these quantiles.
QUANTILES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
PROMPTS = (11, 15, 16, 18, 20, 22, 25, 35, 82, 171, 311, 460, 1050, 5314)
RESPONSES = (2, 5, 10, 18, 26, 35, 49, 65, 86, 114, 178, 253, 556, 1709)
# One worker, with Ray Train's variables.
WORKER = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29499"}
MAX_TOKENS, MICRO_BATCH, BATCH = 512, 4, 16


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("configs/recipes/demo.yaml"), help="for its model")
    parser.add_argument("--root", default="./artifacts", help="where that model is or will be built")
    parser.add_argument("--rows", type=Path, help="rows of a .jsonl file instead of Dolly's lengths")
    parser.add_argument("--prompt", default="instruction")
    parser.add_argument("--response", default="response")
    parser.add_argument("--context", default="context")
    parser.add_argument("--trl", help="the Python of an environment with TRL")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batches", type=int, default=2, help="optimizer steps of one run")
    parser.add_argument("--threads", type=int, default=compute.cores())
    options = parser.parse_args()
    model, storage = pipeline.chain(loading.load_recipe(options.recipe)).base, Storage(options.root)
    pipeline.build([model], compute.load_compute(), storage)
    base = storage.place(model)
    count = options.batches * BATCH
    rows = read_rows(base, options, count) if options.rows else draw_rows(count)
    steps = [rows[i : i + BATCH] for i in range(0, count, BATCH)]
    useful = sum(len(row.ids) for row in rows)
    print(f"{count} rows, {useful} tokens, the longest row {max(len(row.ids) for row in rows)}")

    ways = start(base, options.threads)
    for way in ways.values():  # once, to warm up
        way(steps[0])
    begun = time.perf_counter()
    ways.pop("padded to max")(steps[0])
    to_max = sum(len(row.ids) for row in steps[0]) / (time.perf_counter() - begun)
    seconds: dict[str, Callable[[], float]] = {name: functools.partial(timed, way, steps) for name, way in ways.items()}
    if options.trl:
        seconds["trl"] = start_trl(options.trl, base, steps, options.threads)
    rates: dict[str, list[float]] = {name: [] for name in seconds}
    for _ in range(options.runs):
        for name, measure in seconds.items():
            rates[name].append(useful / measure())
    for name, runs in rates.items():
        print(f"{name:14} " + "  ".join(f"{rate:7.1f}" for rate in runs) + " useful tokens/s")

    def over(first: str, second: str) -> dict[str, float]:
        return median_and_range([a / b for a, b in zip(rates[first], rates[second], strict=True)])

    figures: dict[str, Any] = {
        "stage_over_plain_loop": over("stage", "plain"),
        "packed_over_padded": over("plain", "padded"),
        "packed_over_padded_to_max": round(statistics.median(rates["plain"]) / to_max, 2),
        "stage_useful_tokens_per_second": round(statistics.median(rates["stage"]), 1),
    }
    if options.trl:
        figures["stage_over_trl"] = over("stage", "trl")
    print_figures("train", figures)


def timed(way: Callable[[Sequence[TrainingRow]], None], steps: Sequence[Sequence[TrainingRow]]) -> float:
    """Return the seconds that some steps take."""
    begun = time.perf_counter()
    for step in steps:
        way(step)
    return time.perf_counter() - begun


def start_trl(python: str, base: Path, steps: Sequence[Sequence[TrainingRow]], threads: int) -> Callable[[], float]:
    """Return a way to have TRL take the same steps, in a process of its own that waits meanwhile."""
    lora = training.Lora()
    given = {
        "model": str(base),
        "threads": threads,
        "lora": {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout},
        "steps": [
            [{"input_ids": row.ids, "labels": [-100] * row.trained_from + row.ids[row.trained_from :]} for row in step]
            for step in steps
        ],
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(given, file)
    command = [python, "-W", "ignore", "-m", "benchmarks.train_trl", file.name]
    alone = {name: value for name, value in os.environ.items() if name not in WORKER}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alone)
    asked, answers = process.stdin, process.stdout
    assert asked and answers
    print("trl:", answers.readline().strip(), flush=True)
    Path(file.name).unlink()

    def measure() -> float:
        print("go", file=asked, flush=True)
        return float(answers.readline())

    return measure


def draw_rows(count: int) -> list[TrainingRow]:
    """Return rows of Dolly's lengths, those over MAX_TOKENS left out."""
    random = np.random.default_rng(0)
    rows: list[TrainingRow] = []
    while len(rows) < count:
        prompt, response = (int(np.interp(random.random(), QUANTILES, table)) for table in (PROMPTS, RESPONSES))
        if prompt + response <= MAX_TOKENS:
            rows.append(TrainingRow(random.integers(20, 40_000, prompt + response).tolist(), prompt))
    return rows


def read_rows(base: Path, options: argparse.Namespace, count: int) -> list[TrainingRow]:
    """Return the first rows of a file that are no longer than MAX_TOKENS."""
    from transformers import AutoTokenizer

    from sdft_ray.data.chat import encode_row

    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = (json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines())
    prompts = (("\n\n".join(filter(None, (d[options.prompt], d.get(options.context)))), d) for d in lines)
    encoded = (encode_row(tokenizer, prompt, d[options.response]) for prompt, d in prompts)
    return list(itertools.islice((row for row in encoded if len(row.ids) <= MAX_TOKENS), count))


def start(base: Path, threads: int) -> dict[str, Callable[[Sequence[TrainingRow]], None]]:
    """Return the ways to take one step."""
    logging.disable(logging.WARNING)
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    from sdft_ray.core.packing import assign_passes, pack_rows
    from sdft_ray.progress import quiet_transformers
    from sdft_ray.stages.train import zero
    from sdft_ray.stages.train.adapters import adapt
    from sdft_ray.stages.train.step import take_step

    quiet_transformers()
    torch.set_num_threads(threads)
    os.environ |= WORKER
    deepspeed.ops.__compatible_ops__ = {}
    torch.distributed.init_process_group("gloo")
    settings = training.Train()
    section = wording.validate(compute.Train, {"workers": 1, "cpus": 1})
    engine = zero.start_engine(zero.load_trainable(str(base), settings, section, {}), settings, section, {})
    packed_module = zero.load_trainable(str(base), settings, section, {})
    padded_model = adapt(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), base, settings)

    def adam(module: Any) -> Any:
        return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    packed_adam, padded_adam = adam(packed_module), adam(padded_model)

    def passes(rows: Sequence[TrainingRow]) -> list[list[int]]:
        return assign_passes([len(row.ids) for row in rows], 1, MICRO_BATCH, MICRO_BATCH * MAX_TOKENS)[0]

    def stage(rows: Sequence[TrainingRow]) -> None:
        take_step(engine, rows, [""] * len(rows), passes(rows), 1.0)

    def plain(rows: Sequence[TrainingRow]) -> None:
        for places in passes(rows):
            packed_module(pack_rows([rows[i] for i in places]), [""] * len(places)).sum().backward()
        torch.nn.utils.clip_grad_norm_(packed_module.parameters(), 1.0)
        packed_adam.step()
        packed_adam.zero_grad()

    def padded(rows: Sequence[TrainingRow], width: int | None = None) -> None:
        by_length = sorted(rows, key=lambda row: len(row.ids))
        for i in range(0, len(rows), MICRO_BATCH):
            padded_loss(padded_model, by_length[i : i + MICRO_BATCH], width).backward()
        torch.nn.utils.clip_grad_norm_(padded_model.parameters(), 1.0)
        padded_adam.step()
        padded_adam.zero_grad()

    return {
        "stage": stage,
        "plain": plain,
        "padded": padded,
        "padded to max": lambda rows: padded(rows, MAX_TOKENS),
    }


def padded_loss(model: Any, rows: Sequence[TrainingRow], width: int | None) -> Any:
    """Return the summed loss of rows padded to their longest; the head sees trained positions only, as in packing."""
    import torch

    width = width or max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows])
    inner = model.get_base_model()
    states = inner.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (B, T, D)
    kept = [(i, t) for i, row in enumerate(rows) for t in range(row.trained_from - 1, len(row.ids) - 1)]
    row_of, at = (torch.tensor(part) for part in zip(*kept, strict=True))
    return torch.nn.functional.cross_entropy(inner.lm_head(states[row_of, at]), ids[row_of, at + 1], reduction="sum")


if __name__ == "__main__":
    main()
