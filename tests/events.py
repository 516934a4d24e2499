"""TensorBoard's files, read back."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_events(folder: Path, tag: str) -> Iterator[tuple[Any, float]]:
    """Yield each event that has a value of this tag, with the value, in the order in which they were written."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while len(data) >= 12:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            yield from ((event, value.simple_value) for value in event.summary.value if value.tag == tag)
            data = data[length + 16 :]
