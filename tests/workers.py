"""A function in several processes of this machine that are joined by gloo: DeepSpeed's part of a training, without Ray.

The processes are forks of one that has loaded the libraries, so that seven workers start as fast as one.
"""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def run_workers(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function(rank, *arguments)` returns in each of `count` processes, by rank."""
    import torch.multiprocessing as multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "transformers", "peft", "deepspeed", "pytest"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, Path(folder), function, arguments)
        multiprocessing.start_processes(_join, arguments, nprocs=count, start_method="forkserver")
        return [_read(Path(folder), rank) for rank in range(count)]


def _join(rank: int, count: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    import deepspeed
    import torch

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__ = {}
    store, patience = f"file://{folder}/store", timedelta(seconds=300)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=patience)
    torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    torch.distributed.barrier()


def _read(folder: Path, rank: int) -> Any:
    import torch

    return torch.load(folder / f"{rank}.pt", weights_only=False)
