"""What a worker logs while it trains: TensorBoard's events, metrics.jsonl, and each step for the driver."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdft_ray.results import METRICS, Step
from sdft_ray.store.files import write_atomically

EVENTS = "tensorboard"


class Begun(NamedTuple):
    """A worker's report at the start."""

    history: tuple[Step, ...]
    """The steps that a checkpoint has behind it."""


class Stepped(NamedTuple):
    """A worker's report after a step."""

    step: Step
    note: str
    metrics: Mapping[str, float]
    """Of the step, and how fast and large the training is."""


class Log:
    """The files that a training is logged to; steps that are taken again after a restart replace those of before.

    Not tensorboardX's SummaryWriter: it queues events in another thread, where a kill loses those that the checkpoint
    has behind it.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        """folder: that of a training; steps: that a checkpoint has behind it."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._events, lines = folder / EVENTS, folder / METRICS
        self._events.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(f"{self._events}/events")
        if steps:
            again = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=steps + 1, session_log=again))
        write_atomically(lines, "".join(_first_lines(lines, steps)))
        self._lines = lines.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step to both, on disk when this returns."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        now = time.time()
        for name, value in metrics.items():
            self._writer.write_event(Event(wall_time=now, step=step, summary=scalar(f"train/{name}", value)))
        self._writer.flush()
        self._lines.write(json.dumps({"step": step, "time": round(now, 3), **metrics}) + "\n")
        self._lines.flush()

    def close(self) -> None:
        """End both."""
        self._writer.close()
        self._lines.close()

    def files(self) -> list[Path]:
        """Return what there is to publish."""
        return [*self._events.iterdir(), Path(self._lines.name)]


def _first_lines(file: Path, steps: int) -> Iterator[str]:
    """Yield the lines of the first so many steps; a line that a kill tore is of a later one."""
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else ():
        if not line.endswith("\n") or json.loads(line)["step"] > steps:
            return
        yield line


def report(log: Log, ticker: Any, history: Sequence[Step], rate: float, engine: Any) -> None:
    """Report the last step to the files and the driver."""
    step, memory = history[-1], peak_bytes(engine) / 1e9
    metrics = step.metrics() | {"tokens_per_second": rate, "memory_gb": memory}
    log.write(step.step, metrics)
    note = f"loss {step.loss:.3f}, lr {step.lr:.1e}, {rate:.0f} tokens/s, {memory:.1f} GB"
    ticker.report.remote(Stepped(step, note, metrics))


def peak_bytes(engine: Any) -> int:
    """Return the most memory that this worker held at once: of its GPU, else of its process."""
    import torch

    if engine.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
