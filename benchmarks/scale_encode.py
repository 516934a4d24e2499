"""The cost of turning training rows into token ids: rows per second, memory, and the driver's share of the work.

    python -m benchmarks.scale_encode                 # 10,000 and 1,000,000 rows, about 10 minutes on two cores

The rows are those of the demo, over and over, each with a number of its own, in the demo's tokenizer. Each number of
rows has a process of its own. Seconds are those of the encoding with the start of its tasks, without that of Ray. Peaks
are VmHWM: of the driver at the end, and of the largest process that it or Ray started. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}

from benchmarks.apart import measure_apart, peak_mb
from benchmarks.report import print_figures
from sdft_ray import pipeline
from sdft_ray.core.rows import Row
from sdft_ray.progress import Progress
from sdft_ray.results import read_split
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.loading import load_recipe
from sdft_ray.spec.recipe import Recipe
from sdft_ray.stages import Work, train
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

RECIPE = Path("configs/recipes/demo.yaml")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--measure", nargs=2, metavar=("ROWS", "ROOT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(int(options.measure[0]), Path(options.measure[1]))
        return
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        chain = pipeline.chain(load_recipe(RECIPE))
        pipeline.build([chain.base, chain.rows], load_compute(), Storage(folder))
        for count in sorted(options.rows):
            write = f"from benchmarks import scale_encode as s; s.write_rows({count}, s.Path({folder!r}))"
            subprocess.run([sys.executable, "-c", write], check=True)
            measured = measure_apart("benchmarks.scale_encode", "--measure", count, folder)
            print(f"{count} rows: {measured}", flush=True)
            figures |= {f"{name}_at_{count}": value for name, value in measured.items()}
    print_figures("scale_encode", figures)


def measure(count: int, root: Path) -> None:
    """Encode so many rows and print the cost as a line of JSON."""
    from transformers import AutoTokenizer

    from sdft_ray.cluster import ray_cluster
    from sdft_ray.stages.train.prepare import encode_split

    recipe, compute, storage = load_recipe(RECIPE), load_compute(), Storage(str(root))
    work = Work(train_stage(recipe, count, root), storage, compute, Progress("train", "steps"))
    tokenizer = AutoTokenizer.from_pretrained(work.input("model"))
    with ray_cluster(compute):
        begun, cpu = time.monotonic(), time.process_time()
        tally = encode_split(work, tokenizer, "train")
        seconds, cpu_seconds = time.monotonic() - begun, time.process_time() - cpu
    assert tally.rows + tally.rows_left_out == count
    costs = {
        "rows_per_second": round(count / seconds),
        "driver_peak_mb": peak_mb(),
        "driver_cpu_ms_per_row": round(1000 * cpu_seconds / count, 4),
        "tokens_per_row": round(tally.tokens / tally.rows, 1),
    }
    print(json.dumps(costs))


def train_stage(recipe: Recipe, count: int, root: Path) -> Stage[Any]:
    """Return the stage that trains the base of the recipe on the rows that `write_rows` wrote."""
    rows: Stage[Any] = Stage("rows", "made", 1, {"rows": count}, location=root / f"rows-{count}")
    settings = recipe.train.model_copy(update={"rows": None})
    return train.stage(settings, "sft", pipeline.chain(recipe).base, [{"rows": rows}])


def write_rows(count: int, root: Path) -> None:
    """Write the training rows of the recipe, over and over, some at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = read_split(Storage(str(root)).place(pipeline.chain(load_recipe(RECIPE)).rows), "train", Row)
    folder = root / f"rows-{count}"
    folder.mkdir()
    schema = pa.schema([(name, pa.string()) for name in ("id", "prompt", "reference")])
    with pq.ParquetWriter(folder / "train.parquet", schema) as file:
        for start in range(0, count, 10_000):
            made = [
                {"id": f"{i:016x}", "prompt": f"{i}. {row.prompt}", "reference": row.reference}
                for i in range(start, min(start + 10_000, count))
                for row in [known[i % len(known)]]
            ]
            file.write_table(pa.Table.from_pylist(made, schema))


if __name__ == "__main__":
    main()
