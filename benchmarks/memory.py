"""The memory of a training, beside the estimate of `sdft check`; and how it is shared under ZeRO-3.

    python -m benchmarks.memory
    python -m benchmarks.memory --shares 1 2 4

The first form runs two workers on this machine's CPU, each a process, for LoRA and full fine-tuning under the four
ZeRO stages, and measures the peak of a worker's resident memory over three steps, once its engine is ready. The last
line is JSON: the ratio of estimate and measurement, of all eight, by median and range.
The second makes a Llama of 2 GB and trains it with LoRA under ZeRO-3 by so many workers. It measures the anonymous
memory of the worker that holds most (mapped weight files are not held) while it loads, trains and writes; full
fine-tuning only loads. As many processes score with the model, each a share of the texts, in bfloat16 and block by
block from the files, which are in float32. `zero3_load_over_share`: what loading adds, over model / W.
`zero3_load_over_limit`: all that a worker holds then, over model / W + largest shard + 1 GB.
`score_peak_over_two_blocks`: what scoring adds, over two blocks, embeddings and states. Each of the case with the
highest ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import operator
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

from benchmarks.apart import status_bytes
from benchmarks.report import median_and_range, print_figures
from sdft_ray import pipeline
from sdft_ray.core.rows import TrainingRow
from sdft_ray.models.directory import weight_files
from sdft_ray.preflight import costs, memory
from sdft_ray.spec import compute, loading, training, wording
from sdft_ray.store.storage import Storage

WORKERS, ROWS, TOKENS = 2, 2, 256
TEXTS, TEXT_TOKENS = 8, 128  # that are scored
LIVE = 50_000_000  # elements that ZeRO-3 gathers at once; its usual 1e9 would be the whole of the 2 GB model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("configs/recipes/demo.yaml"), help="for its model")
    parser.add_argument("--root", default="./artifacts", help="where that model is or will be built")
    parser.add_argument("--methods", nargs="+", choices=("lora", "full"), default=("lora", "full"))
    parser.add_argument("--zero-stages", nargs="+", type=int, choices=range(4), default=range(4))
    parser.add_argument("--shares", nargs="+", type=int, metavar="W", help="numbers of workers of the second form")
    options = parser.parse_args()
    if options.shares:
        compare_shares(options.shares, options.methods)
    else:
        compare_estimates(options)


def compare_estimates(options: argparse.Namespace) -> None:
    """Measure the peak of the eight cases, and print them beside the estimate."""
    model, storage = pipeline.chain(loading.load_recipe(options.recipe)).base, Storage(options.root)
    pipeline.build([model], compute.load_compute(), storage)
    base = storage.place(model)
    shape = costs.shape_of_directory(base)
    print(f"{'':12}{'measured':>10}{'estimate':>10}  weights gradients optimizer activations process (GB)")
    ratios = []
    for method in options.methods:
        for zero_stage in options.zero_stages:
            measured = max(run_workers(measure, WORKERS, base, method, zero_stage))
            trained = memory.trainable_parameters(shape, method, training.Lora().rank, "all-linear")
            expected = memory.training_memory(
                shape,
                trained,
                workers=WORKERS,
                zero_stage=zero_stage,
                half=False,
                tokens=ROWS * TOKENS,
                loss_tokens=ROWS * TOKENS // 2,
            )
            ratios.append(expected.total / measured)
            columns = " ".join(f"{part / 1e9:9.2f}" for part in dataclasses.astuple(expected))
            print(
                f"{method} ZeRO-{zero_stage} {measured / 1e9:10.2f}{expected.total / 1e9:10.2f} {columns}", flush=True
            )
    print_figures("memory", {"estimate_over_measured": median_and_range(ratios)})


def run_workers(function: Any, workers: int, *arguments: Any) -> list[Any]:
    """Return what a function returns in each of some joined processes, by rank; forks of one that has the libraries."""
    import torch.multiprocessing as multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "transformers", "peft", "deepspeed", "ray.train"])
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        given = (workers, folder, function, queue, *arguments)
        multiprocessing.start_processes(_join, given, nprocs=workers, start_method="forkserver")
        return [result for _, result in sorted((queue.get() for _ in range(workers)), key=operator.itemgetter(0))]


def _join(rank: int, workers: int, folder: str, function: Any, queue: Any, *arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    logging.disable(logging.WARNING)
    import deepspeed
    import ray.train  # noqa: F401 - a real worker has it loaded
    import torch

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__ = {}
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)
    queue.put((rank, function(rank, workers, *arguments)))
    torch.distributed.barrier()


def measure(rank: int, workers: int, base: Path, method: str, zero_stage: int) -> int:
    """Train three steps as one of the workers, and return the peak of this process."""
    from sdft_ray.stages.train import zero

    settings = training.Train(method="lora" if method == "lora" else "full")
    section = wording.validate(compute.Train, {"zero_stage": zero_stage, "cpus": 1})
    module = zero.load_trainable(str(base), settings, section, {})
    engine = zero.start_engine(module, settings, section, {})
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    take_steps(engine, rank, workers, 3, TOKENS)
    return status_bytes("VmHWM")


def take_steps(engine: Any, rank: int, workers: int, count: int, tokens: int) -> None:
    """Take some steps of ROWS rows a worker, half of whose tokens have loss."""
    from sdft_ray.stages.train.step import take_step

    rows = [TrainingRow([(7 * i + j) % 20_000 + 17 for j in range(tokens)], tokens // 2) for i in range(ROWS * workers)]
    for step in range(count):
        keys = [f"{step}/{i}" for i in range(len(rows))]
        take_step(engine, rows, keys, [list(range(rank, len(rows), workers))], 1.0)


# --- shares -----------------------------------------------------------------------------------------------------


def compare_shares(counts: list[int], methods: list[str]) -> None:
    """Measure a model of 2 GB under ZeRO-3 by each number of workers, and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "model"
        run_workers(make_model, 1, base)
        sizes = [path.stat().st_size for path in weight_files(base)]
        print(f"model {sum(sizes) / 1e9:.2f} GB, largest shard {max(sizes) / 1e9:.2f}; anonymous GB of a worker")
        print(
            f"{'':22}{'before':>8}{'load':>8}{'loaded':>8}{'train':>8}{'write':>8}{'score':>8}{'share':>8}{'limit':>8}"
        )
        over_share, over_limit, over_blocks = [], [], []
        for workers in counts:
            for method in methods:
                each = run_workers(measure_shares, workers, base, method, 3, {})
                most = {phase: max(one[phase] for one in each) for phase in each[0]}
                share = sum(sizes) / workers
                limit = share + max(sizes) + 1e9
                _print_row(f"ZeRO-3 {method} W={workers}", most, share, limit)
                over_share.append((most["load"] - most["before"]) / share)
                over_limit.append(most["load"] / limit)
            each = run_workers(measure_scoring, workers, base, True)
            most = max(each, key=lambda one: one["score"])
            _print_row(f"streamed W={workers}", most, sum(sizes) / 2, most["before"] + most["limit"])
            over_blocks.append(max((one["score"] - one["before"]) / one["limit"] for one in each))
        for zero_stage, given in ((3, {"zero_hpz_partition_size": 1}), (1, {})):  # the first loads it whole
            each = run_workers(measure_shares, 2, base, "lora", zero_stage, given)
            for number, one in enumerate(each):
                _print_row(f"whole, ZeRO-{zero_stage}, rank {number}", one, sum(sizes), 0)
        _print_row("resident W=1", run_workers(measure_scoring, 1, base, False)[0], sum(sizes) / 2, 0)
    figures = {"zero3_load_over_share": max(over_share), "zero3_load_over_limit": max(over_limit)}
    figures |= {"score_peak_over_two_blocks": max(over_blocks)}
    print_figures("memory_shares", {name: round(figure, 4) for name, figure in figures.items()})


def _print_row(name: str, phases: dict[str, int], share: float, limit: float) -> None:
    columns = [phases.get(phase, 0) for phase in ("before", "load", "loaded", "train", "write", "score")]
    print(f"{name:22}" + "".join(f"{value / 1e9:8.2f}" for value in (*columns, share, limit)), flush=True)


def make_model(_rank: int, _workers: int, directory: Path) -> None:
    """Write a Llama of 0.5 billion random parameters in float32, in files of at most 500 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=10,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="500MB")


def measure_shares(
    rank: int, workers: int, base: Path, method: str, zero_stage: int, spread: dict[str, int]
) -> dict[str, int]:
    """Load, train and write as one of the workers; return the peak of anonymous bytes in each phase."""
    import torch
    from safetensors.torch import save_file

    from sdft_ray.stages.train import state, zero

    settings = training.Train(method="lora" if method == "lora" else "full")
    section = wording.validate(compute.Train, {"zero_stage": zero_stage, "cpus": 1})
    limits = {"stage3_max_live_parameters": LIVE, "stage3_prefetch_bucket_size": LIVE, "reduce_bucket_size": LIVE}
    given = {"zero_optimization": limits | spread}
    phases: dict[str, int] = {"before": anonymous_bytes()}
    with _peak_of(phases, "load"):
        module = zero.load_trainable(str(base), settings, section, given)
    phases["loaded"] = anonymous_bytes()
    if method == "full":  # with gradients and moments it holds eight times the model
        return phases
    with _peak_of(phases, "train"):
        engine = zero.start_engine(module, settings, section, given)
        take_steps(engine, rank, workers, 1, 16)
    with _peak_of(phases, "write"), tempfile.TemporaryDirectory() as folder:
        state.save_state(engine, Path(folder), {})
        save_file(dict(state.share_of_weights(engine, torch.zeros(1))), Path(folder) / "tuned.safetensors")
    return phases


def measure_scoring(rank: int, workers: int, base: Path, streamed: bool) -> dict[str, int]:
    """Score a share of the texts; return the peak of anonymous bytes, and what it may add to those before."""
    from sdft_ray.stages.score import Scorer

    phases = {"before": anonymous_bytes()}
    texts = [([(7 * i + j) % 20_000 + 17 for j in range(TEXT_TOKENS)], TEXT_TOKENS - 1) for i in range(TEXTS)]
    with _peak_of(phases, "score"):
        scorer = Scorer(lambda: base, "bfloat16", "cpu", streamed)
        for _ in scorer([[text] for text in texts[rank::workers]]):
            pass
    shape = costs.shape_of_directory(base)
    held = 2 * shape.block_parameters + shape.vocabulary * shape.width
    states = memory.state_bytes(shape, 2, TEXT_TOKENS * len(texts[rank::workers]))
    return phases | {"limit": 2 * held + states}


@contextlib.contextmanager
def _peak_of(phases: dict[str, int], phase: str) -> Iterator[None]:
    """Note the most anonymous memory during a phase, looked at a hundred times a second."""
    over, seen = threading.Event(), [anonymous_bytes()]

    def watch() -> None:
        while not over.wait(0.01):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        phases[phase] = max(*seen, anonymous_bytes())


def anonymous_bytes() -> int:
    """Return the resident memory of this process that is of no file."""
    return status_bytes("RssAnon")


if __name__ == "__main__":
    main()
