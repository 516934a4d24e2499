"""How long engines stand idle in the stage distill, with four fake ones that take time: `python -m benchmarks.idle`.

In: nothing; rows whose references have a long tail of lengths, like answers of people. Out: the share of the pool's
time that is lost at the end, until an engine has started, and between batches, of the time from the first request to
the last answer, as the last line. An engine answers 16 requests at once, a token of each in 4 ms, and waits for that
time: so four fit on one core. How many tokens a row takes is the length of its prompt, most of which is the reference,
times a random factor. Ray has as many CPUs as the engines ask for, whatever the machine has. Takes about 2 minutes.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.report import median_and_range, print_figures
from benchmarks.scale import rows_stage
from sdft_ray import pipeline
from sdft_ray.core.rows import Row
from sdft_ray.core.selection import Generation
from sdft_ray.engine import Request
from sdft_ray.spec.compute import Endpoint, EngineOptions, load_compute
from sdft_ray.spec.loading import load_recipe
from sdft_ray.spec.recipe import Distill
from sdft_ray.stages import distill, rows
from sdft_ray.store.storage import Storage

ENGINES, AT_ONCE, SECONDS_A_TOKEN = 4, 16, 0.004


class FakeEngine:
    """Answers so many requests at once, and takes its time."""

    def __init__(self, model: str, settings: Distill, options: EngineOptions | Endpoint, alone: bool) -> None:
        self.log = Path(os.environ["IDLE_LOG"]) / f"{settings.seed}-{os.getpid()}.txt"

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Generation]]:
        """Yield each request when its last token would be there; write down when that began and ended."""
        begun, waiting, at_work = time.time(), [*requests], list[tuple[int, int, Request]]()
        tokens = 0  # since this began, of every request at work
        while waiting or at_work:
            while waiting and len(at_work) < AT_ONCE:
                request = waiting.pop(0)
                heapq.heappush(at_work, (tokens + _length(request), len(waiting), request))
            tokens, _, request = heapq.heappop(at_work)
            time.sleep(max(0.0, begun + tokens * SECONDS_A_TOKEN - time.time()))
            yield request, Generation("So it is.", "stop", len(request.prompt_ids), 3)
        with self.log.open("a") as lines:
            lines.write(f"{begun} {time.time()}\n")


def _length(request: Request) -> int:
    """Return how many tokens a request takes: those of its reference, which is most of its prompt, times a factor."""
    noise = random.Random(request.sampling_seed).lognormvariate(0, 0.4)
    return max(4, round(noise * len(request.prompt_ids)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1500)
    options = parser.parse_args()
    from ray.cluster_utils import Cluster

    runs = []
    with tempfile.TemporaryDirectory(prefix="idle-") as folder:
        os.environ["IDLE_LOG"] = folder  # of Ray's workers, too
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": ENGINES + 1})
        recipe, storage = load_recipe(Path("configs/recipes/demo.yaml")), Storage(folder)
        pipeline.build([pipeline.chain(recipe).base], load_compute(), storage)
        for number in range(options.runs):
            made = rows_stage(options.rows + number, Path(folder))
            write_rows(made.location, options.rows, number)
            wanted = recipe.distill.model_copy(update={"seed": number})  # a ledger of its own
            stage = distill.stage(wanted, pipeline.chain(recipe).base, made, {"made": made.settings.origin}, None)
            plan = {"ray": {"address": cluster.address}, "distill": {"actors": ENGINES, "cpus": 1}}
            (Path(folder) / "compute.yaml").write_text(json.dumps(plan))
            pipeline.build([stage], load_compute(Path(folder) / "compute.yaml"), storage, engine=FakeEngine)
            runs.append(idle_shares([*Path(folder).glob(f"{number}-*.txt")]))
            print(f"run {number + 1}: {runs[-1]}", flush=True)
        cluster.shutdown()
    print_figures("idle", {name: median_and_range([run[name] for run in runs]) for name in runs[0]})


def write_rows(directory: Path | None, count: int, seed: int) -> None:
    """Write rows with references of about 80 words, the longest of some hundreds."""
    assert directory
    directory.mkdir()
    draw, made = random.Random(seed), []
    for i in range(count):
        words = " ".join(["so"] * max(2, round(draw.lognormvariate(math.log(60), 0.8))))
        row = Row(f"Row {i}?", f"{words}, it is.")
        made.append(row._replace(id=row.content_id))
    rows.write_splits(directory, rows.Splits([], [], made))


def idle_shares(logs: Sequence[Path]) -> dict[str, float]:
    """Return which shares of the engines' time are lost, from the first request to the last answer."""
    spans = [[tuple(map(float, line.split())) for line in path.read_text().splitlines()] for path in logs]
    first, last = min(engine[0][0] for engine in spans), max(engine[-1][1] for engine in spans)
    whole = ENGINES * (last - first)
    unused = (ENGINES - len(spans)) * (last - first)  # of engines that came too late for any batch
    tail = unused + sum(last - engine[-1][1] for engine in spans)
    late = sum(engine[0][0] - first for engine in spans)
    busy = sum(end - begin for engine in spans for begin, end in engine)
    return {
        "idle_tail": round(tail / whole, 4),
        "idle_until_started": round(late / whole, 4),
        "idle_between_batches": round(1 - (busy + tail + late) / whole, 4),
        "batches": float(sum(map(len, spans))),
        "seconds": round(last - first, 1),
    }


if __name__ == "__main__":
    main()
