"""What soft targets cost: a step of `logits` beside a step of `distilled`: `python -m benchmarks.soft`.

    python -m benchmarks.soft --span 14:19 --span 12:22 [--rows F.jsonl --prompt question --response answer]

One worker, LoRA, float32, the demo's model without the blocks of a span, as `sdft run` trains it. Steps on the same
rows, in alternation in one process: with the token itself as the target (`distilled`), with the base beside the student
(`online`), and with the base's 20 likeliest tokens from memory (`offline`). Both processor and wall seconds are taken;
where other work is on the machine, one thread and processor seconds say more. The last line is JSON: by span the ratios
to `distilled`, and processor seconds of the teacher's pass in a step of `online` and of the loss in one of `offline`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import median_and_range, print_figures
from benchmarks.train import BATCH, MAX_TOKENS, MICRO_BATCH, WORKER, draw_rows, read_rows
from sdft_ray import pipeline
from sdft_ray.core.rows import TrainingRow
from sdft_ray.spec import compute, loading, training, wording
from sdft_ray.spec.recipe import Recipe
from sdft_ray.store.storage import Storage

Way = Callable[[], None]
LIKELIEST = 20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("configs/recipes/demo.yaml"), help="for its model")
    parser.add_argument("--root", default="./artifacts", help="where models are or will be built")
    parser.add_argument("--span", action="append", default=[], metavar="START:STOP", help="(default: 14:19)")
    parser.add_argument("--rows", type=Path, help="rows of a .jsonl file instead of Dolly's lengths")
    parser.add_argument("--prompt", default="instruction")
    parser.add_argument("--response", default="response")
    parser.add_argument("--context", default="context")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=BATCH, help="rows of a step")
    parser.add_argument("--threads", type=int, default=compute.cores())
    options = parser.parse_args()
    _join(options.threads)
    figures: dict[str, Any] = {}
    for span in options.span or ["14:19"]:
        base, pruned, removed = _cut(options, span)
        rows = read_rows(base, options, options.batch) if options.rows else draw_rows(options.batch)
        trained = sum(len(row.ids) - row.trained_from for row in rows)
        print(f"[{span}) {len(rows)} rows, {sum(len(row.ids) for row in rows)} tokens, {trained} of them trained")
        ways, parts = _start(base, pruned, removed, rows)
        figures |= {f"{span} {name}": value for name, value in _measure(ways, parts, options.runs).items()}
    print_figures("soft", figures)


def _measure(ways: dict[str, Way], parts: dict[str, list[float]], runs: int) -> dict[str, Any]:
    """Return the ratios of the ways to `distilled` in alternating runs."""
    for way in ways.values():  # once, to warm up
        way()
    parts.update({name: [] for name in parts})
    clocks = {"cpu": time.process_time, "wall": time.perf_counter}
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in ways} for clock in clocks}
    for _ in range(runs):
        for name, way in ways.items():
            begun = {clock: read() for clock, read in clocks.items()}
            way()
            for clock, read in clocks.items():
                seconds[clock][name].append(read() - begun[clock])
    figures: dict[str, Any] = {}
    for clock, taken in seconds.items():
        for name, each in taken.items():
            print(f"{clock:5} {name:10} " + " ".join(f"{value:7.2f}" for value in each) + " s a step")
        for name in ("online", "offline"):
            pairs = zip(taken[name], taken["distilled"], strict=True)
            figures[f"{name}_over_distilled_{clock}"] = median_and_range([ours / plain for ours, plain in pairs])
    for name, each in parts.items():
        figures[f"{name}_cpu_seconds"] = round(sum(each) / runs, 3)
    figures["distilled_cpu_seconds"] = round(statistics.mean(seconds["cpu"]["distilled"]), 3)
    return figures


def _cut(options: argparse.Namespace, span: str) -> tuple[Path, Path, range]:
    """Return the base, the base without the blocks of a span, and these."""
    removed = range(*map(int, span.split(":")))
    recipe = loading.load_recipe(options.recipe).model_dump(mode="json")
    recipe["prune"] = {"remove": [*removed]}
    chain, storage = pipeline.chain(wording.validate(Recipe, recipe)), Storage(options.root)
    pipeline.build([chain.base, chain.pruned], compute.load_compute(), storage)
    return storage.place(chain.base), storage.place(chain.pruned), removed


def _join(threads: int) -> None:
    """Be the one worker of a training."""
    os.environ |= WORKER
    import deepspeed
    import torch

    from sdft_ray.progress import quiet_transformers

    quiet_transformers()
    torch.set_num_threads(threads)
    deepspeed.ops.__compatible_ops__ = {}
    torch.distributed.init_process_group("gloo")


def _start(
    base: Path, pruned: Path, removed: range, rows: Sequence[TrainingRow]
) -> tuple[dict[str, Way], dict[str, list[float]]]:
    """Return the ways to take a step, and where the processor seconds of the parts of `online` are noted."""
    from sdft_ray.core import soft_targets
    from sdft_ray.core.packing import assign_passes, pack_rows
    from sdft_ray.stages.train import zero
    from sdft_ray.stages.train.step import take_step
    from sdft_ray.stages.train.teacher import Softener, Teacher

    settings = training.Train()
    section = wording.validate(compute.Train, {"workers": 1, "cpus": 1})
    module = zero.load_trainable(str(pruned), settings, section, {})
    engine = zero.start_engine(module, settings, section, {})
    teacher = Teacher(base, settings.dtype, "cpu")
    teacher.share(module.model, removed)
    likeliest = [soft_targets.find_likeliest(teacher.logits(pack_rows([row])), LIKELIEST, 1.0) for row in rows]
    stored = [soft_targets.SoftRow(row.ids, row.trained_from, each) for row, each in zip(rows, likeliest, strict=True)]
    parts: dict[str, list[float]] = {"teacher": [], "soft_loss": []}

    def timed(part: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            begun = time.process_time()
            result = act(*given)
            parts[part].append(time.process_time() - begun)
            return result

        return run

    soft = training.Soft()
    online = Softener(soft, teacher)
    teacher.logits = timed("teacher", teacher.logits)  # type: ignore[method-assign]
    offline = timed("soft_loss", Softener(training.Soft(likeliest=LIKELIEST), None))
    passes = assign_passes([len(row.ids) for row in rows], 1, MICRO_BATCH, MICRO_BATCH * MAX_TOKENS)[0]

    def step(given: Sequence[TrainingRow], soften: Any) -> Way:
        def take() -> None:
            module.soften = soften
            take_step(engine, given, [""] * len(given), passes, 1.0)

        return take

    return {"distilled": step(rows, None), "online": step(rows, online), "offline": step(stored, offline)}, parts


if __name__ == "__main__":
    main()
