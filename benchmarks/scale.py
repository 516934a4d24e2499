"""The cost of the distill stage itself with an engine that costs nothing: memory, rows per second, processor time.

    python -m benchmarks.scale                   # 1,000 and 100,000 rows, a few minutes on two cores

The fake engine answers at once, with texts as long as real ones; the tokenizer is the demo's. Each number of rows has a
process of its own, beside which its parent looks at the memory and processor time of it and of all that it starts. The
last line is JSON: `driver_peak_growth` is the driver's peak at the most rows over that at the fewest,
`largest_process_mb_at_N` the peak of any other process, `rows_per_second` holds all starts; `…_beyond_start` and
`cpu_ms_per_row` (of all processes) are of the rows that the most have more than the fewest. `driver_ms_per_row` is the
driver's processor time at the most rows, starts included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.apart import measure_apart, peak_mb
from benchmarks.report import print_figures
from sdft_ray import pipeline
from sdft_ray.core.rows import Row
from sdft_ray.core.selection import Generation
from sdft_ray.data.readers import FileContent
from sdft_ray.engine import Request
from sdft_ray.spec.compute import Endpoint, EngineOptions, load_compute
from sdft_ray.spec.loading import load_recipe
from sdft_ray.spec.recipe import Distill
from sdft_ray.spec.sources import FileRows
from sdft_ray.spec.wording import validate
from sdft_ray.stages import distill, rows
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100000])
    parser.add_argument("--measure", nargs=2, metavar=("ROWS", "ROOT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(int(options.measure[0]), Path(options.measure[1]))
        return
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(Path("configs/recipes/demo.yaml"))
        pipeline.build([pipeline.chain(recipe).base], load_compute(), Storage(folder))
        for count in sorted(options.rows):
            measured[count] = measure_apart("benchmarks.scale", "--measure", count, folder)
            print(f"{count} rows: {measured[count]}", flush=True)
    fewest, most = measured[min(measured)], measured[max(measured)]
    more = max(measured) - min(measured)
    figures: dict[str, Any] = {"driver_peak_growth": round(most["peak_mb"] / fewest["peak_mb"], 3)}
    figures |= {f"driver_peak_mb_at_{count}": costs["peak_mb"] for count, costs in measured.items()}
    figures |= {f"largest_process_mb_at_{count}": costs["largest_mb"] for count, costs in measured.items()}
    figures |= {"rows_per_second": round(max(measured) / most["seconds"], 1)}
    figures |= {"driver_ms_per_row": round(1000 * most["driver_cpu_seconds"] / max(measured), 4)}
    if more:
        figures["rows_per_second_beyond_start"] = round(more / (most["seconds"] - fewest["seconds"]), 1)
        figures["cpu_ms_per_row"] = round(1000 * (most["cpu_seconds"] - fewest["cpu_seconds"]) / more, 4)
    print_figures("scale", figures)


def measure(count: int, root: Path) -> None:
    """Generate so many rows and print the cost as a line of JSON."""
    write = [sys.executable, "-c", f"from benchmarks import scale; scale.write_rows({count}, {str(root)!r})"]
    subprocess.run(write, check=True)
    recipe = load_recipe(Path("configs/recipes/demo.yaml"))
    storage = Storage(str(root))
    made = rows_stage(count, root)
    stage = distill.stage(recipe.distill, pipeline.chain(recipe).base, made, {"made": made.settings.origin}, None)
    (root / "compute.yaml").write_text(json.dumps({"distill": {"actors": 2, "cpus": 1}}))
    begun, cpu = time.monotonic(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    pipeline.build([stage], load_compute(root / "compute.yaml"), storage, engine=FakeEngine)
    costs = {"seconds": time.monotonic() - begun}
    costs["driver_cpu_seconds"] = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - cpu
    assert storage.manifest(stage).summary["kept"] == count
    costs["peak_mb"] = peak_mb()
    print(json.dumps({name: round(value, 2) for name, value in costs.items()}))


class FakeEngine:
    """Answers at once."""

    def __init__(self, model: str, settings: Distill, options: EngineOptions | Endpoint, alone: bool) -> None:
        pass

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Generation]]:
        """Yield each request with a text of its own."""
        for request in requests:
            words = " ".join(f"word{(request.sampling_seed or 0) + i}" for i in range(30))
            yield request, Generation(words, "stop", len(request.prompt_ids), 120)


def rows_stage(count: int, root: Path) -> Stage[rows.Settings]:
    """Return the finished stage of the rows."""
    file = {"path": "made.jsonl", "fields": {"prompt": "prompt", "response": "reference"}, "answer": "none"}
    origin = validate(FileRows, file)
    settings = rows.Settings(
        source=FileContent(sha256=str(count), fields=origin.fields),
        split=rows.Split(limit=None, held_out=0, validation=0, seed=0, answer=origin.answer),
        origin=origin,
    )
    return Stage("rows", "made", rows.VERSION, settings, location=root / f"rows-{count}")


def write_rows(count: int, root: str) -> None:
    """Write the rows, each with a prompt of 250 and a reference of 300 characters, some at a time."""
    directory = rows_stage(count, Path(root)).location
    assert directory
    directory.mkdir()
    rows.write_splits(directory, rows.Splits([], [], []))
    schema = pq.read_schema(directory / "train.parquet")
    with pq.ParquetWriter(directory / "train.parquet", schema) as file:
        for start in range(0, count, 4096):
            some = [make_row(i)._asdict() for i in range(start, min(start + 4096, count))]
            file.write_table(pa.Table.from_pylist(some, schema))


def make_row(number: int) -> Row:
    """Return a row with its id."""
    words = " and so on" * 22
    row = Row(f"Row {number}{words}?", f"Row {number}{words}, it is, and so it goes on for longer.")
    return row._replace(id=row.content_id)


if __name__ == "__main__":
    main()
