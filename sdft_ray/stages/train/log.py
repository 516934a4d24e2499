"""What a worker reports while it trains: TensorBoard events, and a line for the driver."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.results import Step

if TYPE_CHECKING:
    pass


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

    record, memory = history[-1], peak_bytes(engine) / 1e9
    values = {name: value for name, value in record.items() if name != "step"}
    for name, value in (values | {"tokens_per_second": rate, "memory_gb": memory}).items():
        log.write_event(Event(wall_time=time.time(), step=record["step"], summary=scalar(f"train/{name}", value)))
    log.flush()
    note = f"loss {record['loss']:.3f}, lr {record['lr']:.1e}, {rate:.0f} tokens/s, {memory:.1f} GB"
    # All validations each time: whoever asks comes by once a second and would miss some.
    validations = [record for record in history if "validation_loss" in record]
    ticker.report.remote(step=record["step"], note=note, validations=validations)


def peak_bytes(engine: Any) -> int:
    """Return the most memory that this worker held at once: of its GPU, else of its process."""
    import torch

    if engine.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
