"""What this machine's CPU can do, by the flags that Linux names and the variables that keep libraries from using it.

Reading them imports nothing: what a CPU lacks is found before torch or vLLM start.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

_VNNI = {"avx512_vnni", "avx_vnni"}
# Variables that keep PyTorch and oneDNN from instructions that are there.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def read_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str] | None:
    """Return the flags of the first CPU; None where no line names them, as outside of Linux."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def is_limited(variables: Mapping[str, str] = os.environ) -> bool:
    """Return whether libraries are kept from some of the CPU's instructions."""
    return any(variables.get(name) for name in _LIMITS)


def overflows_in_int8() -> bool:
    """Return whether oneDNN's sums of products of 8-bit numbers may overflow here: without VNNI, x86 adds two products
    in 16 bits, and what does not fit is cut off."""
    flags = read_flags()
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    return is_x86 and flags is not None and (not flags & _VNNI or is_limited())
