"""What each worker of a training does, under Ray Train and DeepSpeed, all in step.

In: plain settings and the paths of model and encoded rows. Out: shares of the tuned weights, and on rank 0 the history
of the losses. A step is exactly `global_batch_size` rows and its loss is the sum over trained tokens divided by the
trained tokens of the whole step, so workers, micro-batches and ZeRO stages do not move it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.core.rows import TrainingRow
from sdft_ray.store.files import write_atomically

History = list[dict[str, Any]]


def train_worker(config: dict[str, Any]) -> None:
    """Train on one worker."""
    os.environ["DS_ACCELERATOR"] = "cuda" if config["plan"]["gpus"] else "cpu"  # not the driver's
    import deepspeed
    import ray.train
    import torch
    import torch.distributed as dist

    from sdft_ray.core.packing import plan_passes, schedule
    from sdft_ray.progress import quiet_transformers
    from sdft_ray.stages.train.state import save_state, share_of_weights

    quiet_transformers()
    # DeepSpeed would compile an operator that only its inference uses; a build that is killed leaves a lock that every
    # later one waits on for ever. None of its operators counts as compatible, so none is built.
    deepspeed.ops.__compatible_ops__ = {}
    settings, plan = config["settings"], config["plan"]
    storage, stage = config["storage"], config["stage"]
    folder = storage.resumable(stage)
    storage.bring(folder, "*.parquet")
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    rows, validation = EncodedRows(folder / "train.parquet"), list(EncodedRows(folder / "validation.parquet"))
    proof = proof_rows(rows)
    engine = start_engine(load_trainable(str(config["model"]()), settings, plan), settings, plan, config["deepspeed"])
    pass_tokens = plan["pass_tokens"] or plan["micro_batch"] * settings["max_tokens"]
    steps = schedule(len(rows), settings["epochs"], settings["global_batch_size"], settings["seed"])
    history, best = _resume(engine, folder, rank, functools.partial(storage.bring, folder))
    if rank == 0:
        config["ticker"].tell.remote(begun=len(history))
    events = folder / "tensorboard"
    if rank == 0:
        storage.bring(events)
    log = _open_log(events, len(history)) if rank == 0 else None
    begun, tokens = time.monotonic(), 0

    for step in range(len(history), len(steps)):
        if gave_up(history, settings["patience"]):
            break
        chosen = [rows[i] for i in steps[step]]
        passes = plan_passes([len(row.ids) for row in chosen], workers, plan["micro_batch"], pass_tokens)[rank]
        lr = learning_rate(step, len(steps), settings)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        keys = [f"{settings['seed']}/{step}/{i}" for i in steps[step]]
        loss, norm = take_step(engine, chosen, keys, passes, settings["max_grad_norm"])
        record: dict[str, Any] = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm}
        if not (math.isfinite(loss) and math.isfinite(norm)):  # before a checkpoint could keep what it did
            if rank == 0:
                what, ids = ("loss", loss) if not math.isfinite(loss) else ("gradient", norm), steps[step]
                failed = {"failed": f"the {what[0]} at step {step + 1} is {what[1]}", "rows": ids}
                write_atomically(folder / "result.json", json.dumps(failed))
                storage.publish(folder / "result.json")
            return
        last = step + 1 == len(steps)
        history.append(record)
        if validation and (last or (step + 1) % settings["validate_every_steps"] == 0):
            passes = plan_passes([len(row.ids) for row in validation], workers, plan["micro_batch"], pass_tokens)[rank]
            record["validation_loss"] = mean_loss(engine, validation, passes)
            if settings["keep"] == "best" and best_step(history) == step + 1:
                best = share_of_weights(engine, _logits(engine, proof))
        tokens += sum(len(row.ids) for row in chosen)
        if log is not None:
            _tell(log, config["ticker"], history, tokens / (time.monotonic() - begun), engine)
        if last or (step + 1) % plan["checkpoint_every_steps"] == 0 or gave_up(history, settings["patience"]):
            with tempfile.TemporaryDirectory() as state:
                save_state(engine, Path(state), best)
                if rank == 0:
                    progress = {"stage": stage.id, "workers": workers, "history": history}
                    write_atomically(Path(state) / "progress.json", json.dumps(progress))
                    storage.publish(*events.iterdir())
                # Every worker hands over its share; Ray drops checkpoints that are not whole.
                ray.train.report({"step": step + 1}, checkpoint=ray.train.Checkpoint.from_directory(state))

    best_is_kept = settings["keep"] == "best" and best_step(history)
    kept = best if best_is_kept else share_of_weights(engine, _logits(engine, proof))
    storage.publish(_save_tuned(kept, folder / "tuned", rank))
    peak = torch.tensor(float(peak_bytes(engine)), device=engine.device, dtype=torch.float64)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if log is not None:
        log.close()
        storage.publish(*events.iterdir())
        result = {"history": history, "workers": workers, "peak_bytes": int(peak), "planned_steps": len(steps)}
        write_atomically(folder / "result.json", json.dumps(result))
        storage.publish(folder / "result.json")
    dist.barrier()


# --- pure -----------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, settings: Mapping[str, Any]) -> float:
    """Return the learning rate of a step (0-based): linear warm-up, then the schedule down to zero."""
    warmup = math.ceil(settings["warmup_fraction"] * steps)
    if step < warmup:
        return float(settings["lr"] * (step + 1) / warmup)
    along = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - along, "cosine": 0.5 * (1 + math.cos(math.pi * along))}
    return float(settings["lr"] * shape[settings["schedule"]])


def best_step(history: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the step with the lowest validation loss, the first of equals.

    >>> best_step([{"step": 1}, {"step": 2, "validation_loss": 3.0}, {"step": 3, "validation_loss": 3.0}])
    2
    """
    seen = [record for record in history if "validation_loss" in record]
    return min(seen, key=lambda record: record["validation_loss"])["step"] if seen else None


def gave_up(history: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Return whether the last `patience` validations were all no better than one before them.

    >>> gave_up([{"step": 1, "validation_loss": 3.0}, {"step": 2, "validation_loss": 3.1}], patience=1)
    True
    """
    if patience is None or (best := best_step(history)) is None:
        return False
    return sum("validation_loss" in record for record in history if record["step"] > best) >= patience


def proof_rows(rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    """Return the ends of two rows, with loss on few tokens: their logits must be the same before and after writing.

    So few, because a CPU without bfloat16 computes 10 GFLOP/s: each token of an 8B model takes seconds there.
    """
    ends = [row.ids[-32:] for row in rows[:2]]
    return [TrainingRow(ids, max(1, len(ids) - 4)) for ids in ends]


# --- model and engine -----------------------------------------------------------------------------------------


def load_model(base: str, settings: Mapping[str, Any]) -> Any:
    """Return the model that is trained: with fresh adapters for LoRA, else as it is."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(settings["seed"])
    return adapt(AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, settings["dtype"])), settings)


def adapt(model: Any, settings: Mapping[str, Any]) -> Any:
    """Return a model with LoRA adapters where the settings ask for them."""
    if settings["method"] == "full":
        return model
    from peft import LoraConfig, get_peft_model

    lora = settings["lora"]
    targets = lora["targets"] if lora["targets"] == "all-linear" else list(lora["targets"])
    wanted = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, wanted)


def load_trainable(base: str, settings: Mapping[str, Any], plan: Mapping[str, Any]) -> Any:
    """Return a module from packed rows to the summed loss of their trained tokens, or to the logits of those."""
    import torch

    from sdft_ray.core.rowwise import drop_by_row, keep_within_rows

    model = load_model(base, settings)
    rows = keep_within_rows(model.get_base_model() if settings["method"] == "lora" else model)
    if settings["method"] == "lora" and settings["lora"]["dropout"]:
        drop_by_row(model, settings["lora"]["dropout"], rows)
    if plan["gradient_checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()

    class ResponseLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, packed: Any, keys: Sequence[str], as_logits: bool = False) -> Any:
            rows.starts, rows.keys = packed.starts, keys
            device = next(self.model.parameters()).device
            # Only the K trained positions go through the head: the vocabulary is the widest layer of a small model.
            logits = (
                self.model(
                    input_ids=packed.input_ids.to(device),
                    position_ids=packed.position_ids.to(device),
                    logits_to_keep=packed.keep.to(device),
                    use_cache=False,
                )
                .logits[0]
                .float()
            )  # (K V)
            if as_logits:
                return logits
            return torch.nn.functional.cross_entropy(logits, packed.targets.to(logits.device), reduction="sum")

    return ResponseLoss()


def start_engine(module: Any, settings: Mapping[str, Any], plan: Mapping[str, Any], given: dict[str, Any]) -> Any:
    """Return a DeepSpeed engine of a module; `given` is the user's JSON."""
    import deepspeed
    import torch

    if plan["zero_stage"] == 3 and not plan["gpus"]:
        _give_back_what_is_freed()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    deepspeed.init_distributed(dist_backend="nccl" if plan["gpus"] else "gloo", verbose=False)
    # torch's AdamW: DeepSpeed's own would be compiled on first use (docs/footguns.md).
    optimizer = torch.optim.AdamW(parameters, lr=settings["lr"], weight_decay=settings["weight_decay"])
    config = deepspeed_config(settings, plan, given)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def _give_back_what_is_freed() -> None:
    """Let the C library return freed tensors to the system at once.

    ZeRO-3 allocates weights anew for every use; what the library kept of them was a third of a worker's memory.
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):  # glibc's
        allocator.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, in bytes; once set, it no longer grows by itself


def deepspeed_config(
    settings: Mapping[str, Any], plan: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the user's with what recipe and compute decide."""
    half, given = settings["dtype"] == "bfloat16", given or {}
    host = {"device": "cpu", "pin_memory": bool(plan["gpus"])}
    zero = {
        "stage": plan["zero_stage"],
        **({"offload_optimizer": host} if plan["offload"] != "none" else {}),
        **({"offload_param": host} if plan["offload"] == "all" else {}),
    }
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        **given,
        "train_micro_batch_size_per_gpu": 1,  # one packed sequence
        # How many there are differs from step to step, and set_gradient_accumulation_boundary tells the last; more than
        # one makes DeepSpeed's offload add them up.
        "gradient_accumulation_steps": 2,
        # Under ZeRO-0 DeepSpeed clips but does not tell the norm; there take_step does both.
        "gradient_clipping": settings["max_grad_norm"] if plan["zero_stage"] else 0.0,
        "bf16": {"enabled": half},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if half else {}),
        "zero_optimization": {**given.get("zero_optimization", {}), **zero},
    }


# --- one step -------------------------------------------------------------------------------------------------


def take_step(
    engine: Any, rows: Sequence[TrainingRow], keys: Sequence[str], passes: Sequence[Sequence[int]], max_norm: float
) -> tuple[float, float]:
    """Take one optimizer step on exactly these rows; return its loss per trained token and its gradient's norm."""
    import torch

    trained = _trained_tokens(rows)
    total = torch.zeros((), dtype=torch.float64)
    norm = None
    for number, places in enumerate(passes, 1):
        engine.set_gradient_accumulation_boundary(number == len(passes))
        loss = _forward(engine, rows, keys, places)
        total += loss.detach().double().cpu()
        # DeepSpeed averages over the workers; what is asked for is the sum, divided by the whole step's trained tokens.
        engine.backward(loss * (engine.world_size / trained), scale_wrt_gas=False)
        if number == len(passes) and not engine.zero_optimization():
            norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), max_norm)
        engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    # DeepSpeed says -1 for a norm that is no number.
    return _sum_over_workers(engine, total) / trained, float(norm) if norm >= 0 else math.nan


def mean_loss(engine: Any, rows: Sequence[TrainingRow], passes: Sequence[Sequence[int]]) -> float:
    """Return the loss per trained token of rows that are not trained on."""
    import torch

    engine.eval()
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for places in passes:
            total += _forward(engine, rows, [""] * len(rows), places).double().cpu()
    engine.train()
    return _sum_over_workers(engine, total) / _trained_tokens(rows)


def _forward(engine: Any, rows: Sequence[TrainingRow], keys: Sequence[str], places: Sequence[int]) -> Any:
    """Return the summed loss of the rows at some places; of none, 0: workers take part in every pass."""
    from sdft_ray.core.packing import pack_rows

    chosen = places or [min(range(len(rows)), key=lambda i: len(rows[i].ids))]
    loss = engine(pack_rows([rows[i] for i in chosen]), [keys[i] for i in chosen])
    return loss if places else loss * 0.0


def _logits(engine: Any, rows: Sequence[TrainingRow]) -> Any:
    """Return the logits (K V) of rows, outside training; all workers must call it."""
    import torch

    from sdft_ray.core.packing import pack_rows

    engine.eval()
    with torch.no_grad():
        logits = engine(pack_rows(rows), [""] * len(rows), as_logits=True)
    engine.train()
    return logits.cpu()


def _trained_tokens(rows: Sequence[TrainingRow]) -> int:
    return sum(len(row.ids) - row.trained_from for row in rows)


def _sum_over_workers(engine: Any, value: Any) -> float:
    import torch.distributed as dist

    whole = value.to(engine.device)
    dist.all_reduce(whole)
    return float(whole)


# --- what outlives a worker -----------------------------------------------------------------------------------


def _resume(engine: Any, folder: Path, rank: int, bring: Callable[[str], None]) -> tuple[History, dict[str, Any]]:
    """Load the newest whole checkpoint, if there is one; return the steps behind it and the best weights so far.

    Not `ray.train.get_checkpoint`: Ray's controller hears of a checkpoint about a second after it is on disk, and does
    not know it after a kill in between.
    """
    import torch.distributed as dist

    from sdft_ray.stages.train.state import load_state, newest_checkpoint

    found = [newest_checkpoint(folder, bring) if rank == 0 else None]
    dist.broadcast_object_list(found)
    if found[0] is None:
        return [], {}
    bring(f"{found[0]}/*")
    history: History = json.loads((folder / found[0] / "progress.json").read_text())["history"]
    return history, load_state(engine, folder / found[0], len(history))


def _save_tuned(share: Mapping[str, Any], folder: Path, rank: int) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tuned-{rank:05d}.safetensors"
    save_file(dict(share), path)
    return path


def _open_log(folder: Path, steps: int) -> Any:
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


def _tell(log: Any, ticker: Any, history: History, rate: float, engine: Any) -> None:
    """Tell TensorBoard and the driver of the last step."""
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
    ticker.tell.remote(step=record["step"], note=note, validations=validations)


def peak_bytes(engine: Any) -> int:
    """Return the most memory that this worker held at once: of its GPU, else of its process."""
    import torch

    if engine.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_rows(path: Path, rows: Sequence[TrainingRow]) -> None:
    """Write encoded rows where workers find them by number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "ids": pa.array([row.ids for row in rows], pa.list_(pa.int32())),
            "trained_from": pa.array([row.trained_from for row in rows], pa.int32()),
        }
    )
    pq.write_table(table, path)


class EncodedRows(Sequence[TrainingRow]):
    """What `write_rows` wrote, addressed by number; a row becomes Python numbers only when it is asked for."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        table = pq.read_table(path).combine_chunks()
        ids = table["ids"].chunk(0) if len(table) else None
        self._starts = [0] if ids is None else ids.offsets.to_pylist()
        self._ids = None if ids is None else ids.values.to_numpy()
        self._trained_from = table["trained_from"].to_pylist()

    def __len__(self) -> int:
        return len(self._trained_from)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if self._ids is None or not 0 <= i < len(self):
            raise IndexError(i)
        return TrainingRow(self._ids[self._starts[i] : self._starts[i + 1]].tolist(), self._trained_from[i])
