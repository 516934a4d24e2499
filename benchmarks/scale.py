"""The cost of the distill stage itself with an engine that costs nothing: the driver's memory, and rows per second.

    python -m benchmarks.scale                   # 1,000 and 100,000 rows, about 10 minutes on two cores

The fake engine answers at once, with texts as long as real ones. Each number of rows has a process of its own, whose
peak memory is read at its end, without that of Ray and the actors. The last line is JSON:
`driver_peak_growth` is the peak at the most rows over the peak at the fewest, `rows_per_second` holds engine start too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.report import print_figures
from sdft_ray import pipeline
from sdft_ray.core.rows import Row
from sdft_ray.core.selection import Generation
from sdft_ray.data.readers import FileContent
from sdft_ray.engine import Request
from sdft_ray.spec.compute import load_compute
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
            again = [sys.executable, "-m", "benchmarks.scale", "--measure", str(count), folder]
            done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True)
            measured[count] = json.loads(done.stdout.splitlines()[-1])
            print(f"{count} rows: {measured[count]}", flush=True)
    fewest, most = measured[min(measured)], measured[max(measured)]
    figures: dict[str, Any] = {"driver_peak_growth": round(most["peak_mb"] / fewest["peak_mb"], 3)}
    figures |= {f"driver_peak_mb_at_{count}": costs["peak_mb"] for count, costs in measured.items()}
    print_figures("scale", figures | {"rows_per_second": most["rows_per_second"]})


def measure(count: int, root: Path) -> None:
    """Generate so many rows and print the cost as a line of JSON."""
    write = [sys.executable, "-c", f"from benchmarks import scale; scale.write_rows({count}, {str(root)!r})"]
    subprocess.run(write, check=True)
    recipe = load_recipe(Path("configs/recipes/demo.yaml"))
    storage = Storage(str(root))
    made = rows_stage(count, root)
    stage = distill.stage(recipe.distill, pipeline.chain(recipe).base, made, {"made": made.settings.origin}, None)
    (root / "compute.yaml").write_text(json.dumps({"distill": {"actors": 2, "cpus": 1}}))
    begun = time.monotonic()
    pipeline.build([stage], load_compute(root / "compute.yaml"), storage, engine=FakeEngine)
    seconds = time.monotonic() - begun
    assert storage.manifest(stage).summary["kept"] == count
    # Not getrusage: its maximum is inherited from the process that started this one.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    peak_mb = int(peak) / 1024
    print(json.dumps({"peak_mb": round(peak_mb), "rows_per_second": round(count / seconds, 1)}))


class FakeEngine:
    """Answers at once."""

    def __init__(self, model: str, settings: Distill, options: Mapping[str, Any], alone: bool) -> None:
        pass

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Generation]]:
        """Yield each request with a text of its own."""
        for request in requests:
            words = " ".join(f"word{request.sampling_seed + i}" for i in range(30))
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
    """Write the rows, each with a prompt of 250 and a reference of 300 characters."""
    words = " and so on" * 22
    made = (Row(f"Row {i}{words}?", f"Row {i}{words}, it is, and so it goes on for longer.") for i in range(count))
    directory = rows_stage(count, Path(root)).location
    assert directory
    directory.mkdir()
    train = [row._replace(id=row.content_id) for row in made]
    rows.write_splits(directory, {"held_out": [], "validation": [], "train": train})


if __name__ == "__main__":
    main()
