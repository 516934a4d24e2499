"""The cost of kills: generation is killed at random moments in every way there is, and rerun until it is finished.

    python -m benchmarks.crash                 # about 15 minutes; --kills 8 --real-kills 0 for a quick one
    python -m benchmarks.crash --rows 100000 --hurry 40 --kills 25 --real-kills 0 --kinds actor pool driver actor pool

It kills an engine's actor, all actors, the driver, and Ray itself (raylet, GCS): only descendants of this process.
The fake engine answers after seconds (`--hurry`: times as fast), many rows at once, as a real one does, and has a tiny
model's tokenizer; each third of its rows is a conversation. The last kills meet vLLM with SmolLM2.
Before the last line: rows of the table in docs/results.md, of each kind how often, rows generated again, and seconds
from the kill to the next row that an engine finished. The last line is JSON: `kills`, `lost` and `doubled` rows of the
dataset and lines of the ledger (a row whose conversation came out changed is lost), and `rows_again_fraction`: of the
rows that an engine had finished, how many were generated again. A piece is 16 rows, or what a quarter second brings.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import ctypes
import heapq
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from benchmarks.generate import make_recipe, read_gsm8k
from benchmarks.report import print_figures
from benchmarks.scale import rows_stage
from sdft_ray import pipeline
from sdft_ray.core.rows import Given, Message, Row, write_conversation
from sdft_ray.core.selection import Generation
from sdft_ray.engine import Request, VllmEngine
from sdft_ray.spec.compute import Endpoint, EngineOptions, load_compute
from sdft_ray.spec.recipe import Distill
from sdft_ray.stages import distill
from sdft_ray.stages.rows import Splits, write_splits
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

KINDS = {
    "actor": "an engine's actor",
    "pool": "all engines' actors at once",
    "driver": "the driver",
    "raylet": "the raylet of the only node",
    "gcs_server": "the GCS",
}
PIECE_ROWS = 16
_SLOTS = 32  # rows that the fake engine works on at once
_LOG_LINE_BYTES = 17  # an id of 16 digits
_BECOME_SUBREAPER = 36  # prctl: processes of a killed driver stay descendants of this process


@dataclass(frozen=True)
class Kill:
    """The cost of one kill."""

    kind: str
    again: int
    """Rows that had been finished and were generated again."""
    seconds: float
    """From the kill to the next row that was finished."""


def main() -> None:
    """Kill, rerun, count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=22, help="with the fake engine (default: %(default)s)")
    parser.add_argument("--real-kills", type=int, default=3, help="with vLLM (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4000, help="of the fake engine (default: %(default)s)")
    parser.add_argument("--real-rows", type=int, default=300, help="of vLLM (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="in turns (default: all)")
    parser.add_argument("--hurry", type=float, default=1.0, help="of the fake engine (default: %(default)s)")
    parser.add_argument("--drive", nargs=4, metavar=("ENGINE", "HURRY", "ROOT", "LOG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        engine, hurry, root, log = options.drive
        drive(engine, float(hurry), Path(root), Path(log))
        return
    ctypes.CDLL(None).prctl(_BECOME_SUBREAPER, 1, 0, 0, 0)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        kinds = [options.kinds[i % len(options.kinds)] for i in range(options.kills)]
        parts = [torment("fake", options.rows, kinds, options.hurry, Path(folder) / "fake", chance)]
        if options.real_kills:
            kinds = [options.kinds[i % len(options.kinds)] for i in range(options.real_kills)]
            parts.append(torment("real", options.real_rows, kinds, 1.0, Path(folder) / "real", chance))
    total = {name: sum(part[name] for part in parts) for name in parts[0] if name != "kills"}
    kills: list[Kill] = [kill for part in parts for kill in part["kills"]]
    for kind, name in KINDS.items():
        if of_kind := [kill for kill in kills if kill.kind == kind]:
            seconds = sorted(kill.seconds for kill in of_kind)
            took = f"{statistics.median(seconds):.1f} s ({seconds[0]:.1f} to {seconds[-1]:.1f})"
            print(f"| {name} | {len(of_kind)} | {sum(kill.again for kill in of_kind)} rows | {took} |")
    print_figures(
        "crash",
        {
            "kills": len(kills),
            "killed": dict(Counter(kill.kind for kill in kills)),
            "lost": total["lost"],
            "doubled": total["doubled"],
            "rows_again_fraction": round(total["again"] / total["rows"], 4),
            "rows": total["rows"],
            "conversations": total["conversations"],
            "most_again": max(kill.again for kill in kills),
            "piece_rows": PIECE_ROWS,
        },
    )


def torment(
    engine: str, rows: int, kinds: list[str], hurry: float, root: Path, chance: random.Random
) -> dict[str, Any]:
    """Return the fate of so many rows that are generated under kills of these kinds."""
    root.mkdir()
    log = root / "finished"
    log.touch()
    write_rows(engine, rows, root)
    chance.shuffle(kinds)
    process = start(engine, hurry, root, log)
    deaths: list[tuple[str, int, float]] = []  # kind, rows finished until then, seconds to the next one
    for number, kind in enumerate(kinds, 1):
        # Kills are spread over the rows that are left; the moment between two is random.
        finished = count_finished(log)
        left = rows - len(set(log.read_text().split()))
        wait_for(log, finished + chance.randint(1, max(1, 2 * left // (len(kinds) - number + 3))), process)
        time.sleep(chance.uniform(0, 1))
        if process.poll() is not None:
            break
        victims = find(kind)
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        died = time.monotonic()
        print(f"{engine}: kill {number}, {kind}: {len(victims)} processes, {left} rows left", flush=True)
        if kind not in ("actor", "pool"):
            process = restart(process, engine, hurry, root, log)
        finished = count_finished(log)
        wait_for(log, finished + 1, process)
        if victims:
            deaths.append((kind, finished, time.monotonic() - died))
    for _ in range(5):
        if process.wait() == 0:
            break
        print((root / "output").read_text()[-600:], flush=True)
        process = restart(process, engine, hurry, root, log)
    again = blame(log.read_text().split(), [finished for _, finished, _ in deaths])
    costs = [Kill(kind, again[i], seconds) for i, (kind, _, seconds) in enumerate(deaths)]
    return {**count(rows, root, log), "kills": costs}


def restart(process: subprocess.Popen[bytes], *arguments: Any) -> subprocess.Popen[bytes]:
    """Return a new driver after the old one and all that it had started are gone."""
    try:
        process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        raise SystemExit("the driver neither ended nor went on after a kill") from None
    clear()
    return start(*arguments)


def start(engine: str, hurry: float, root: Path, log: Path) -> subprocess.Popen[bytes]:
    """Return a driver at work."""
    script = [sys.executable, "-m", "benchmarks.crash", "--drive", engine, str(hurry), str(root), str(log)]
    with (root / "output").open("ab") as errors:
        return subprocess.Popen(script, stdout=errors, stderr=errors)


def wait_for(log: Path, finished: int, process: subprocess.Popen[bytes]) -> None:
    """Return once engines have finished so many generations in all, or the driver has ended."""
    while count_finished(log) < finished and process.poll() is None:
        time.sleep(0.05)


def count_finished(log: Path) -> int:
    """Return how many generations engines have finished in all."""
    return log.stat().st_size // _LOG_LINE_BYTES


def find(kind: str) -> list[psutil.Process]:
    """Return the descendants of this process that a kind of kill means."""
    processes = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            words = child.cmdline()
            is_kind = {
                "actor": words[:1] and words[0].startswith("ray::MapWorker"),
                "pool": words[:1] and words[0].startswith("ray::MapWorker"),
                "driver": "--drive" in words,
            }.get(kind, bool(words) and Path(words[0]).name == kind)
            if is_kind:
                processes.append(child)
    return processes[:1] if kind == "actor" else processes


def clear() -> None:
    """End the processes of a killed driver; Ray does so itself, in its own time."""
    left = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(left, timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=10)


def blame(finished: Iterable[str], deaths: Sequence[int]) -> Counter[int]:
    """Return how many rows were generated again because of each death: the first after they had been finished.

    >>> blame(["a", "b", "c", "b", "c", "d"], [2, 3])
    Counter({0: 1, 1: 1})
    """
    last_seen: dict[str, int] = {}
    again: Counter[int] = Counter()
    for i, row in enumerate(finished):
        if row in last_seen:
            again[bisect.bisect_right(deaths, last_seen[row])] += 1
        last_seen[row] = i
    return again


def count(rows: int, root: Path, log: Path) -> dict[str, int]:
    """Return how many rows were lost, doubled and generated again."""
    (dataset,) = (root / "distill").glob("*/train.parquet")
    (source,) = root.glob("rows*/**/train.parquet")
    columns = [pq.read_table(path, columns=["id", "conversation"]).to_pydict() for path in (dataset, source)]
    talks, wanted = (dict(zip(each["id"], each["conversation"], strict=True)) for each in columns)
    kept = columns[0]["id"]
    lines = [
        line
        for piece in root.glob("ledger/*/part-*")
        for line in pq.read_table(piece, columns=["id"])["id"].to_pylist()
    ]
    finished = Counter(log.read_text().split())
    return {
        "rows": len(finished),
        "conversations": sum(talk is not None for talk in wanted.values()),
        "lost": rows - sum(row_id in talks and talks[row_id] == talk for row_id, talk in wanted.items()),
        "doubled": len(kept) - len(set(kept)) + len(lines) - len(set(lines)),
        "again": finished.total() - len(finished),
    }


def write_rows(engine: str, rows: int, root: Path) -> None:
    """Write the rows: sums for the fake engine, each third a conversation, GSM8K's test for vLLM."""
    if engine == "real":
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in read_gsm8k(rows)))
        return
    importlib.import_module("tests.tiny").make_tiny_model(root / "tiny")
    directory = fake_stages(root)[1].location
    assert directory
    directory.mkdir()
    train = []
    for i in range(rows):
        prompt, reference = f"What is {i} + {i}?", f"It is {2 * i}."
        history = [("system", "You add."), ("user", "1 + 1?"), ("assistant", "It is 2."), ("user", prompt)]
        said = history if i % 3 == 0 else history[-1:]
        talk = write_conversation(Given([Message(role, content) for role, content in said]))
        row = Row(prompt, reference, conversation=talk)
        train.append(row._replace(id=row.content_id))
    write_splits(directory, Splits([], [], train))


def fake_stages(root: Path) -> tuple[Stage[Any], Stage[Any], Stage[Any]]:
    """Return base, rows and rewrites of the fake engine; the first two are there already."""
    base: Stage[Any] = Stage("model", "tiny", 1, {}, location=root / "tiny")
    rows = Stage("rows", "sums", 1, rows_stage(0, root).settings, location=root / "rows-made")
    return base, rows, distill.stage(Distill(), base, rows, {"sums": rows.settings.origin}, None)


# --- the driver --------------------------------------------------------------------------------------------------


class FakeEngine:
    """Answers a row after seconds of its own, and works on many at once."""

    hurry = 1.0

    def __init__(self, model: str, settings: Distill, options: EngineOptions | Endpoint, alone: bool) -> None:
        pass

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Generation]]:
        """Yield each request when its time has come."""
        waiting = list(reversed(requests))
        at_work: list[tuple[float, str, Request]] = []
        while waiting or at_work:
            while waiting and len(at_work) < _SLOTS:
                request = waiting.pop()
                seconds = random.Random(request.sampling_seed).lognormvariate(0.5, 0.5) / self.hurry
                heapq.heappush(at_work, (time.monotonic() + seconds, request.id, request))
            due, _, request = heapq.heappop(at_work)
            time.sleep(max(0.0, due - time.monotonic()))
            yield request, Generation(f"Drawn with {request.sampling_seed}.", "stop", len(request.prompt_ids), 5)


def logged(engine: Any, pace: float, log: Path) -> Any:
    """Return an engine that also writes down the id of each row that it finishes."""

    class Logged(engine):
        hurry = pace

        def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Generation]]:
            for request, generation in super().generate(requests):
                file = os.open(log, os.O_WRONLY | os.O_APPEND)
                os.write(file, f"{request.id}\n".encode())
                os.close(file)
                yield request, generation

    return Logged


def drive(engine: str, hurry: float, root: Path, log: Path) -> None:
    """Generate, as `sdft run` does, with an engine that writes down what it finishes."""
    factory = logged({"fake": FakeEngine, "real": VllmEngine}[engine], hurry, log)
    section = {"batch_rows": 512, "piece_rows": PIECE_ROWS, "max_failures": 50, "engine": {"kv_cache_gib": 1.0}}
    if engine == "fake":
        section |= {"actors": 2, "cpus": 1}
    (root / "compute.yaml").write_text(json.dumps({"distill": section}))
    if engine == "fake":
        stages: list[Stage[Any]] = [fake_stages(root)[-1]]
    else:
        chain = pipeline.chain(make_recipe(root, answer="none", max_new_tokens=128))
        assert chain.distilled
        stages = [chain.base, chain.rows, chain.distilled]
    pipeline.build(stages, load_compute(root / "compute.yaml"), Storage(str(root)), engine=factory)


if __name__ == "__main__":
    main()
