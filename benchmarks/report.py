"""The last line of a benchmark: one JSON object that a program can read, where and with what it was measured.

In: a benchmark's name and figures. Out: a line on stdout. The lines above it are for people.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.store.manifest import provenance


def print_figures(benchmark: str, figures: Mapping[str, dict[str, Any] | float]) -> None:
    """Print {"benchmark", "figures", "machine", "versions"} as one line of JSON."""
    facts = provenance()
    line = {
        "benchmark": benchmark,
        "figures": dict(figures),
        "machine": describe_machine(),
        "versions": {"python": facts.python, **facts.packages, "git_commit": facts.git_commit},
    }
    print(json.dumps(line), flush=True)


def median_and_range(ratios: Sequence[float]) -> dict[str, float]:
    """Return the figure that ratios of alternating runs make.

    >>> median_and_range([0.8, 1.0, 0.9])
    {'median': 0.9, 'min': 0.8, 'max': 1.0, 'runs': 3}
    """
    numbers = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {name: round(number, 4) for name, number in numbers.items()} | {"runs": len(ratios)}


def describe_machine() -> dict[str, Any]:
    """Return the facts that a figure depends on: cores, the processor's model name, memory. No name of a host."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu[1] if cpu else platform.machine(),
        "memory_gb": round(memory_bytes / 1e9, 1),
    }
