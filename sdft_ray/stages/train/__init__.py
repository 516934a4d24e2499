"""Stage `train`: one arm's fine-tuning of the pruned model.

In: the pruned model and rows with responses (the references, or what `distill` selected). Out: a plain Hugging Face
directory with the tuned model, for LoRA the adapter beside it, losses.json and TensorBoard's files. Ray Train runs the
workers (stages/worker.py) and replaces dead ones; DeepSpeed spreads what they hold. Every check that needs no worker is
made before one starts.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.core.rows import TrainingRow
from sdft_ray.core.surgery import older_rope
from sdft_ray.data.chat import encode_rows, require_trainable
from sdft_ray.data.readers import read_json
from sdft_ray.errors import StageFailed, UserError, nearest, problem
from sdft_ray.models.directory import require_loadable, require_same_logits, write_companions
from sdft_ray.progress import say
from sdft_ray.spec import compute, recipe, wording
from sdft_ray.stages import Work
from sdft_ray.stages.rows import read_split, read_training_rows
from sdft_ray.stages.train import worker
from sdft_ray.stages.train.state import LOGITS, steps_in
from sdft_ray.store.files import write_atomically
from sdft_ray.store.identity import Stage

VERSION = 4
GATES = ("max_too_long_fraction",)
"""Settings of the recipe's `train` that do not belong to what is computed."""


def build(work: Work) -> dict[str, Any]:
    """Train, then write the plain model."""
    from transformers import AutoTokenizer

    settings, plan = work.settings["train"], work.compute.train
    given = require_fitting(wording.validate(recipe.Train, settings), plan)
    base = work.input("model")
    work.storage.bring(work.resumable, "*.json")
    _require_own_checkpoints(work)
    outline = outline_model(base, settings)
    trainable, total = count_parameters(outline)
    adapted, bare = name_adapters(outline)
    if adapted and bare:
        say(f"train: adapters on {', '.join(adapted)}; none on {', '.join(bare)}: no linear layers")
    tokenizer = AutoTokenizer.from_pretrained(base)
    require_trainable(tokenizer)
    source, column = ("distilled", "response") if work.settings["arm"] == "distilled" else ("rows", "reference")
    raw = [row for place in _inputs(work, source) for row in read_training_rows(place, settings["rows"])]
    rows, ids, counts = encode(tokenizer, raw, column, settings)
    require_gates(work.stage, {"rows": len(rows), **counts})
    watched = [row for place in _inputs(work, "rows") for row in read_split(place, "validation")]
    validation, _, _ = encode(tokenizer, watched, "reference", settings, watched=True)
    require_vocabulary(base, tokenizer, [*rows, *validation])
    worker.write_rows(work.resumable / "train.parquet", rows)
    worker.write_rows(work.resumable / "validation.parquet", validation)
    example = marked_example(tokenizer, rows[0])
    before, after = (_shorten(example[part]) for part in ("without_loss", "with_loss"))
    say(f"train: {len(rows)} rows; of the first, no loss on {before}, loss on {after}")
    work.progress.begin(math.ceil(len(rows) * settings["epochs"] / settings["global_batch_size"]))
    begun = time.monotonic()
    work.storage.publish(work.resumable / "train.parquet", work.resumable / "validation.parquet")
    result = _fit(work, given)
    if "failed" in result:
        raise _give_up(work, result, ids)
    wall_seconds = time.monotonic() - begun
    for folder in ("tuned", "tensorboard"):
        work.storage.bring(work.resumable / folder)
    say("train: writing the model, to compare its logits with those of the trained weights")
    logits = _write_model(work, base)
    parameters = require_loadable(work.directory)
    assert parameters == total, f"{total} parameters were loaded, {parameters} written"
    difference = require_same_logits(work.directory, worker.proof_rows(rows), logits, settings["dtype"])
    history = result["history"]
    write_atomically(work.directory / "losses.json", json.dumps(history))
    shutil.copytree(work.resumable / "tensorboard", work.directory / "tensorboard", dirs_exist_ok=True)
    return {
        "arm": work.settings["arm"],
        "rows": len(rows),
        **counts,
        "validation_rows": len(validation),
        "steps": len(history),
        "planned_steps": result["planned_steps"],
        "best_step": worker.best_step(history),
        "tokens_per_epoch": sum(len(row.ids) for row in rows),
        "trained_tokens_per_epoch": sum(len(row.ids) - row.trained_from for row in rows),
        "training_seconds": round(wall_seconds, 1),
        "workers": result["workers"],
        "peak_memory_gb": round(result["peak_bytes"] / 1e9, 2),
        "trainable_parameters": trainable,
        "adapters_on": adapted,
        "parameters": parameters,
        "logits_differ_by": difference,
        "first_loss": history[0]["loss"],
        "final_loss": history[-1]["loss"],
        "validation_loss": next((r["validation_loss"] for r in reversed(history) if "validation_loss" in r), None),
        "example": example,
    }


def _give_up(work: Work, result: Mapping[str, Any], ids: Sequence[str]) -> StageFailed:
    """Return the error of a training whose loss is no number; a rerun tries again from the last checkpoint."""
    work.storage.drop(work.resumable / "result.json")
    named = [ids[i] for i in result["rows"]]
    some = ", ".join(named[:16]) + (f" and {len(named) - 16} more" if len(named) > 16 else "")
    kept = f"The last training checkpoint is kept in {work.storage.told(work.resumable)}"
    return StageFailed(
        problem("train", f"{result['failed']}, on rows {some}", f"Look at them, or lower train.lr. {kept}")
    )


def _inputs(work: Work, kind: str) -> list[Path]:
    """Return the inputs of one kind, of which a model that is trained on several data has several."""
    return [work.input(name) for name in work.stage.inputs if name.partition("_")[0] == kind]


# --- before anything starts -----------------------------------------------------------------------------------

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


def require_fitting(settings: recipe.Train, plan: compute.Train) -> dict[str, Any]:
    """Return the DeepSpeed JSON that was handed over; raise UserError where recipe and compute do not fit together."""
    for workers in dict.fromkeys((plan.workers.min, plan.workers.max)):
        _require_divisible(settings.global_batch_size, plan.micro_batch, workers)
    if plan.pass_tokens is not None and plan.pass_tokens < settings.max_tokens:
        what = f"{plan.pass_tokens} is less than train.max_tokens, {settings.max_tokens}: a row might not fit"
        raise UserError(problem("compute.train.pass_tokens", what, "Raise it, or lower train.max_tokens"))
    if settings.dtype == "bfloat16" and plan.zero_stage == 0:
        what = "0 has no float32 weights beside the bfloat16 ones of train.dtype"
        raise UserError(problem("compute.train.zero_stage", what, "Set 1, which only spreads the optimizer"))
    return read_deepspeed(plan.deepspeed, settings, plan) if plan.deepspeed else {}


def _require_divisible(global_batch_size: int, micro_batch: int, workers: int) -> None:
    """Raise UserError unless a step's rows share out evenly over workers and micro-batches."""
    per_round = workers * micro_batch
    if global_batch_size % per_round:
        what = f"{global_batch_size} is not a multiple of micro_batch {micro_batch} x {workers} workers = "
        below = global_batch_size // per_round * per_round
        sizes = f"{below} or {below + per_round}" if below else f"{per_round}"
        do = f"Use {sizes}, or lower compute.train.micro_batch"
        raise UserError(problem("train.global_batch_size", f"{what}{per_round}", do))


def read_deepspeed(path: str, settings: recipe.Train, plan: compute.Train) -> dict[str, Any]:
    """Return a DeepSpeed JSON; raise UserError where it sets what recipe or compute file decide, unless alike."""
    where = f"compute.train.deepspeed: {path}"
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(problem(where, f"is no JSON file that can be read ({error})", "Mend it")) from None
    if not isinstance(given, dict):
        raise UserError(problem(where, "is not a JSON object", "See configs/deepspeed for one"))
    zero = given.get("zero_optimization", {})
    must_be = {
        "train_batch_size": (given.pop("train_batch_size", "auto"), settings.global_batch_size),
        "train_micro_batch_size_per_gpu": (given.pop("train_micro_batch_size_per_gpu", "auto"), plan.micro_batch),
        "gradient_accumulation_steps": (
            given.pop("gradient_accumulation_steps", "auto"),
            "what compute.train makes it",
        ),
        "gradient_clipping": (given.pop("gradient_clipping", "auto"), settings.max_grad_norm),
        "bf16.enabled": (given.pop("bf16", {}).get("enabled", "auto"), settings.dtype == "bfloat16"),
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
        device = zero.get(part, {}).get("device", "none")
        if device == "nvme":
            what = f"zero_optimization.{part}.device nvme needs an operator that is compiled on first use"
            problems.append(problem(where, what, "Use cpu"))
    if problems:
        raise UserError(*problems)
    return given


def _require_own_checkpoints(work: Work) -> None:
    """Raise UserError where the directory of this training's checkpoints holds those of another."""
    for path in sorted(work.resumable.glob("ray_train*/checkpoint_*/progress.json")):
        if steps_in(path.parent) and (other := read_json(path)["stage"]) != work.stage.id:
            what = f"holds a checkpoint of another training ({other}, not {work.stage.id})"
            raise UserError(problem(str(path.parent), what, f"Move {work.resumable} away and run again"))


def outline_model(base: Path, settings: Mapping[str, Any]) -> Any:
    """Return the model as it will be trained, without weights; raise UserError for LoRA targets that do not fit it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        kinds = (torch.nn.Linear, torch.nn.Embedding)
        layers = {name: module.weight for name, module in model.named_modules() if isinstance(module, kinds)}
        try:
            outline, refused = worker.adapt(model, settings), ""
        except ValueError as error:
            outline, refused = None, str(error)
    if settings["method"] == "full":
        return outline
    asked = set() if settings["lora"]["targets"] == "all-linear" else set(settings["lora"]["targets"])
    if outline:  # what peft took for the experts of a mixture, which are no linear layers, it has put elsewhere
        asked &= outline.peft_config["default"].target_modules
    for target in sorted(asked):
        _require_own_weights(target, layers)
    if refused:  # experts take no dropout, and gate and up, one tensor, go together
        raise UserError(problem("train.lora", f"peft says: {refused}", "Set dropout: 0, or other targets"))
    return outline


def _require_own_weights(target: str, layers: Mapping[str, Any]) -> None:
    """Raise UserError where a LoRA target names no layer of a model, or one that shares its weights with another.

    peft changes such weights at one of the two ends, and no model that keeps them tied can hold the result. Untied, a
    pruned model would grow again, and vLLM reads no head of its own for cohere and gemma2.
    """
    named = {name for name in layers if name == target or name.endswith(f".{target}")}
    if not named:
        short = {name.rpartition(".")[2] for name in layers}
        raise UserError(
            problem("train.lora.targets", f"the model has no linear layer {target}", nearest(target, short))
        )
    for name, weight in layers.items():
        tied = [other for other in named if other != name and layers[other] is weight]
        if tied:
            what = f"{target} has the weights of {name} (tie_word_embeddings), and an adapter would part the two"
            raise UserError(problem("train.lora.targets", what, f"Leave {target} out, or set train.method: full"))


def count_parameters(outline: Any) -> tuple[int, int]:
    """Return how many parameters are trained, and how many the model has without adapters."""
    trained = sum(parameter.numel() for parameter in outline.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in outline.parameters() if not parameter.requires_grad)
    return trained, frozen or trained


def name_adapters(outline: Any) -> tuple[list[str], list[str]]:
    """Return which matrices of a block have adapters, and which others are no linear layers and have none.

    Of qwen3_moe all have them, fused experts and router, too; of gpt_oss the experts and the router have none.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    adapted = {
        f"{name}.{getattr(module, 'parameter_name', 'weight')}"
        for name, module in outline.named_modules()
        if isinstance(module, LoraLayer)
    }
    linear = {name for name, module in outline.named_modules() if isinstance(module, torch.nn.Linear)}
    matrices = {name for name, parameter in outline.named_parameters() if parameter.dim() > 1}
    bare = {name for name in matrices if name.rpartition(".")[0] not in linear}

    def in_block(names: set[str]) -> set[str]:
        short = (name.partition(".layers.")[2].partition(".")[2].replace(".base_layer", "") for name in names)
        return {name.removesuffix(".weight") for name in short if name}

    return sorted(in_block(adapted)), sorted(in_block(bare) - in_block(adapted))


def encode(
    tokenizer: Any, raw: Sequence[Mapping[str, Any]], column: str, settings: Mapping[str, Any], watched: bool = False
) -> tuple[list[TrainingRow], list[str], dict[str, int]]:
    """Return rows as token ids, their ids, and how many were too long; `watched` rows are not trained on.

    Raises UserError where none is left with a token to train.
    """
    limit, fate = settings["max_tokens"], settings["too_long"]
    rows, ids, too_long, left_out = [], [], 0, 0
    encoded = encode_rows(tokenizer, [(line["prompt"], line[column]) for line in raw])
    for line, row in zip(raw, encoded, strict=True):
        if len(row.ids) > limit:
            too_long += 1
            if fate == "leave_out" or row.trained_from >= limit:
                left_out += 1
                continue
            row = TrainingRow(row.ids[:limit], row.trained_from)  # without its end of turn: none is taught there
        rows.append(row)
        ids.append(line["id"])
    if not watched and not rows:
        what = f"{too_long} of {len(raw)} rows are longer than {limit} tokens"
        if fate == "truncate":
            what += ", and none of them has a token with loss within those"
        raise UserError(problem("train.max_tokens", what, "Raise it"))
    return rows, ids, {"rows_too_long": too_long, "rows_left_out": left_out}


def require_gates(stage: Stage, counts: Mapping[str, Any]) -> None:
    """Raise UserError where more rows were too long than the recipe allows."""
    rows, too_long = counts["rows"] + counts["rows_left_out"], counts["rows_too_long"]
    allowed = stage.gates["max_too_long_fraction"]
    if too_long > allowed * rows:
        what = f"{too_long} of {rows} rows are longer than {stage.settings['train']['max_tokens']} tokens"
        what += f" (got {too_long / rows:.2%}; expected at most {allowed:.2%})"
        raise UserError(problem("train.max_tokens", what, "Raise it, or raise train.max_too_long_fraction"))


def require_vocabulary(base: Path, tokenizer: Any, rows: Sequence[TrainingRow]) -> None:
    """Raise UserError where rows hold tokens that the model has no embedding for."""
    known = read_json(base / "config.json")["vocab_size"]
    largest = max(max(row.ids) for row in rows)
    if largest >= known:
        token = tokenizer.convert_ids_to_tokens(largest)
        what = f"the tokenizer has {len(tokenizer)} tokens and the rows hold {token} ({largest})"
        raise UserError(problem(str(base), f"{what}; the model knows {known}", "Give model and tokenizer of one kind"))


def marked_example(tokenizer: Any, row: TrainingRow) -> dict[str, str]:
    """Return one row decoded, split where the loss begins: the proof of the mask that a person can read."""
    return {
        "without_loss": tokenizer.decode(row.ids[: row.trained_from]),
        "with_loss": tokenizer.decode(row.ids[row.trained_from :]),
    }


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:60]} … {text[-60:]}")


# --- the workers ----------------------------------------------------------------------------------------------


def _fit(work: Work, given: dict[str, Any]) -> dict[str, Any]:
    """Run the workers and return what rank 0 wrote down at the end."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from sdft_ray.cluster import ticker

    result_file = work.resumable / "result.json"
    if result_file.is_file():  # killed between the last step and the commit
        return read_json(result_file)
    plan, ticks = work.compute.train, ticker()
    work.storage.drop(work.resumable / "tuned")  # of other numbers of workers
    _set_torn_list_aside(work.resumable)
    elastic = plan.workers.min != plan.workers.max
    trainer = TorchTrainer(
        worker.train_worker,
        train_loop_config={
            "storage": work.storage,
            "stage": work.stage,
            "settings": dict(work.settings["train"]),
            "plan": plan.model_dump(mode="json"),
            "deepspeed": given,
            "model": work.handle("model"),
            "ticker": ticks,
        },
        scaling_config=ScalingConfig(
            num_workers=(plan.workers.min, plan.workers.max) if elastic else plan.workers.max,
            use_gpu=bool(plan.gpus),
            resources_per_worker={"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})},
        ),
        # The same name and place: a rerun goes on from the last checkpoint by itself, in whatever layout.
        run_config=RunConfig(
            name="ray_train",
            **work.storage.for_ray(work.resumable),
            failure_config=FailureConfig(max_failures=plan.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=plan.keep_checkpoints),
        ),
    )
    finished = threading.Event()
    told: set[int] = set()

    def tell(history: worker.History) -> None:
        for record in history:
            if work.validated and "validation_loss" in record and record["step"] not in told:
                told.add(record["step"])
                work.validated(record["step"], record["validation_loss"])

    def watch() -> None:
        while not finished.wait(1.0):
            state = ray.get(ticks.ask.remote())
            tell(state.get("validations", []))
            if "begun" in state and state["begun"] != work.progress.done:
                work.progress.begin(work.progress.total, state["begun"])
            elif "step" in state:
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
        where = work.storage.told(work.resumable)
        do = f"The last training checkpoint is kept in {where}; the same command goes on from it"
        raise StageFailed(problem("train", cause, do)) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
        finished.set()
        watcher.join()
    work.storage.bring(work.resumable, result_file.name)
    result: dict[str, Any] = read_json(result_file)
    tell(result.get("history", []))
    return result


def _set_torn_list_aside(folder: Path) -> None:
    """Let Ray begin a new list of checkpoints where its own is torn.

    It writes the list in place: a kill or a full disk at that moment leaves half of it, which it cannot read.
    """
    listed = folder / "ray_train" / "checkpoint_manager_snapshot.json"
    try:
        if listed.is_file():
            json.loads(listed.read_text())
    except ValueError:
        listed.parent.rename(folder / f"ray_train-torn-{len(list(folder.glob('ray_train-torn-*')))}")


# --- the model ------------------------------------------------------------------------------------------------


def _write_model(work: Work, base: Path) -> Any:
    """Write the tuned model as a plain Hugging Face directory, and for LoRA the adapter beside it.

    One copy of the model and one tensor are in memory: the trained weights come from the workers' files one by one.
    Return the logits (K V) that the workers computed with these weights.
    """
    from transformers import GenerationConfig

    from sdft_ray.progress import quiet_transformers

    quiet_transformers()
    settings = work.settings["train"]
    # Merged in the precision of training: float32 keeps the whole update, bfloat16 rounds it with the weights.
    model = worker.load_model(str(base), settings)
    logits = _load_tuned(model, work.resumable / "tuned")
    if settings["method"] == "lora":
        # Embeddings with an adapter are the pruned model's, which stays the adapter's base.
        model.save_pretrained(work.directory / "adapter", save_embedding_layers=False)
        model = model.merge_and_unload()
    model.generation_config = GenerationConfig()  # the base's is copied: transformers saves none that it finds odd
    model.save_pretrained(work.directory)
    config = read_json(work.directory / "config.json")  # in transformers 5's spelling of RoPE alone
    write_atomically(work.directory / "config.json", json.dumps(config | older_rope(config), indent=2) + "\n")
    (work.directory / "generation_config.json").unlink()
    write_companions(base, work.directory)
    return logits


def _load_tuned(model: Any, folder: Path) -> Any:
    """Put the trained weights into a model; return the logits (K V) that lie beside them."""
    from safetensors import safe_open

    logits = None
    untouched = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name == LOGITS:
                    logits = tensors.get_tensor(name)
                else:
                    untouched.pop(name).data.copy_(tensors.get_tensor(name))
    untouched |= {LOGITS: None} if logits is None else {}
    assert not untouched, f"the workers wrote no {', '.join(sorted(untouched)[:3])}"
    return logits
