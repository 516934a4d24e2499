"""The memory of a training, beside the estimate of `sdft check`.

    python -m benchmarks.memory

It runs two workers on this machine's CPU, each a process, for LoRA and full fine-tuning under the four ZeRO stages, and
measures the peak of a worker's resident memory over three steps, once its engine is ready. The last line is JSON: the
ratio of estimate and measurement, of all eight, by median and range.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from pathlib import Path
from typing import Any

os.environ |= {"TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

from benchmarks.report import median_and_range, print_figures
from sdft_ray import pipeline
from sdft_ray.core.rows import TrainingRow
from sdft_ray.preflight import costs, memory
from sdft_ray.spec import compute, loading, training, wording
from sdft_ray.store.storage import Storage

WORKERS, ROWS, TOKENS, PROMPT = 2, 2, 256, 128


def main() -> None:
    """Measure and print."""
    import torch.multiprocessing as multiprocessing

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("configs/recipes/demo.yaml"), help="for its model")
    parser.add_argument("--root", default="./artifacts", help="where that model is or will be built")
    parser.add_argument("--methods", nargs="+", choices=("lora", "full"), default=("lora", "full"))
    parser.add_argument("--zero-stages", nargs="+", type=int, choices=range(4), default=range(4))
    options = parser.parse_args()
    model, storage = pipeline.chain(loading.load_recipe(options.recipe)).base, Storage(options.root)
    pipeline.build([model], compute.load_compute(), storage)
    base = storage.place(model)
    shape = costs.shape_of_directory(base)
    print(f"{'':12}{'measured':>10}{'estimate':>10}  weights gradients optimizer activations process (GB)")
    ratios = []
    for method in options.methods:
        for zero_stage in options.zero_stages:
            queue = multiprocessing.get_context("spawn").SimpleQueue()
            # A port of its own: the one before may still be closing.
            port = 29500 + zero_stage + 4 * (method == "full") + os.getpid() % 400
            multiprocessing.spawn(measure, (port, base, method, zero_stage, queue), nprocs=WORKERS)
            measured = max(queue.get() for _ in range(WORKERS))
            trained = memory.trainable_parameters(shape, method, training.Lora().rank, "all-linear")
            expected = memory.training_memory(
                shape,
                trained,
                workers=WORKERS,
                zero_stage=zero_stage,
                half=False,
                tokens=ROWS * TOKENS,
                loss_tokens=ROWS * (TOKENS - PROMPT),
            )
            ratios.append(expected.total / measured)
            parts = (
                expected.weights,
                expected.gradients,
                expected.optimizer,
                expected.activations,
                expected.process,
            )
            columns = " ".join(f"{part / 1e9:9.2f}" for part in parts)
            print(
                f"{method} ZeRO-{zero_stage} {measured / 1e9:10.2f}{expected.total / 1e9:10.2f} {columns}", flush=True
            )
    print_figures("memory", {"estimate_over_measured": median_and_range(ratios)})


def measure(rank: int, port: int, base: Path, method: str, zero_stage: int, queue: Any) -> None:
    """Train three steps as one of the workers, and put the peak of this process into the queue."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORKERS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logging.disable(logging.WARNING)
    import deepspeed
    import ray.train  # noqa: F401 - a real worker has it loaded
    import torch

    from sdft_ray.stages.train import zero
    from sdft_ray.stages.train.step import take_step

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__ = {}
    torch.distributed.init_process_group("gloo")
    settings = training.Train(method="lora" if method == "lora" else "full")
    section = wording.validate(compute.Train, {"zero_stage": zero_stage, "cpus": 1})
    engine = zero.start_engine(zero.load_trainable(str(base), settings, section), settings, section, {})
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    rows = [TrainingRow([(7 * i + j) % 40_000 + 17 for j in range(TOKENS)], PROMPT) for i in range(ROWS * WORKERS)]
    for step in range(3):
        keys = [f"{step}/{i}" for i in range(len(rows))]
        take_step(engine, rows, keys, [list(range(rank, len(rows), WORKERS))], 1.0)
    peak = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert peak, "the kernel reports VmHWM"
    queue.put(int(peak[1]) * 1024)
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
