"""A measurement in a process of its own, and what that process and those that it starts take.

In: the module of a benchmark and the arguments that make it measure. Out: the JSON that it prints last, with what a
look at its processes twice a second shows. Apart, because memory that a process once held is not given back.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil


def measure_apart(module: str, *arguments: object) -> dict[str, Any]:
    """Return what a benchmark prints last, with `largest_mb` (of the processes that it started) and `cpu_seconds` (of
    all of them)."""
    again = [sys.executable, "-m", module, *map(str, arguments)]
    with subprocess.Popen(again, stdout=subprocess.PIPE, text=True) as process:
        below = _watch(process)
        assert process.stdout
        measured: dict[str, Any] = json.loads(process.stdout.read().splitlines()[-1])
    assert process.returncode == 0
    return {**measured, **below}


def peak_mb(pid: int | str = "self") -> int:
    """Return the most memory that a process held at once. Not getrusage: its maximum is inherited."""
    return round(status_bytes("VmHWM", pid) / 2**20)


def status_bytes(field: str, pid: int | str = "self") -> int:
    """Return a size that the kernel reports of a process; of one that has just ended there is none: 0."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _watch(process: subprocess.Popen[str]) -> dict[str, float]:
    """Return, once a process has ended, the peak memory of the largest of those that it started, and the processor time
    of it and of all of them."""
    top, largest, cpu_seconds = psutil.Process(process.pid), 0, {}
    while process.poll() is None:
        with contextlib.suppress(psutil.Error, OSError):
            for each in [top, *top.children(recursive=True)]:
                used = each.cpu_times()
                cpu_seconds[each.pid] = used.user + used.system
                if each != top:
                    largest = max(largest, peak_mb(each.pid))
        time.sleep(0.5)
    return {"largest_mb": largest, "cpu_seconds": round(sum(cpu_seconds.values()), 1)}
