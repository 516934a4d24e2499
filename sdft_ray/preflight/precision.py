"""Half precision on a CPU: the fields of a recipe that ask for it, and how much slower an emulating CPU is.

In: the stages that are still to be built, and the compute file. Out: one line, or nothing. A CPU without instructions
for bfloat16 computes the same numbers in plain loops, in PyTorch and in vLLM: nothing else shows why a run takes long.
Measuring imports torch, so the CPU's flags are read first.
"""

from __future__ import annotations

import functools
import os
import timeit
from collections.abc import Iterable, Mapping
from typing import Any

from sdft_ray.cpu import is_limited, read_flags
from sdft_ray.errors import Problem, problem
from sdft_ray.progress import log
from sdft_ray.spec.compute import Compute, Needs
from sdft_ray.spec.sources import ServedModel
from sdft_ray.stages import distill, draft, evaluate, loss, nll, probes, retention, score, speed, train
from sdft_ray.store.identity import Stage

# Linux's names of the instructions in /proc/cpuinfo: x86's, then ARM's.
_FLAGS = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}, "float16": {"avx512_fp16", "amx_fp16", "asimdhp"}}
_SLOW = 1.5  # times as long as float32: less is noise on a busy machine, and not worth a line


def report_slow(stages: Iterable[Stage], compute: Compute) -> None:
    """Log in one line which fields make stages slow on this machine; the speed of other machines is not known."""
    if compute.ray.address == "local" and (line := find_slow(half_fields(stages, compute))):
        log(line)


def half_fields(stages: Iterable[Stage], compute: Compute) -> dict[str, str]:
    """Return the dtypes of the recipe's fields that let stages compute in half precision on a CPU."""
    halves = [found for stage in stages if (found := _find_dtype(stage.settings)) and found[1] in _FLAGS]
    return dict(sorted((field, dtype) for field, dtype, needs in halves if not compute.bundles(needs)[2]))


def _find_dtype(settings: Any) -> tuple[str, str, Needs] | None:
    """Return the recipe's field for the precision of a stage, its dtype, and what its workers take."""
    match settings:
        case score.Settings() | loss.Settings() | loss.GreedySettings():
            return "prune.dtype", settings.dtype, score.NEEDS
        case distill.Settings(teacher=ServedModel()):  # computes elsewhere
            return None
        case distill.Settings() | nll.Settings():
            return "distill.dtype", settings.dtype, distill.NEEDS
        case train.Settings():
            return "train.dtype", settings.train.dtype, train.NEEDS
        case draft.Settings():
            return "draft.dtype", settings.dtype, draft.NEEDS
        case (
            speed.Settings()
            | evaluate.HeldOutSettings()
            | evaluate.TaskSettings()
            | probes.Settings()
            | retention.Settings()
        ):
            return "evaluate.dtype", settings.dtype, evaluate.NEEDS
    return None


def find_slow(fields: Mapping[str, str]) -> Problem | None:
    """Return the line about fields with a dtype that this machine's CPU emulates; None where it emulates none."""
    doubtful = {dtype for dtype in fields.values() if is_doubtful(dtype, read_flags(), os.environ)}
    slow = {dtype: times for dtype in sorted(doubtful) if (times := measure_slowness(dtype)) >= _SLOW}
    if not slow:
        return None
    where = ", ".join(field for field, dtype in fields.items() if dtype in slow)
    what = f"{' and '.join(slow)} {'are' if len(slow) > 1 else 'is'} emulated on this CPU"
    measured = " and ".join(f"{times:.1f}" for times in slow.values())
    return problem(where, f"{what}: measured {measured} times slower than float32", "Set float32")


def is_doubtful(dtype: str, flags: frozenset[str] | None, variables: Mapping[str, str]) -> bool:
    """Return whether a CPU with these flags, None where they are not known, may have to emulate a dtype.

    >>> is_doubtful("bfloat16", frozenset({"avx2"}), {})
    True
    """
    return flags is None or not flags & _FLAGS[dtype] or is_limited(variables)


@functools.cache
def measure_slowness(dtype: str) -> float:
    """Return how many times as long as in float32 a linear layer takes on one core, at a small model's sizes."""
    import torch

    def measure_seconds(kind: torch.dtype) -> float:
        inputs, weights = torch.ones(512, 576, dtype=kind), torch.ones(1536, 576, dtype=kind)
        # The first run includes the setup.
        return min(timeit.repeat(lambda: torch.nn.functional.linear(inputs, weights), number=1, repeat=4))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure_seconds(getattr(torch, dtype)) / measure_seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)
