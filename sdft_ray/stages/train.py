"""Stage `train`: one arm's fine-tuning of the pruned model.

In: the pruned model and rows with responses (the references, or what `distill` selected). Out: a plain Hugging Face
directory with the tuned model, for LoRA the adapter beside it, and losses.json. Ray Train runs the workers and
replaces dead ones; DeepSpeed holds the optimizer. A step is exactly `global_batch_size` rows and its loss is the sum
over trained tokens divided by the trained tokens of the whole step, so workers and micro-batches do not move it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdft_ray import compute
from sdft_ray.artifacts import write_atomically
from sdft_ray.core.prompts import TrainingRow, encode_row
from sdft_ray.core.surgery import older_rope
from sdft_ray.errors import StageFailed, UserError, nearest, problem
from sdft_ray.sources import read_json, weight_files
from sdft_ray.stages import Work
from sdft_ray.stages.cut import require_loadable
from sdft_ray.stages.rows import read_split, read_training_rows

VERSION = 2


def build(work: Work) -> dict[str, Any]:
    """Train, then write the plain model."""
    from transformers import AutoTokenizer

    settings, plan = work.settings["train"], work.compute.train
    require_divisible(settings["global_batch_size"], plan)
    base = work.input("model")
    if settings["method"] == "lora" and settings["lora"]["targets"] != "all-linear":
        _require_targets(base, settings["lora"]["targets"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows, left_out = _encode(work, tokenizer)
    validation = [
        encode_row(tokenizer, row["prompt"], row["reference"]) for row in read_split(work.input("rows"), "validation")
    ]
    validation = [row for row in validation if len(row.ids) <= settings["max_tokens"]]
    _write_rows(work.resumable / "train.parquet", rows)
    _write_rows(work.resumable / "validation.parquet", validation)
    steps = math.ceil(len(rows) * settings["epochs"] / settings["global_batch_size"])
    work.progress.begin(steps)
    begun = time.monotonic()
    result = _fit(work, base)
    if "failed" in result:
        (work.resumable / "result.json").unlink()  # a rerun tries again from the last checkpoint
        raise StageFailed(f"train: {result['failed']}. The last training checkpoint is kept in {work.resumable}")
    wall_seconds = time.monotonic() - begun
    _write_model(work, base)
    parameters = require_loadable(work.directory)
    write_atomically(work.directory / "losses.json", json.dumps(result["history"]))
    tokens = sum(len(row.ids) for row in rows)
    return {
        "arm": work.settings["arm"],
        "rows": len(rows),
        "rows_too_long": left_out,
        "validation_rows": len(validation),
        "steps": steps,
        "tokens_per_epoch": tokens,
        "trained_tokens_per_epoch": sum(len(row.ids) - row.trained_from for row in rows),
        "training_seconds": round(wall_seconds, 1),
        "trainable_parameters": result["trainable_parameters"],
        "parameters": parameters,
        "first_loss": result["history"][0]["loss"],
        "final_loss": result["history"][-1]["loss"],
        "validation_loss": result["history"][-1].get("validation_loss"),
        "example": _marked_example(tokenizer, rows[0]),
    }


def require_divisible(global_batch_size: int, plan: compute.Train) -> None:
    """Raise UserError unless a step's rows share out evenly over workers and micro-batches."""
    per_round = plan.workers * plan.micro_batch
    if global_batch_size % per_round:
        what = f"{global_batch_size} is not a multiple of micro_batch {plan.micro_batch} x {plan.workers} workers = "
        below = global_batch_size // per_round * per_round
        sizes = f"{below} or {below + per_round}" if below else f"{per_round}"
        do = f"Use {sizes}, or lower compute.train.micro_batch"
        raise UserError(problem("train.global_batch_size", f"{what}{per_round}", do))


def _require_targets(base: Path, targets: Sequence[str]) -> None:
    """Raise UserError for LoRA targets that no weight of the model belongs to."""
    from safetensors import safe_open

    names: set[str] = set()
    for shard in weight_files(base):
        with safe_open(shard, framework="pt") as tensors:
            names |= {name.split(".")[-2] for name in tensors.keys()}  # noqa: SIM118 - not a dict
    if wrong := [target for target in targets if target.split(".")[-1] not in names]:
        raise UserError(problem("train.lora.targets", f"the model has no {wrong[0]}", nearest(wrong[0], names)))


def _encode(work: Work, tokenizer: Any) -> tuple[list[TrainingRow], int]:
    """Return the arm's rows as token ids, and how many were too long and left out."""
    settings, arm = work.settings["train"], work.settings["arm"]
    source, column = ("distilled", "response") if arm == "distilled" else ("rows", "reference")
    raw = read_training_rows(work.input(source), settings["rows"])
    encoded = [encode_row(tokenizer, row["prompt"], row[column]) for row in raw]
    rows = [row for row in encoded if len(row.ids) <= settings["max_tokens"]]
    left_out = len(encoded) - len(rows)
    if left_out > settings["max_too_long_fraction"] * len(encoded) or not rows:
        what = f"{left_out} of {len(encoded)} rows are longer than {settings['max_tokens']} tokens"
        raise UserError(problem("train.max_tokens", what, "Raise it, or raise train.max_too_long_fraction"))
    return rows, left_out


def _fit(work: Work, base: Path) -> dict[str, Any]:
    """Run the workers and return what rank 0 wrote down at the end."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from sdft_ray.cluster import ticker

    plan, ticks = work.compute.train, ticker()
    result_file = work.resumable / "result.json"
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "settings": dict(work.settings["train"]),
            "plan": plan.model_dump(mode="json"),
            "base": str(base),
            "rows": str(work.resumable / "train.parquet"),
            "validation": str(work.resumable / "validation.parquet"),
            "result": str(result_file),
            "adapter": str(work.directory / "adapter"),
            "weights": str(work.resumable / "tuned.safetensors"),
            "ticker": ticks,
        },
        scaling_config=ScalingConfig(
            num_workers=plan.workers,
            use_gpu=bool(plan.gpus),
            resources_per_worker={"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})},
        ),
        # The same name and place: a rerun goes on from the last checkpoint by itself. DeepSpeed's optimizer shards fit
        # only the layout that wrote them, so another layout starts anew instead of failing.
        run_config=RunConfig(
            name=f"ray_train-{plan.workers}-workers-zero-{plan.zero_stage}",
            storage_path=str(work.resumable),
            failure_config=FailureConfig(max_failures=plan.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    if result_file.is_file():  # killed between the last step and the commit
        return json.loads(result_file.read_text())
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(1.0):
            if state := ray.get(ticks.ask.remote()):
                work.progress.update(state["step"], state["note"])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:  # Ray Train's own handler of Ctrl-C ends the process as if all were well
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        cause = str(error).strip().splitlines()[-1]
        raise StageFailed(f"train: {cause}. The last training checkpoint is kept in {work.resumable}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
        finished.set()
        watcher.join()
    return json.loads(result_file.read_text())


# --- in the workers -------------------------------------------------------------------------------------------


def train_worker(config: dict[str, Any]) -> None:
    """Train on one worker; runs under Ray Train, all workers in step."""
    os.environ["DS_ACCELERATOR"] = "cuda" if config["plan"]["gpus"] else "cpu"  # not the driver's
    import deepspeed
    import ray
    import ray.train
    import torch
    import torch.distributed as dist

    from sdft_ray.core.packing import schedule
    from sdft_ray.progress import quiet_transformers

    quiet_transformers()
    settings, plan = config["settings"], config["plan"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(settings["seed"])
    model = _load_trainable(config["base"], settings, plan)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    deepspeed.init_distributed(dist_backend="nccl" if plan["gpus"] else "gloo", verbose=False)
    # torch's AdamW: DeepSpeed's own would be compiled on first use (docs/footguns.md).
    optimizer = torch.optim.AdamW(trainable, lr=settings["lr"], weight_decay=settings["weight_decay"])
    rounds = settings["global_batch_size"] // (workers * plan["micro_batch"])
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=_deepspeed_config(settings, plan, rounds), dist_init_required=False
    )
    rows, validation = _read_rows(Path(config["rows"])), _read_rows(Path(config["validation"]))
    steps = schedule(len(rows), settings["epochs"], settings["global_batch_size"], settings["seed"])
    history = _resume(engine)
    begun, tokens = time.monotonic(), 0

    for step in range(len(history), len(steps)):
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, len(steps), settings)
        loss = _take_step(engine, [rows[i] for i in steps[step]], rank, workers, plan["micro_batch"], rounds)
        record: dict[str, float | None] = {
            "step": step + 1,
            "loss": loss,
            "lr": learning_rate(step, len(steps), settings),
        }
        norm = engine.get_global_grad_norm()  # DeepSpeed clips under ZeRO 0 in float32 too, but does not tell the norm
        record["grad_norm"] = None if norm is None else float(norm)
        last = step + 1 == len(steps)
        if not math.isfinite(loss):
            if rank == 0:
                what = f"the loss at step {step + 1} is {loss} (training rows {steps[step]}); try a lower train.lr"
                write_atomically(Path(config["result"]), json.dumps({"failed": what}))
            return
        if validation and (last or (step + 1) % settings["validate_every_steps"] == 0):
            record["validation_loss"] = _validation_loss(engine, validation, rank, workers, plan["micro_batch"])
        history.append(record)
        if rank == 0:
            tokens += sum(len(rows[i].ids) for i in steps[step])
            note = f"loss {loss:.3f}, {tokens / (time.monotonic() - begun):.0f} tokens/s"
            config["ticker"].tell.remote(step=step + 1, note=note)
        if last or (step + 1) % plan["checkpoint_every_steps"] == 0:
            _save_checkpoint(engine, history)

    _save_tuned(engine, config, plan["zero_stage"], rank)
    dist.barrier()
    if rank == 0:
        result = {"history": history, "trainable_parameters": sum(_full_size(p) for p in trainable)}
        write_atomically(Path(config["result"]), json.dumps(result))


def learning_rate(step: int, steps: int, settings: dict[str, Any]) -> float:
    """Return the learning rate of a step (0-based): linear warm-up, then the schedule down to zero."""
    warmup = math.ceil(settings["warmup_fraction"] * steps)
    if step < warmup:
        return float(settings["lr"] * (step + 1) / warmup)
    along = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - along, "cosine": 0.5 * (1 + math.cos(math.pi * along))}
    return float(settings["lr"] * shape[settings["schedule"]])


def _load_trainable(base: str, settings: dict[str, Any], plan: dict[str, Any]) -> Any:
    """Return a module from packed rows to the summed loss of their trained tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, settings["dtype"]))
    if settings["method"] == "lora":
        from peft import LoraConfig, get_peft_model

        lora = settings["lora"]
        targets = lora["targets"] if lora["targets"] == "all-linear" else list(lora["targets"])
        model = get_peft_model(
            model,
            LoraConfig(
                r=lora["rank"],
                lora_alpha=lora["alpha"],
                lora_dropout=lora["dropout"],
                target_modules=targets,
                task_type="CAUSAL_LM",
            ),
        )
    if plan["gradient_checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()

    class ResponseLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, position_ids: Any, keep: Any, targets: Any) -> Any:
            # Only the K trained positions go through the head: the vocabulary is the widest layer of a small model.
            logits = self.model(
                input_ids=input_ids, position_ids=position_ids, logits_to_keep=keep, use_cache=False
            ).logits  # (1, K, V)
            return torch.nn.functional.cross_entropy(logits[0].float(), targets, reduction="sum")

    return ResponseLoss()


def _deepspeed_config(settings: dict[str, Any], plan: dict[str, Any], rounds: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # one packed sequence
        "gradient_accumulation_steps": rounds,
        "gradient_clipping": settings["max_grad_norm"],
        "bf16": {"enabled": settings["dtype"] == "bfloat16"},
        "zero_optimization": {"stage": plan["zero_stage"]},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }


def _take_step(
    engine: Any, rows: Sequence[TrainingRow], rank: int, workers: int, micro_batch: int, rounds: int
) -> float:
    """Take one optimizer step on exactly these rows and return its loss per trained token."""
    import torch
    import torch.distributed as dist

    from sdft_ray.core.packing import pack_rows, share_of

    trained = sum(len(row.ids) - row.trained_from for row in rows)
    total = torch.zeros((), dtype=torch.float64)
    shares = share_of(range(len(rows)), rank, workers, micro_batch)
    for number in range(rounds):
        mine = [rows[i] for i in shares[number]] if number < len(shares) else []
        # A short last step leaves some micro-batches empty; every worker must still take part in each round.
        packed = pack_rows(mine or rows[:1])
        weight = 1.0 if mine else 0.0
        loss = _forward(engine, packed) * weight
        # DeepSpeed divides by the rounds and averages over workers; undo both, divide by the step's tokens instead.
        engine.backward(loss * (rounds * workers / trained))
        engine.step()
        total += loss.detach().double().cpu()
    reduced = total.to(engine.device)
    dist.all_reduce(reduced)
    return float(reduced) / trained


def _validation_loss(engine: Any, rows: Sequence[TrainingRow], rank: int, workers: int, micro_batch: int) -> float:
    """Return the loss per trained token of the validation rows' references."""
    import torch
    import torch.distributed as dist

    from sdft_ray.core.packing import pack_rows, share_of

    engine.eval()
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for share in share_of(range(len(rows)), rank, workers, micro_batch):
            weight = 1.0 if share else 0.0
            total += weight * _forward(engine, pack_rows([rows[i] for i in share] or rows[:1])).double().cpu()
    engine.train()
    reduced = total.to(engine.device)
    dist.all_reduce(reduced)
    return float(reduced) / sum(len(row.ids) - row.trained_from for row in rows)


def _forward(engine: Any, packed: Any) -> Any:
    device = engine.device
    return engine(
        packed.input_ids.to(device), packed.position_ids.to(device), packed.keep.to(device), packed.targets.to(device)
    )


def _save_checkpoint(engine: Any, history: list[dict[str, Any]]) -> None:
    import ray.train

    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag="step", client_state={"history": history}, exclude_frozen_parameters=True)
        # Every worker hands over its own shard; Ray puts them together and drops checkpoints that are not whole.
        ray.train.report({"step": len(history)}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _resume(engine: Any) -> list[dict[str, Any]]:
    """Load the last checkpoint, if there is one, and return the steps that it has behind it."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        _, state = engine.load_checkpoint(folder, tag="step", load_module_strict=False)
    assert state is not None, "a reported checkpoint is whole"
    return list(state["history"])


def _save_tuned(engine: Any, config: dict[str, Any], zero_stage: int, rank: int) -> None:
    """Write what was trained: the adapter, or all weights."""
    import contextlib

    import deepspeed
    from safetensors.torch import save_file

    model = engine.module.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = deepspeed.zero.GatheredParameters(trained) if zero_stage == 3 else contextlib.nullcontext()
    with whole:
        if rank != 0:
            return
        if config["settings"]["method"] == "lora":
            model.save_pretrained(config["adapter"])
        else:
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in model.named_parameters()}
            save_file(tensors, config["weights"])


def _full_size(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


# --- on the driver again --------------------------------------------------------------------------------------


def _write_model(work: Work, base: Path) -> None:
    """Write the tuned model as a plain Hugging Face directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sdft_ray.progress import quiet_transformers

    quiet_transformers()
    settings = work.settings["train"]
    # Merged in the precision of training: float32 keeps the whole update, bfloat16 rounds it with the weights.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, settings["dtype"]))
    if settings["method"] == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, work.directory / "adapter").merge_and_unload()
    else:
        from safetensors.torch import load_file

        missing, surplus = model.load_state_dict(load_file(work.resumable / "tuned.safetensors"), strict=False)
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        assert set(missing) <= tied and not surplus, f"tuned weights do not fit: {missing}, {surplus}"
    model.save_pretrained(work.directory)
    config = read_json(work.directory / "config.json")  # in transformers 5's spelling of RoPE alone
    write_atomically(work.directory / "config.json", json.dumps(config | older_rope(config), indent=2) + "\n")
    AutoTokenizer.from_pretrained(base).save_pretrained(work.directory)


def _write_rows(path: Path, rows: Sequence[TrainingRow]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "ids": pa.array([row.ids for row in rows], pa.list_(pa.int32())),
            "trained_from": pa.array([row.trained_from for row in rows], pa.int32()),
        }
    )
    pq.write_table(table, path)


def _read_rows(path: Path) -> list[TrainingRow]:
    import pyarrow.parquet as pq

    return [TrainingRow(row["ids"], row["trained_from"]) for row in pq.read_table(path).to_pylist()]


def _marked_example(tokenizer: Any, row: TrainingRow) -> dict[str, str]:
    """Return one row decoded, split where the loss begins: the proof of the mask that a person can read."""
    return {
        "without_loss": tokenizer.decode(row.ids[: row.trained_from]),
        "with_loss": tokenizer.decode(row.ids[row.trained_from :]),
    }
