"""The cost of a ledger at scale: writing it, merging its pieces, finding lines in it, and resuming from it.

    python -m benchmarks.ledger --lines 1000000  # a minute or two on two cores; 10000000: a quarter of an hour, 10 GB

A piece has 2,048 lines of 400 characters, as a batch leaves them. `lookup` finds the lines of 100,000 rows that lie
anywhere in the ledger; `resume` decides for every row whether it needs the engine, as a killed run does that had
generated all of them. Both are the stage's own functions, on Ray where the stage would use it. The last line is JSON:
seconds of each, and the peak memory of this process and of the largest that it started.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.apart import measure_apart, peak_mb
from benchmarks.report import print_figures
from benchmarks.scale import make_row, rows_stage, write_rows
from sdft_ray.cluster import ray_cluster
from sdft_ray.results import training_batches
from sdft_ray.spec.compute import load_compute
from sdft_ray.stages.distill.dealing import RowId, deal
from sdft_ray.stages.distill.draws import Settings, instruction_template
from sdft_ray.stages.distill.requests import write_requests
from sdft_ray.stages.distill.spread import Folder, ranges_of
from sdft_ray.store import ledger as ledgers
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

STEPS = ("write", "compact", "lookup", "resume")
LOOKUP_ROWS = 100_000
_PIECE_LINES = 2048


def main() -> None:
    """Measure each step in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--root", type=Path, help="where rows and ledger stay for a further run (default: nowhere)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--step", nargs=2, metavar=("STEP", "ROOT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(take(options.step[0], options.lines, Path(options.step[1]))))
        return
    figures: dict[str, float] = {"lines": options.lines}
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        location = rows_stage(options.lines, root).location
        if location and not location.exists():
            write_rows(options.lines, str(root))
        for step in options.steps:
            costs = measure_apart("benchmarks.ledger", "--lines", options.lines, "--step", step, root)
            print(f"{step}: {costs}", flush=True)
            largest = max(costs["peak_mb"], costs["largest_mb"])
            figures |= {f"{step}_seconds": costs["seconds"], f"{step}_peak_mb": largest}
            figures[f"{step}_cpu_seconds"] = costs["cpu_seconds"]
    print_figures("ledger", figures)


def take(step: str, lines: int, root: Path) -> dict[str, float]:
    """Return the seconds that a step takes, and the peak memory of this process."""
    storage = Storage(str(root))
    ledger = storage.ledger("made-0")
    begun = time.monotonic()
    if step == "write":
        for number, start in enumerate(range(0, lines, _PIECE_LINES)):
            some = [make_line(i) for i in range(start, min(start + _PIECE_LINES, lines))]
            ledgers.write_piece(ledger, f"{number:012x}", some)
    elif step == "compact":
        ledgers.compact(ledger)
    else:
        with ray_cluster(load_compute()):
            begun = time.monotonic()
            look(step, lines, storage)
    seconds = time.monotonic() - begun
    return {"seconds": round(seconds, 1), "peak_mb": peak_mb()}


def make_line(number: int) -> ledgers.Line:
    """Return the line of a row."""
    text = hashlib.shake_128(str(number).encode()).hexdigest(200)
    return ledgers.Line(make_row(number).id, 0, text, "stop", 200, 120, number)


def look(step: str, lines: int, storage: Storage) -> None:
    """Find the lines of some rows, or decide for all rows whether they need the engine."""
    folder = Folder(storage, Stage("distill", "made", 1, {}), f"{step}-files")
    ledger, rows = storage.ledger("made-0"), rows_stage(lines, storage.root).location
    assert rows
    try:
        if step == "lookup":
            chance = random.Random(0)
            wanted = [RowId(make_row(chance.randrange(lines)).id) for _ in range(LOOKUP_ROWS)]
            ranges = ranges_of(len(wanted))
            dealt = deal(folder, ledger, ranges, functools.partial(list, [wanted]))
            for some in ranges:
                ids = [row.id for row in wanted[some.start : some.stop]]
                assert all(dealt.lines_of(some.number, ids).values()), "each has its line"
        else:
            ranges = ranges_of(lines)
            dealt = deal(folder, ledger, ranges, functools.partial(ids_of, rows))
            settings = Settings(answer="none", rows=None)
            template = instruction_template(settings)
            requests = write_requests(folder, functools.partial(Path, rows), ranges, dealt, settings, template)
            assert not requests.missing, "nothing is generated again"
    finally:
        folder.drop()


def ids_of(rows: Path) -> Iterator[list[RowId]]:
    """Return the ids of all rows, some at a time."""
    return training_batches(rows, None, RowId)


if __name__ == "__main__":
    main()
