"""The cost of the stage rows: rows per second, and the memory of the driver and of the largest process.

    python -m benchmarks.scale_rows                                  # 10,000 and 1,000,000 rows: two minutes
    python -m benchmarks.scale_rows --rows 10000 10000000            # 10 minutes, 25 GB of disk

Rows of about 660 bytes as JSON lines, each with a number that is checked. Each number of rows has a process of its own.
Ray reads all of them, also where there are so few that the stage would not start it, so that peaks are compared of the
same work; `seconds` are those of the stage without the start of Ray, which takes the same time however many rows there
are. Peaks are those of each process (VmHWM, which counts mapped files and shared memory, too), seen until it ends. The
last line is JSON: `rows_memory_growth` is the peak of the largest process at the most rows over that at the fewest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.apart import measure_apart, peak_mb
from benchmarks.report import print_figures
from sdft_ray.cluster import ray_cluster
from sdft_ray.progress import Progress
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.sources import FileRows
from sdft_ray.spec.wording import validate
from sdft_ray.stages import Work, rows
from sdft_ray.store.storage import Storage

_WORDS = ("the", "cat", "sat", "on", "mats", "while", "she", "sold", "apples", "each", "day", "and", "pencils")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--measure", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure))
        return
    measured: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in sorted(options.rows):
            file = write_rows(count, Path(folder, f"{count}.jsonl"))
            costs = measure_apart("benchmarks.scale_rows", "--measure", file)
            peak = max(costs["driver_peak_gb"], costs.pop("largest_mb") * 2**20 / 1e9)
            measured[count] = costs | {"peak_gb": round(peak, 3)}
            print(f"{count} rows: {measured[count]}", flush=True)
            file.unlink()
    fewest, most = measured[min(measured)], measured[max(measured)]
    figures: dict[str, Any] = {"rows_memory_growth": round(most["peak_gb"] / fewest["peak_gb"], 3), **most}
    print_figures("scale_rows", figures | {f"peak_gb_at_{count}": each["peak_gb"] for count, each in measured.items()})


def measure(file: Path) -> None:
    """Build the stage on a file and print the cost as a line of JSON."""
    fields = {"prompt": "question", "response": "answer"}
    source = validate(FileRows, {"path": str(file), "fields": fields, "held_out": 100, "validation": 32})
    root, compute = file.with_suffix(""), load_compute()
    with ray_cluster(compute):
        work = Work(rows.stage(source, "offline"), Storage(str(root)), compute, Progress("rows"))
        begun, begun_cpu = time.monotonic(), time.process_time()
        with work.progress:
            summary = rows.build(work, rows.Sizes(large=1))
        seconds, cpu = time.monotonic() - begun, time.process_time() - begun_cpu
    shutil.rmtree(root)
    costs = {
        "rows_per_second": round(summary.read / seconds),
        "driver_ms_per_row": round(1000 * cpu / summary.read, 4),
        "driver_peak_gb": round(peak_mb() * 2**20 / 1e9, 3),
        "seconds": round(seconds, 1),
        "kept": sum(summary.rows.model_dump().values()),
    }
    print(json.dumps(costs))


def write_rows(count: int, file: Path) -> Path:
    """Write rows of about 660 bytes, of which one in a hundred repeats the prompt of another one."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(_WORDS, k=58)) for _ in range(1000)]
    with file.open("w") as lines:
        for i in range(count):
            number = i if i % 100 else i // 2
            question = f"Row {number}: {texts[number % 1000]}. What is {number} + {number}?"
            answer = f"{texts[(number + i) % 997]}, so it is {2 * number}.\n#### {2 * number}"
            lines.write(json.dumps({"question": question, "answer": answer}) + "\n")
    return file


if __name__ == "__main__":
    main()
