"""The DeepSpeed engine of one worker.

In: a model directory, training settings, the compute plan and the user's JSON. Out: an engine whose forward pass gives
the losses of packed rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdft_ray.spec import compute, training
from sdft_ray.stages.train.adapters import load_model
from sdft_ray.stages.train.sharded import is_sharded, load_share

if TYPE_CHECKING:
    from sdft_ray.core.packing import Packed


def load_trainable(base: str, settings: training.Train, plan: compute.Train, given: dict[str, Any]) -> Any:
    """Return a module as `with_loss` makes it, of this worker's share of the weights where they are spread.

    `given` is the user's JSON; all workers must call it.
    """
    _join_workers(plan)
    config = deepspeed_config(settings, plan, given)
    model = load_share(base, settings, config) if is_sharded(config) else load_model(base, settings)
    return with_loss(model, settings, plan.gradient_checkpointing)


def with_loss(model: Any, settings: training.Train, gradient_checkpointing: bool = False) -> Any:
    """Return a module from packed rows to the losses (K) of their trained tokens, or to the logits (K, V) of those."""
    import torch

    from sdft_ray.core.losses import cross_entropy
    from sdft_ray.core.rowwise import drop_by_row, keep_within_rows, may_share_a_sequence, switch_own_noise_off

    switch_own_noise_off(model)
    rows = keep_within_rows(model.get_base_model() if settings.method == "lora" else model)
    if settings.method == "lora" and settings.lora.dropout:
        drop_by_row(model, settings.lora.dropout, rows)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()

    class ResponseLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.soften: Callable[[Any, Any], Any] | None = None
            self.packs = may_share_a_sequence(model.config)

        def forward(self, packed: Packed, keys: Sequence[str], as_logits: bool = False) -> Any:
            assert self.packs or len(keys) == 1, "a model that carries a state on gets one row a sequence"
            rows.starts, rows.keys = packed.starts, keys
            logits = packed.logits(self.model)  # (K V)
            if as_logits:
                return logits.float()
            if self.soften is not None and self.training:  # validation losses compare, whatever the arm
                return self.soften(logits, packed)
            return cross_entropy(logits, packed.targets.to(logits.device))

    return ResponseLoss()


def start_engine(module: Any, settings: training.Train, plan: compute.Train, given: dict[str, Any]) -> Any:
    """Return a DeepSpeed engine of a module; `given` is the user's JSON."""
    import deepspeed
    import torch

    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # torch's AdamW: DeepSpeed's own would be compiled on first use (docs/footguns.md).
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    config = deepspeed_config(settings, plan, given)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def _join_workers(plan: compute.Train) -> None:
    import deepspeed

    if plan.zero_stage == 3 and not plan.gpus:
        _give_back_what_is_freed()
    deepspeed.init_distributed(dist_backend="nccl" if plan.gpus else "gloo", verbose=False)


def _give_back_what_is_freed() -> None:
    """Let the C library return freed tensors to the system at once.

    ZeRO-3 allocates weights anew for every use; what the library kept of them was a third of a worker's memory.
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):  # glibc's
        allocator.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, in bytes; once set, it no longer grows by itself


def deepspeed_config(settings: training.Train, plan: compute.Train, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the user's with what recipe and compute decide."""
    half = settings.dtype == "bfloat16"
    host = {"device": "cpu", "pin_memory": bool(plan.gpus)}
    zero = {
        "stage": plan.zero_stage,
        **({"offload_optimizer": host} if plan.offload != "none" else {}),
        **({"offload_param": host} if plan.offload == "all" else {}),
    }
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        **given,
        "train_micro_batch_size_per_gpu": 1,  # one packed sequence
        # How many there are differs from step to step, and set_gradient_accumulation_boundary marks the last; more than
        # one makes DeepSpeed's offload add them up.
        "gradient_accumulation_steps": 2,
        # Under ZeRO-0 DeepSpeed clips but does not return the norm; there take_step does both.
        "gradient_clipping": settings.max_grad_norm if plan.zero_stage else 0.0,
        "bf16": {"enabled": half},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if half else {}),
        "zero_optimization": {**given.get("zero_optimization", {}), **zero},
    }
