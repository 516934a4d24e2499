"""What a worker reports while it trains: TensorBoard events, and a line for the driver."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdft_ray.results import Step, validations


class Begun(NamedTuple):
    """A worker's report at the start."""

    steps: int
    """That a checkpoint has behind it."""


class Stepped(NamedTuple):
    """A worker's report after a step."""

    step: int
    note: str
    validations: list[tuple[int, float]]
    """All of them each time: whoever asks comes by once a second and would miss some."""


def open_log(folder: Path, steps: int) -> Any:
    """Return a writer of TensorBoard events; steps that are taken again after a restart replace those of before.

    Not tensorboardX's SummaryWriter: it queues events in another thread, where a kill loses those that the checkpoint
    has behind it.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(parents=True, exist_ok=True)
    log = EventsWriter(f"{folder}/events")
    if steps:
        again = SessionLog(status=SessionLog.START)
        log.write_event(Event(wall_time=time.time(), step=steps + 1, session_log=again))
    return log


def report(log: Any, ticker: Any, history: Sequence[Step], rate: float, engine: Any) -> None:
    """Report the last step to TensorBoard and the driver."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    step, memory = history[-1], peak_bytes(engine) / 1e9
    values = step.model_dump(exclude={"step", "validation_loss_by_source"}, exclude_none=True)
    for source, loss in (step.validation_loss_by_source or {}).items():
        values[f"validation_loss_of_source_{source}"] = loss
    for name, value in (values | {"tokens_per_second": rate, "memory_gb": memory}).items():
        log.write_event(Event(wall_time=time.time(), step=step.step, summary=scalar(f"train/{name}", value)))
    log.flush()
    note = f"loss {step.loss:.3f}, lr {step.lr:.1e}, {rate:.0f} tokens/s, {memory:.1f} GB"
    ticker.report.remote(Stepped(step.step, note, validations(history)))


def peak_bytes(engine: Any) -> int:
    """Return the most memory that this worker held at once: of its GPU, else of its process."""
    import torch

    if engine.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
