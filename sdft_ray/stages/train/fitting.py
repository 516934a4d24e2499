"""Whether recipe, compute file and a user's DeepSpeed JSON fit together: known before a worker starts."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from sdft_ray import environment
from sdft_ray.errors import Problem, UserError, nearest, problem
from sdft_ray.spec import compute, training
from sdft_ray.spec.wording import mistakes

# What a recipe or the compute file decides, by its name in DeepSpeed's JSON.
_DECIDED = {
    "optimizer": "train.lr and train.weight_decay",
    "scheduler": "train.schedule",
    "fp16": "train.dtype",
    "amp": "train.dtype",
    "torch_autocast": "train.dtype",
    "data_types": "train.dtype",
    "communication_data_type": "train.dtype",
    "sequence_parallel_size": "nothing: a step is its rows",
    "compression_training": "nothing: it would train another model",
    "data_efficiency": "nothing: a step is its rows",
    "curriculum_learning": "nothing: a step is its rows",
}


def require_fitting(settings: training.Train, plan: compute.Train) -> dict[str, Any]:
    """Return the DeepSpeed JSON that was handed over; raise UserError where recipe and compute do not fit together."""
    for workers in dict.fromkeys((plan.workers.min, plan.workers.max)):
        _require_divisible(settings.global_batch_size, plan.micro_batch, workers)
    if plan.pass_tokens is not None and plan.pass_tokens < settings.max_tokens:
        what = f"{plan.pass_tokens} is less than train.max_tokens, {settings.max_tokens}: a row might not fit"
        raise UserError(problem("compute.train.pass_tokens", what, "Raise it, or lower train.max_tokens"))
    if settings.dtype == "bfloat16" and plan.zero_stage == 0:
        what = "0 has no float32 weights beside the bfloat16 ones of train.dtype"
        raise UserError(problem("compute.train.zero_stage", what, "Set 1, which only spreads the optimizer"))
    given = plan.deepspeed or {}
    assert not isinstance(given, str), "load_compute reads the file"
    return _own_part(copy.deepcopy(given), settings, plan)


def _require_divisible(global_batch_size: int, micro_batch: int, workers: int) -> None:
    """Raise UserError unless a step's rows share out evenly over workers and micro-batches."""
    per_round = workers * micro_batch
    if global_batch_size % per_round:
        what = f"{global_batch_size} is not a multiple of micro_batch {micro_batch} x {workers} workers = "
        below = global_batch_size // per_round * per_round
        sizes = f"{below} or {below + per_round}" if below else f"{per_round}"
        do = f"Use {sizes}, or lower compute.train.{'micro_batch' if micro_batch > 1 else 'workers'}"
        raise UserError(problem("train.global_batch_size", f"{what}{per_round}", do))


def _own_part(given: dict[str, Any], settings: training.Train, plan: compute.Train) -> dict[str, Any]:
    """Return the user's part of a DeepSpeed JSON; raise UserError where it sets what recipe or compute file decide,
    unless both agree."""
    where = "compute.train.deepspeed"
    zero, bf16 = _section(given, "zero_optimization"), _section(given, "bf16")
    given.pop("bf16", None)
    given.update(zero_optimization=zero)
    must_be = {
        "train_batch_size": (given.pop("train_batch_size", "auto"), settings.global_batch_size),
        "train_micro_batch_size_per_gpu": (given.pop("train_micro_batch_size_per_gpu", "auto"), plan.micro_batch),
        "gradient_accumulation_steps": (
            given.pop("gradient_accumulation_steps", "auto"),
            "what compute.train makes it",
        ),
        "gradient_clipping": (given.pop("gradient_clipping", "auto"), settings.max_grad_norm),
        "bf16.enabled": (bf16.get("enabled", "auto"), settings.dtype == "bfloat16"),
        "zero_optimization.stage": (zero.get("stage", "auto"), plan.zero_stage),
    }
    problems = [
        problem(where, f"{name} is {json.dumps(got)}, but recipe and compute file say {json.dumps(ours)}", "Remove it")
        for name, (got, ours) in must_be.items()
        if got not in ("auto", ours)
    ]
    problems += [
        problem(where, f"{name} is set; it is decided by {by}", "Remove it")
        for name, by in _DECIDED.items()
        if name in given
    ]
    for part in ("offload_optimizer", "offload_param"):
        device = _section(zero, part).get("device", "none")
        if device == "nvme":
            what = f"zero_optimization.{part}.device nvme needs an operator that is compiled on first use"
            problems.append(problem(where, what, "Use cpu"))
    if zero:
        problems += _refused(zero)
    if problems:
        raise UserError(*problems)
    return given


def _refused(zero: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what DeepSpeed itself refuses of the settings of ZeRO: it would do so in the workers, hours later."""
    environment.for_deepspeed(0)  # workers choose their own
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if name != "stage"})
    except ValidationError as error:
        known = {each for name, field in DeepSpeedZeroConfig.model_fields.items() for each in (name, field.alias)}
        for mistake in mistakes(error):
            name = ".".join(map(str, mistake.loc))
            what, do = f"zero_optimization.{name} is {json.dumps(mistake.input)}", "Change this value"
            if mistake.type == "extra_forbidden":
                what, do = f"DeepSpeed knows no zero_optimization.{name}", nearest(name, filter(None, known))
            yield problem("compute.train.deepspeed", what, do)


def _section(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an object of a DeepSpeed JSON, an empty one where it is missing; raises UserError for another value."""
    value = {} if given.get(name) is None else given[name]
    if not isinstance(value, dict):
        what = f"{name} is {json.dumps(value)}, not an object"
        raise UserError(problem("compute.train.deepspeed", what, "See configs/deepspeed for one"))
    return value
