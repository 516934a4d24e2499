"""The train stage on real Ray Train and DeepSpeed: what must not move the losses, and what a kill must not cost."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import psutil
import pytest
import torch
from events import read_events
from faked import fill_disk
from refusals import complaint
from safetensors.torch import load_file
from tiny import make_tiny_model, make_tokenizer
from tracked import Server

from sdft_ray import pipeline
from sdft_ray.core.packing import Schedule
from sdft_ray.core.rows import Row
from sdft_ray.errors import StageFailed, UserError
from sdft_ray.progress import Progress
from sdft_ray.results import read_history
from sdft_ray.spec import compute
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.pruning import Prune
from sdft_ray.spec.training import Train
from sdft_ray.spec.wording import validate
from sdft_ray.stages import Work, cut, rows, train
from sdft_ray.stages.train import state
from sdft_ray.stages.train.adapters import count_parameters, load_model, name_adapters, outline_model
from sdft_ray.stages.train.encoded import EncodedRows
from sdft_ray.stages.train.fitting import require_fitting
from sdft_ray.stages.train.history import learning_rate
from sdft_ray.stages.train.rows import Counts, Rewrite, encode, marked_example, require_some
from sdft_ray.stages.train.zero import deepspeed_config
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage
from sdft_ray.trackers import libraries

FULL = pytest.mark.full


def make_work(root: Path, model: Path, plan: compute.Train, **settings) -> Work:
    """Return the work of training the sft arm on sums, its inputs being there already."""
    raw = [
        Row(f"What is {i} + {i * j}?", f"{i} + {i * j} = {i + i * j}" * (1 + i % 3))
        for i in range(12)
        for j in range(1, 4)
    ]
    splits, _ = rows.split_rows(raw, "number", 0, 2, 4)
    storage = Storage(str(root))
    base, rows_stage = Stage("cut", "tiny", 1, {}, location=model), Stage("rows", "sums", 1, {})
    if storage.status(rows_stage) != "done":
        rows.write_splits(storage.scratch(rows_stage), splits)
        storage.commit(rows_stage, {}, 0.0)
    usual = {"global_batch_size": 8, "epochs": 2, "validate_every_steps": 3, "lora": {"rank": 4, "dropout": 0.1}}
    chosen = validate(Train, {"lr": 3e-3, "keep": "best"} | usual | settings)
    stage = Stage("train", "tiny", 1, train.Settings(arm="sft", train=chosen), {"model": base, "rows": rows_stage})
    return Work(stage, storage, compute.Compute(train=plan), Progress("train", "steps"))


def plan(**fields) -> compute.Train:
    return validate(compute.Train, {"workers": 1, "cpus": 1, "micro_batch": 8, "checkpoint_every_steps": 3} | fields)


def losses(work: Work) -> list[tuple[float, float | None]]:
    """Return loss and gradient norm of every step."""
    history = read_history(work.directory)
    assert json.loads((work.directory / "losses.json").read_text()) == [step.plain() for step in history]
    assert [step.step for step in history] == list(range(1, len(history) + 1))
    return [(step.loss, step.grad_norm) for step in history]


@pytest.fixture(scope="module")
def reference(ray_cluster, tiny_model, tmp_path_factory):
    """One uninterrupted LoRA training with one worker and one micro-batch a step."""
    work = make_work(tmp_path_factory.mktemp("reference"), tiny_model, plan())
    summary = train.build(work)
    return work, summary


@contextlib.contextmanager
def tracked_by(server: Server):
    """Let trainings that name mlflow log to this server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(libraries._TRACKERS, "mlflow", lambda: server.make("mlflow"))
        yield server


def test_train_lowers_the_loss_and_reports_what_it_did(reference):
    work, summary = reference
    assert summary.final_loss < summary.first_loss
    assert summary.steps == len(losses(work)) == -(-summary.rows * 2 // 8)
    assert summary.validation_loss is not None
    assert summary.example.with_loss.endswith("<|im_end|>")
    assert summary.example.without_loss.rstrip().endswith("assistant")
    assert 0 < summary.trainable_parameters < summary.parameters


def test_train_logs_every_step_as_a_line(reference):
    lines, history = read_lines(reference[0]), read_history(reference[0].directory)
    for line, step in zip(lines, history, strict=True):
        assert {name: line[name] for name in step.metrics()} == step.metrics() and line["step"] == step.step
        assert line["tokens_per_second"] > 0 and line["memory_gb"] > 0 and line["time"] > 1.7e9


def read_lines(work: Work) -> list[dict]:
    return [json.loads(line) for line in (work.directory / "metrics.jsonl").read_text().splitlines()]


def test_train_writes_rope_settings_as_both_versions_of_transformers_read_them(reference):
    config = json.loads((reference[0].directory / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_train_writes_a_plain_model_equal_to_base_plus_adapter(reference, tiny_model):
    assert largest_logit_difference(reference[0], tiny_model) < 1e-4


def largest_logit_difference(work: Work, base: Path) -> float:
    """Return how far the tuned model is from its base with the adapter, as peft loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged, network = (AutoModelForCausalLM.from_pretrained(path) for path in (work.directory, base))
    ids = torch.tensor([AutoTokenizer.from_pretrained(work.directory)("What is 3 + 4?")["input_ids"]])
    with torch.no_grad():
        untuned, tuned = network(ids).logits, merged(ids).logits
        adapted = PeftModel.from_pretrained(network, work.directory / "adapter")(ids).logits
    assert (untuned - tuned).abs().max() > 1e-2
    return float((adapted - tuned).abs().max())


def test_train_writes_the_companions_of_its_base_and_no_other(reference, tiny_model):
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (reference[0].directory / name).read_bytes() == (tiny_model / name).read_bytes()
    settings = json.loads((reference[0].directory / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_train_lora_on_weights_that_are_tied_is_refused(tiny_model, tmp_path, target):
    work = make_work(tmp_path, tiny_model, plan(), lora={"targets": ["q_proj", target]})
    with pytest.raises(UserError, match=rf"train.lora.targets: {target} has the weights of .*train.method: full"):
        train.build(work)


@pytest.fixture(scope="module")
def odd_base(tmp_path_factory) -> Path:
    """A base that is not tied, with generation values that transformers loads and refuses to save."""
    base = make_tiny_model(tmp_path_factory.mktemp("odd") / "base", tie_word_embeddings=False)
    (base / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    return base


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"lora": {"targets": ["lm_head", "embed_tokens", "q_proj"]}}, {"gradient_checkpointing": True}),
        pytest.param({"lora": {"targets": ["lm_head"]}}, {"workers": 2, "micro_batch": 4, "zero_stage": 3}, marks=FULL),
        pytest.param(
            {"lora": {"targets": ["embed_tokens"]}}, {"workers": 2, "micro_batch": 4, "zero_stage": 3}, marks=FULL
        ),
        pytest.param({"method": "full"}, {"workers": 2, "micro_batch": 4, "zero_stage": 3}, marks=FULL),
        pytest.param({"lora": {"targets": "all-linear"}}, {"zero_stage": 0}, marks=FULL),
    ],
)
def test_train_the_written_model_is_the_trained_one(ray_cluster, odd_base, tmp_path, settings, fields):
    work = make_work(tmp_path, odd_base, plan(**fields), keep="last", **settings)
    summary = train.build(work)
    assert summary.final_loss < summary.first_loss
    history = read_history(work.directory)
    assert validation_loss_of(work) == pytest.approx(history[-1].validation_loss, rel=1e-5)
    assert summary.logits_differ_by < 1e-4
    if work.settings.train.method == "lora":
        assert largest_logit_difference(work, odd_base) < 1e-4
    generation = json.loads((work.directory / "generation_config.json").read_text())
    assert generation == {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2]}


def test_train_a_written_tensor_that_is_wrong_is_found_and_nothing_is_kept(reference, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    work = make_work(tmp_path, tiny_model, plan())
    shutil.copytree(reference[0].resumable, work.resumable, dirs_exist_ok=True)
    handed_over = work.resumable / "tuned" / "tuned-00000.safetensors"
    tensors = load_file(handed_over)
    right = dict(tensors)
    name = next(name for name in tensors if "layers.5.mlp.up_proj.lora_B" in name)
    tensors[name] = tensors[name] * 1.1
    save_file(tensors, handed_over)
    with pytest.raises(
        StageFailed, match=r"train: failed: RuntimeError: .*its logits are not those of the trained weights"
    ):
        pipeline.build([work.stage], load_compute().model_copy(update={"train": plan()}), work.storage)
    assert work.storage.status(work.stage) != "done"
    save_file(right, handed_over)  # what was trained is still there: it is written without training again
    assert train.build(work).logits_differ_by < 1e-4


def test_train_two_workers_and_micro_batches_of_one_row_do_not_move_the_trajectory(reference, tiny_model, tmp_path):
    work = make_work(tmp_path, tiny_model, plan(workers=2, micro_batch=1, zero_stage=2, gradient_checkpointing=True))
    train.build(work)
    for got, expected in zip(losses(work), losses(reference[0]), strict=True):
        assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_train_every_zero_stage_gives_one_trajectory(ray_cluster, tiny_model, tmp_path, zero_stage, method):
    works = []
    for stage in (2, zero_stage):
        work = make_work(
            tmp_path / str(stage), tiny_model, plan(workers=2, micro_batch=4, zero_stage=stage), method=method, lr=1e-3
        )
        train.build(work)
        works.append(work)
    for (loss, norm), (expected_loss, expected_norm) in zip(losses(works[1]), losses(works[0]), strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize(
    ("architecture", "method", "zero_stage"),
    [
        ("qwen3_5_text", "full", 3),
        *(pytest.param("qwen3_5_text", *rest, marks=FULL) for rest in (("full", 0), ("lora", 3))),
        *(pytest.param("falcon_h1", *rest, marks=FULL) for rest in (("full", 3), ("lora", 0))),
        pytest.param("lfm2", "full", 3, marks=FULL),
    ],
)
def test_train_a_hybrid_takes_the_steps_of_a_plain_loop(ray_cluster, tmp_path, architecture, method, zero_stage):
    base = make_tiny_model(tmp_path / "base", architecture)
    workers = 2 if zero_stage else 1
    fields = {"method": method, "lr": 1e-3, "epochs": 1, "lora": {"rank": 4, "dropout": 0.0}}
    work = make_work(tmp_path / "root", base, plan(workers=workers, zero_stage=zero_stage, micro_batch=4), **fields)
    train.build(work)
    expected = plain_losses(base, work)
    assert len(expected) >= 4
    for (loss, norm), (expected_loss, expected_norm) in zip(losses(work), expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        assert norm == pytest.approx(expected_norm, rel=1e-3)


def plain_losses(base: Path, work: Work) -> list[tuple[float, float]]:
    """Return loss and gradient norm of every step of PyTorch's own loop, which reads one row at a time."""
    settings, rows = work.settings.train, EncodedRows(work.resumable / "encoded", "train")
    model = load_model(str(base), settings).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, found = torch.optim.AdamW(weights, weight_decay=settings.weight_decay), []
    history = read_history(work.directory)
    schedule = Schedule(len(rows), settings.epochs, settings.global_batch_size, settings.seed)
    for step, numbers in enumerate(schedule):
        chosen = [rows[i] for i in numbers]
        tokens, total = sum(len(row.ids) - row.trained_from for row in chosen), 0.0
        for row in chosen:
            logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
            targets = torch.tensor(row.ids[row.trained_from :])
            loss = torch.nn.functional.cross_entropy(logits[row.trained_from - 1 : -1], targets, reduction="sum")
            (loss / tokens).backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = history[step].lr
        optimizer.step()
        optimizer.zero_grad()
        found.append((total / tokens, float(norm)))
    return found


def test_train_full_fine_tuning_moves_all_weights_and_reloads(ray_cluster, tiny_model, tmp_path):
    from safetensors.torch import load_file

    work = make_work(tmp_path, tiny_model, plan(), method="full", lr=1e-3, epochs=1)
    summary = train.build(work)
    before, after = load_file(tiny_model / "model.safetensors"), load_file(work.directory / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert summary.trainable_parameters == summary.parameters


def train_and_kill_a_worker(work: Work, checkpoints: int = 1) -> train.Summary:
    """Train, and SIGKILL one worker once there are some checkpoints; return the summary."""
    victim: list[int] = []
    over = threading.Event()

    def kill_once_they_are_there() -> None:
        while not over.wait(0.1):
            if len(list(work.resumable.glob("ray_train*/checkpoint_*/progress.json"))) >= checkpoints:
                for process in psutil.Process().children(recursive=True):  # of this test's own Ray
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        victim.append(process.pid)
                        os.kill(victim[0], signal.SIGKILL)
                        return

    killer = threading.Thread(target=kill_once_they_are_there, daemon=True)
    killer.start()
    try:
        return train.build(work)
    finally:
        over.set()
        killer.join()
        assert victim, "a worker was killed"


def test_train_a_killed_worker_continues_from_its_checkpoint(reference, tiny_model, tmp_path):
    work = make_work(tmp_path, tiny_model, plan(checkpoint_every_steps=1))
    work = dataclasses.replace(work, compute=work.compute.model_copy(update={"track": ("mlflow",)}))
    with tracked_by(Server()) as server:
        train_and_kill_a_worker(work)
    lines = read_lines(work)
    assert [line["step"] for line in lines] == [step.step for step in read_history(work.directory)]
    (run,) = server.runs.values()
    assert [(step, metrics["train/loss"]) for step, metrics in run] == [
        (line["step"], pytest.approx(line["loss"], abs=1e-6)) for line in lines
    ]
    assert server.statuses == ["done"]
    for got, expected in zip(losses(work), losses(reference[0]), strict=True):
        assert got == pytest.approx(expected, abs=1e-6)
    assert read_scalars(work.directory / "tensorboard", "train/loss") == pytest.approx(
        dict(enumerate((loss for loss, _ in losses(work)), 1)), abs=1e-6
    )


def read_scalars(folder: Path, tag: str) -> dict[int, float]:
    """Return what TensorBoard shows of a tag: of steps that were taken twice, the second time."""
    return {event.step: value for event, value in read_events(folder, tag)}


@pytest.mark.parametrize(
    ("method", "first", "second"),
    [
        ("lora", {"workers": 2, "micro_batch": 2, "zero_stage": 2}, {"zero_stage": 1}),
        pytest.param("lora", {"zero_stage": 0}, {"workers": 2, "micro_batch": 4, "zero_stage": 3}, marks=FULL),
        pytest.param("full", {"workers": 2, "micro_batch": 4, "zero_stage": 3}, {"zero_stage": 0}, marks=FULL),
        pytest.param("full", {"workers": 2, "micro_batch": 4, "zero_stage": 1}, {"zero_stage": 3}, marks=FULL),
    ],
)
def test_train_goes_on_with_other_workers_and_zero_stage(reference, tiny_model, tmp_path, method, first, second):
    alone = reference[0]
    if method == "full":
        alone = make_work(tmp_path / "alone", tiny_model, plan(), method=method, lr=1e-3)
        train.build(alone)
    settings = alone.settings.train.model_dump(mode="json")
    stopped = make_work(
        tmp_path / "moved", tiny_model, plan(**first, checkpoint_every_steps=1, max_failures=0), **settings
    )
    with pytest.raises(StageFailed, match="The last training checkpoint is kept in"):
        train_and_kill_a_worker(stopped, checkpoints=2)
    kept = max(stopped.resumable.glob("ray_train/checkpoint_*"), key=state.steps_in)
    begun, seconds = state.steps_in(kept), state.Checkpoint.from_file(kept / state.PROGRESS).seconds
    if method == "lora":  # as a kill while Ray writes it leaves its list
        (stopped.resumable / "ray_train" / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_res')
    logged = {path.name for path in (stopped.resumable / "tensorboard").iterdir()}
    moved = make_work(tmp_path / "moved", tiny_model, plan(**second), **settings)
    assert train.build(moved).training_seconds >= round(seconds, 1)
    for (loss, norm), (expected_loss, expected_norm) in zip(losses(moved), losses(alone), strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-3)
    assert largest_difference(moved.directory, alone.directory) < 1e-4
    for name in logged:
        (moved.directory / "tensorboard" / name).unlink()
    assert min(read_scalars(moved.directory / "tensorboard", "train/loss")) == begun + 1, "no step was taken again"


@pytest.mark.full
def test_train_a_full_disk_keeps_the_checkpoint_before(reference, tiny_model, small_disk):
    work = make_work(small_disk, tiny_model, plan(checkpoint_every_steps=1, max_failures=0))
    over = threading.Event()

    def fill_once_a_checkpoint_is_there() -> None:
        while not over.wait(0.05):
            if list(work.resumable.glob("ray_train*/checkpoint_*/progress.json")):
                fill_disk(small_disk)
                return

    filler = threading.Thread(target=fill_once_a_checkpoint_is_there, daemon=True)
    filler.start()
    with pytest.raises((StageFailed, OSError), match="No space left on device"):
        train.build(work)
    over.set()
    filler.join()
    assert max(map(state.steps_in, work.resumable.glob("ray_train*/checkpoint_*")))
    (small_disk / "fill").unlink()
    train.build(work)
    for got, expected in zip(losses(work), losses(reference[0]), strict=True):
        assert got == pytest.approx(expected, abs=1e-6)


def largest_difference(first: Path, second: Path) -> float:
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.full
def test_train_elastic_takes_as_many_workers_as_there_is_room_for(reference, tiny_model, tmp_path):
    work = make_work(tmp_path, tiny_model, plan(workers={"min": 1, "max": 2}, cpus=2, micro_batch=4))
    assert train.build(work).workers == 1, "two of two CPUs each do not fit"
    for got, expected in zip(losses(work), losses(reference[0]), strict=True):
        assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_train_in_bfloat16_follows_float32(reference, tiny_model, tmp_path, zero_stage):
    work = make_work(tmp_path, tiny_model, plan(zero_stage=zero_stage, offload="optimizer"), dtype="bfloat16")
    train.build(work)
    for (loss, _), (expected, _) in zip(losses(work), losses(reference[0]), strict=True):
        assert loss == pytest.approx(expected, rel=0.05)


def test_train_stops_early_and_keeps_the_best(ray_cluster, tiny_model, tmp_path):
    wild = {"lr": 0.3, "schedule": "constant", "max_grad_norm": 1e9, "validate_every_steps": 1, "epochs": 9}
    work = make_work(tmp_path, tiny_model, plan(), patience=2, **wild)
    summary = train.build(work)
    history = read_history(work.directory)
    assert summary.steps == summary.best_step + 2 < summary.planned_steps
    kept = validation_loss_of(work)
    assert kept == pytest.approx(history[summary.best_step - 1].validation_loss, rel=1e-4)
    assert kept < history[-1].validation_loss


def validation_loss_of(work: Work) -> float:
    """Return the loss of the model that was written, row by row, by plain means."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work.directory)
    total = count = 0.0
    for row in EncodedRows(work.resumable / "encoded", "validation"):
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0, row.trained_from - 1 : -1]
        targets = torch.tensor(row.ids[row.trained_from :])
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return total / count


def test_train_a_loss_that_is_no_number_stops_with_step_and_rows(ray_cluster, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageFailed, match=r"train: the loss at step 1 is nan, on rows [0-9a-f]{16}, .*lower train.lr"):
        train.build(make_work(tmp_path, broken, plan()))


def test_train_a_validation_loss_that_is_no_number_stops_after_the_last_step(ray_cluster, tiny_model, tmp_path):
    far = {"lr": 1e30, "warmup_fraction": 0.0, "epochs": 1, "global_batch_size": 32}
    with pytest.raises(StageFailed, match=r"train: the loss of the validation rows after step 1 is (nan|inf), on"):
        train.build(make_work(tmp_path, tiny_model, plan(), **far))


def test_train_lora_targets_that_match_nothing_are_refused(tiny_model, tmp_path):
    work = make_work(tmp_path, tiny_model, plan(), lora={"targets": ["q_prj"]})
    with pytest.raises(
        UserError, match=r"train.lora.targets: the model has no linear layer q_prj. Did you mean q_proj\?"
    ):
        train.build(work)


def test_train_rows_over_max_tokens_are_refused_with_their_number(tiny_model, tmp_path):
    work = make_work(tmp_path, tiny_model, plan(), max_tokens=10)
    with pytest.raises(UserError, match=r"train.max_tokens: 28 of 28 rows are longer than 10 tokens"):
        train.build(work)


def test_train_gate_is_compared_with_the_counts_of_a_finished_artifact_as_before_training(tiny_model, tmp_path):
    work = make_work(tmp_path, tiny_model, plan(), max_tokens=70, max_too_long_fraction=0.1)
    with pytest.raises(UserError) as building:
        train.build(work)
    counts = Counts(rows=25, rows_too_long=3, rows_left_out=3)
    assert (
        str(building.value)
        == complaint(train.require_gates, work.stage, counts)
        == (
            "train.max_tokens: 3 of 28 rows are longer than 70 tokens (got 10.71%; expected at most 10.00%). "
            "Raise it, or raise train.max_too_long_fraction."
        )
    )
    looser = make_work(tmp_path, tiny_model, plan(), max_tokens=70, max_too_long_fraction=0.2)
    assert looser.stage.id == work.stage.id
    train.require_gates(looser.stage, counts)


LONG = [Row("1?", "1", id="a"), Rewrite("b", "2?", "2" * 99)]


def test_encode_leaves_long_rows_out_or_truncates_them():
    (only,) = encode(make_tokenizer(), LONG, Train(max_tokens=60, too_long="leave_out"))
    assert only.number == 0
    first, cut = encode(make_tokenizer(), LONG, Train(max_tokens=60, too_long="truncate"), first=7)
    assert (first, cut.number, len(cut.row.ids)) == (only._replace(number=7), 8, 60)
    assert cut.whole > 60
    end = make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert (first.row.ids[-1], cut.row.ids[-1] == end) == (end, False), "a row that was cut off teaches no end"


def test_encode_rows_that_truncation_leaves_without_loss_are_refused():
    settings = Train(max_tokens=20, too_long="truncate")
    assert list(encode(make_tokenizer(), LONG, settings)) == []
    with pytest.raises(
        UserError, match="2 of 2 rows are longer than 20 tokens, and none of them has a token with loss"
    ):
        require_some(Counts(rows=0, rows_too_long=2, rows_left_out=2), settings)


def test_marked_example_shows_what_a_template_has_around_a_response():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    settings = Train(max_tokens=600, too_long="leave_out", max_too_long_fraction=0.0)
    encoded = next(encode(tokenizer, LONG, settings))
    assert marked_example(tokenizer, encoded.row) == (
        "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "\n</think>\n\n1<|im_end|>",
    )


def test_train_of_a_template_that_opens_thoughts_for_generation_only_is_refused(tmp_path):
    base = make_tiny_model(tmp_path / "base")
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text(template.replace("assistant\n", "assistant\n<think>\n"))
    with pytest.raises(UserError, match=r"^model: its chat template's generation prompt ends in .*<think>"):
        train.build(make_work(tmp_path / "root", base, plan()))


def test_train_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_model, tmp_path):
    narrow = make_tiny_model(tmp_path / "narrow", vocab_size=100)
    with pytest.raises(UserError, match=r"the tokenizer has 259 tokens and the rows hold .+; the model knows 100"):
        train.build(make_work(tmp_path / "root", narrow, plan()))


def test_train_checkpoints_of_another_training_are_refused(tiny_model, tmp_path):
    work = make_work(tmp_path, tiny_model, plan())
    foreign = work.resumable / "ray_train" / "checkpoint_1" / "progress.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_text(
        '{"stage": "0123456789ab", "history": [{"step": 1, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0}], "workers": 0}'
    )
    with pytest.raises(UserError, match=r"checkpoint_1: holds a checkpoint of another training \(0123456789ab, not"):
        train.build(work)


@pytest.mark.parametrize(
    ("fields", "settings", "expected"),
    [
        (
            {"micro_batch": 3},
            {},
            "train.global_batch_size: 8 is not a multiple of micro_batch 3 x 1 workers = 3. Use 6",
        ),
        ({"workers": {"min": 1, "max": 3}}, {}, "8 is not a multiple of micro_batch 8 x 3 workers = 24"),
        ({"workers": 16, "micro_batch": 1}, {}, "1 x 16 workers = 16. Use 16, or lower compute.train.workers."),
        ({"pass_tokens": 99}, {}, "compute.train.pass_tokens: 99 is less than train.max_tokens, 1024"),
        ({"zero_stage": 0}, {"dtype": "bfloat16"}, "compute.train.zero_stage: 0 has no float32 weights"),
    ],
)
def test_require_fitting_says_what_does_not_fit(fields, settings, expected):
    assert expected in complaint(require_fitting, validate(Train, {"global_batch_size": 8, **settings}), plan(**fields))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"optimizer": {"type": "Adam"}}, "optimizer is set; it is decided by train.lr and train.weight_decay"),
        ({"scheduler": {}}, "scheduler is set; it is decided by train.schedule"),
        ({"train_batch_size": 32}, "train_batch_size is 32, but recipe and compute file say 16"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but recipe and compute file say 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, but recipe and compute file say false"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, but recipe and compute file say 2"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "compiled on first use. Use cpu"),
        ({"zero_optimization": "2"}, 'zero_optimization is "2", not an object. See configs/deepspeed'),
        ({"zero_optimization": {"offload_param": "cpu"}}, 'offload_param is "cpu", not an object'),
        ({"bf16": True}, "bf16 is true, not an object"),
        ({"zero_optimization": []}, "zero_optimization is [], not an object"),
        (
            {"zero_optimization": {"reduce_bucket_sise": 9}},
            "knows no zero_optimization.reduce_bucket_sise. Did you mean reduce_bucket_size?",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "large"}},
            'zero_optimization.reduce_bucket_size is "large". Change this value.',
        ),
    ],
)
def test_deepspeed_json_is_refused_by_name_where_it_sets_what_is_decided_elsewhere(given, expected):
    assert expected in complaint(require_fitting, Train(), plan(deepspeed=given))


def test_deepspeed_json_of_the_user_is_handed_over_and_equal_values_stand():
    zero = {"stage": "auto", "reduce_bucket_size": 1000}
    own = {"train_batch_size": 16, "gradient_clipping": "auto", "zero_optimization": zero}
    given = require_fitting(Train(), plan(deepspeed=own))
    assert own["train_batch_size"] == 16, "the compute file stays as it is"
    made = deepspeed_config(Train(), plan(), given)
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    empty = require_fitting(Train(), plan(deepspeed={"zero_optimization": None}))
    assert deepspeed_config(Train(), plan(), empty)["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_warms_up_to_its_peak_and_follows_the_schedule(schedule):
    settings = Train(lr=1.0, warmup_fraction=0.2, schedule=schedule)
    rates = [learning_rate(step, 10, settings) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx({"cosine": 0.0381, "linear": 0.125, "constant": 1.0}[schedule], abs=1e-3)


@pytest.mark.full
@pytest.mark.parametrize(
    ("architecture", "method", "fields"),
    [
        ("qwen3_moe", "lora", {"workers": 2, "micro_batch": 4, "zero_stage": 2}),
        ("mixtral", "full", {"workers": 2, "micro_batch": 4, "zero_stage": 3}),
        ("gpt_oss", "lora", {"zero_stage": 3}),
    ],
)
def test_train_a_mixture_of_experts_learns_and_verifies(ray_cluster, tmp_path, architecture, method, fields):
    from sdft_ray.verify import checks, models

    base = make_tiny_model(tmp_path / "base", architecture)
    work = make_work(tmp_path / "root", base, plan(**fields), method=method, lr=1e-3, lora={"rank": 4})
    summary = train.build(work)
    assert summary.final_loss < summary.first_loss
    assert ("mlp.experts.gate_up_proj" in summary.adapters_on) is (architecture == "qwen3_moe")
    (found,) = models.find_models(str(work.directory), None, work.storage)
    assert [check for check in checks.verify(found) if check.status == "FAILED"] == []


def test_lora_targets_of_a_mixture_are_what_peft_takes_for_its_experts(tmp_path):
    base = make_tiny_model(tmp_path, "qwen3_moe", mlp_only_layers=[], decoder_sparse_step=1)

    def outline(**lora):
        return outline_model(base, validate(Train, {"lora": lora}))

    adapted, bare = name_adapters(outline(targets=["down_proj", "q_proj"]))
    assert adapted == ["mlp.experts.down_proj", "self_attn.q_proj"]
    assert bare == ["mlp.experts.gate_up_proj", "mlp.gate"]
    dense = make_tiny_model(tmp_path / "dense", "glm4_moe")
    adapted, bare = name_adapters(outline_model(dense, Train()), all_asked=True)
    assert "mlp.experts.down_proj" in adapted
    assert {"mlp.down_proj", "mlp.shared_experts.down_proj"} < {*bare}, "peft leaves them out, and so it is said"
    with pytest.raises(UserError, match=r"train.lora: peft says: .* lora_dropout != 0.*Set dropout: 0"):
        outline(dropout=0.1)


def make_cut(model: Path, root: Path, removed: tuple[int, ...]) -> Path:
    """Return the artifact of a model without some blocks."""
    storage = Storage(str(root))
    stage = cut.stage(Prune(remove=removed), Stage("model", "tiny", 1, {}, location=model), None, None)
    summary = cut.build(Work(stage, storage, compute.Compute(), Progress("cut", "parts")))
    return storage.commit(stage, summary.plain(), 0.0)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    ("scope", "removed", "trained"),
    [
        ("beside_cut", (2, 3), {1, 2}),
        ("beside_cut", (0, 3), {0, 1, 2}),
        ("beside_cut", (4, 5), {3}),
        ("last", (2, 3), {1, 2, 3}),
        ("last", (0, 1, 2, 3), {0, 1}),
    ],
)
def test_scope_of_a_training_is_the_blocks_that_it_names(tiny_model, tmp_path, method, scope, removed, trained):
    base = make_cut(tiny_model, tmp_path, removed)
    outline, whole = (outline_model(base, validate(Train, {"method": method, "scope": s})) for s in (scope, "all"))
    names = [name for name, parameter in outline.named_parameters() if parameter.requires_grad]
    assert {int(name.partition(".layers.")[2].partition(".")[0]) for name in names} == trained
    (some, parameters), (everything, same) = count_parameters(outline), count_parameters(whole)
    assert parameters == same and 0 < some <= everything


def test_adapters_that_are_all_out_of_scope_are_refused_before_a_worker_starts(tmp_path):
    kinds = ["full_attention"] * 3 + ["linear_attention"] * 3
    base = make_tiny_model(tmp_path / "base", "qwen3_5_text", layer_types=kinds)
    work = make_work(tmp_path / "root", base, plan(), scope="last", lora={"targets": ["q_proj"]})
    says = "train.lora.targets: none of them is in the blocks that train.scope: last trains. Give all-linear"
    assert says in complaint(train.build, work)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_train_beside_the_cut_leaves_all_else_as_it_was(ray_cluster, tiny_model, tmp_path, method):
    base = make_cut(tiny_model, tmp_path / "cut", (1, 2))
    work = make_work(tmp_path / "root", base, plan(), method=method, scope="beside_cut", epochs=1)
    summary = train.build(work)
    assert summary.final_loss < summary.first_loss
    before, after = (load_file(path / "model.safetensors") for path in (base, work.directory))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed and all(name.startswith(("model.layers.0.", "model.layers.1.")) for name in changed)
    assert {name.split(".")[2] for name in changed} == {"0", "1"}
