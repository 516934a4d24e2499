"""The state of a training, whole and by name, whatever it is spread over.

In: a DeepSpeed engine under any ZeRO stage. Out: float32 weights and Adam moments of every trainable parameter in
safetensors files, one a worker, each with a share of the parameters; and the way back into an engine of any other
layout. DeepSpeed's own checkpoints load only into the number of workers and the ZeRO stage that wrote them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.models.shards import StoredTensor, write_tensors
from sdft_ray.results import Step
from sdft_ray.store.record import Record

if TYPE_CHECKING:
    from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
_KINDS = {"weight": None, **{moment: moment for moment in MOMENTS}}  # of what a state holds of a parameter
PROGRESS = "progress.json"
LOGITS = "logits"
"""Stands among kept weights by the side of their names: the logits (K V) that these weights give, of rank 0."""


class Checkpoint(Record):
    """The progress of a training checkpoint."""

    stage: str
    """Id of the training that it is of."""
    workers: int
    history: tuple[Step, ...]
    """The steps that it has behind it."""
    seconds: float = 0.0
    """That these took, whichever workers took them."""


def trainable(engine: Any) -> list[tuple[str, Tensor]]:
    """Return the names that the model itself gives to what is trained, and the parameters, in one order everywhere."""
    return [
        (name.removeprefix("model."), parameter)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    ]


def share_of_weights(engine: Any, logits: Tensor) -> dict[str, Tensor]:
    """Return this worker's share of the trained weights in float32, each tensor whole; all workers must call it.

    On rank 0 with the logits that they give, which prove the model that is written from them.
    """
    return dict(_share(engine, None)) | ({LOGITS: logits} if engine.global_rank == 0 else {})


def share_file(folder: Path, rank: int) -> Path:
    """Return the file with a worker's share of the tuned weights."""
    return folder / f"tuned-{rank:05d}.safetensors"


def save_state(engine: Any, folder: Path, best: Mapping[str, Tensor]) -> None:
    """Write this worker's share of weights and moments, and of the best weights so far; all workers must call it.

    One tensor at a time is in the host's memory: of a large model, the state of one worker would not fit.
    """
    own = [(name, each) for number, (name, each) in enumerate(trainable(engine)) if _is_mine(engine, number)]
    tensors = [(f"{kind}/{name}", _whole_shape(each)) for kind in _KINDS for name, each in own]
    tensors += [(f"best/{name}", tuple(value.shape)) for name, value in best.items()]
    shares = (value for moment in _KINDS.values() for _, value in _share(engine, moment))
    write_tensors(
        folder / f"state-{engine.global_rank:05d}.safetensors",
        [(key, StoredTensor("F32", shape, 0, 4 * math.prod(shape))) for key, shape in tensors],
        (value.numpy().data for value in itertools.chain(shares, best.values())),
    )


def load_state(engine: Any, folder: Path, steps: int) -> dict[str, Tensor]:
    """Put the state after some steps into an engine, and return this worker's share of the best weights so far."""
    from safetensors import safe_open

    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("state-*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - not a dict
    _make_moments(engine, steps)
    mine = {LOGITS} if engine.global_rank == 0 else set()
    for number, (name, parameter) in enumerate(trainable(engine)):
        for kind, moment in _KINDS.items():
            _set(engine, parameter, moment, where[f"{kind}/{name}"].get_tensor(f"{kind}/{name}"))
        if _is_mine(engine, number):
            mine.add(name)
    return {name: where[key].get_tensor(key) for name in mine if (key := f"best/{name}") in where}


def newest_checkpoint(folder: Path, bring: Callable[[str], None]) -> str | None:
    """Return the whole checkpoint under a directory that is furthest along, by its name there.

    `bring` brings what matches a pattern to this node: of all checkpoints the progress, of the newest the state.
    """
    bring(f"ray_train*/checkpoint_*/{PROGRESS}")
    steps = {
        path.parent: len(checkpoint.history)
        for path in folder.glob(f"ray_train*/checkpoint_*/{PROGRESS}")
        if (checkpoint := read_checkpoint(path.parent))
    }
    for path in sorted(steps, key=lambda path: (-steps[path], path)):
        name = path.relative_to(folder).as_posix()
        bring(f"{name}/*")
        if steps_in(path):
            return name
    return None


def read_checkpoint(directory: Path) -> Checkpoint | None:
    """Return the progress of a training checkpoint; None where it is not whole."""
    try:
        return Checkpoint.from_file(directory / PROGRESS)
    except (OSError, ValueError):
        return None


def steps_in(directory: Path) -> int:
    """Return how many steps a training checkpoint has behind it; 0 where it is not whole."""
    from safetensors import SafetensorError, safe_open

    checkpoint = read_checkpoint(directory)
    if checkpoint is None:
        return 0
    try:
        for rank in range(checkpoint.workers):
            with safe_open(directory / f"state-{rank:05d}.safetensors", framework="pt"):
                pass  # it knows from the header how long the file must be
    except (OSError, SafetensorError):
        return 0
    return len(checkpoint.history)


def _is_mine(engine: Any, number: int) -> bool:
    return bool(number % engine.world_size == engine.global_rank)


def _share(engine: Any, moment: str | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that this worker keeps; one at a time is whole on every worker, then dropped."""
    for number, (name, parameter) in enumerate(trainable(engine)):
        value = _whole(engine, parameter, moment)
        if _is_mine(engine, number):
            yield name, value.detach().float().cpu().clone().contiguous()


def _whole_shape(parameter: Any) -> tuple[int, ...]:
    """Return the shape of a parameter, which under ZeRO-3 is empty itself."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _whole(engine: Any, parameter: Any, moment: str | None) -> Any:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if _is_plain(engine):
        return parameter if moment is None else engine.optimizer.state[parameter][moment]
    return (
        safe_get_full_fp32_param(parameter)
        if moment is None
        else safe_get_full_optimizer_state(parameter, optim_state_key=moment)
    )


def _set(engine: Any, parameter: Any, moment: str | None, value: Any) -> None:
    """Set a parameter's weight or moment from the whole tensor."""
    import deepspeed
    import torch

    value = value.to(engine.device)
    if not _is_plain(engine):
        _set_spread(engine, parameter, moment, value)
    elif moment is not None:
        engine.optimizer.state[parameter][moment].copy_(value)
    if moment is None:  # the weights that the forward pass reads are another copy; under ZeRO-3 a part of one
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)


def _set_spread(engine: Any, parameter: Any, moment: str | None, value: Any) -> None:
    """Set this worker's part of what the optimizer keeps of a parameter."""
    from deepspeed import utils

    if engine.zero_optimization_stage() == 3:
        # Not the setters of whole tensors: they fail on the last worker where the size is no multiple of the workers.
        part = _own_part(parameter, value)
        if moment is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, moment)
    elif moment is None:
        utils.safe_set_full_fp32_param(parameter, value)
    else:
        utils.safe_set_full_optimizer_state(parameter, value, moment)


def _own_part(parameter: Any, value: Any) -> Any:
    """Return this worker's part of a tensor under ZeRO-3. All parts have one length: the last ones end in zeros."""
    import torch

    length = parameter.ds_tensor.numel()
    part = value.flatten()[length * parameter.ds_zero_partition_rank :][:length]
    return torch.nn.functional.pad(part, (0, length - part.numel()))


def _make_moments(engine: Any, steps: int) -> None:
    """Make Adam's moments, which otherwise the first step does, as they are after some steps but zero."""
    import torch

    adam = engine.optimizer if _is_plain(engine) else engine.optimizer.optimizer
    if engine.zero_optimization_stage() == 3:  # there Adam sees its parameters during a step only
        flats = engine.optimizer.fp32_partitioned_groups_flat
    else:
        flats = list(itertools.chain.from_iterable(group["params"] for group in adam.param_groups))
    for flat in flats:
        moments = {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
        adam.state[flat] = {"step": torch.tensor(float(steps)), **moments}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2: which part is whose
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _is_plain(engine: Any) -> bool:
    """Return whether the optimizer is torch's own, with nothing spread."""
    import torch

    return isinstance(engine.optimizer, torch.optim.Optimizer)
