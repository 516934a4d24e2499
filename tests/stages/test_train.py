"""The train stage on real Ray Train and DeepSpeed: what must not move the losses, and what a kill must not cost."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import psutil
import pytest
import torch

from sdft_ray import compute
from sdft_ray.artifacts import Stage
from sdft_ray.errors import StageFailed, UserError
from sdft_ray.progress import Progress
from sdft_ray.recipe import Train
from sdft_ray.stages import Work, rows, train
from sdft_ray.storage import Storage


def make_work(root: Path, model: Path, plan: compute.Train, **settings) -> Work:
    """Return the work of training the sft arm on sums, its inputs being there already."""
    raw = [
        {"prompt": f"What is {i} + {i * j}?", "reference": f"{i} + {i * j} = {i + i * j}" * (1 + i % 3), "answer": None}
        for i in range(12)
        for j in range(1, 4)
    ]
    splits, _ = rows.split_rows(raw, "number", 0, 2, 4)
    storage = Storage(str(root))
    base, rows_stage = Stage("cut", "tiny", 1, {}, location=model), Stage("rows", "sums", 1, {})
    if storage.status(rows_stage) != "done":
        rows.write_splits(storage.scratch(rows_stage), splits)
        storage.commit(rows_stage, {}, 0.0)
    chosen = Train(**({"lr": 1e-2, "global_batch_size": 8, "epochs": 2, "validate_every_steps": 3} | settings))
    stage = Stage(
        "train",
        "tiny",
        1,
        {"arm": "sft", "train": chosen.model_dump(mode="json")},
        {"model": base, "rows": rows_stage},
    )
    return Work(stage, storage, compute.Compute(train=plan), Progress("train", "steps"))


def plan(**fields) -> compute.Train:
    return compute.Train(**({"workers": 1, "cpus": 1, "micro_batch": 8, "checkpoint_every_steps": 3} | fields))


def losses(work: Work) -> list[tuple[float, float | None]]:
    """Return loss and gradient norm of every step."""
    history = json.loads((work.directory / "losses.json").read_text())
    assert [record["step"] for record in history] == list(range(1, len(history) + 1))
    return [(record["loss"], record["grad_norm"]) for record in history]


@pytest.fixture(scope="module")
def reference(ray_cluster, tiny_model, tmp_path_factory):
    """One uninterrupted LoRA training with one worker and one micro-batch a step."""
    work = make_work(tmp_path_factory.mktemp("reference"), tiny_model, plan())
    summary = train.build(work)
    return work, summary


def test_train_lowers_the_loss_and_reports_what_it_did(reference):
    work, summary = reference
    assert summary["final_loss"] < summary["first_loss"]
    assert summary["steps"] == len(losses(work)) == -(-summary["rows"] * 2 // 8)
    assert summary["validation_loss"] is not None
    assert summary["example"]["with_loss"].endswith("<|im_end|>")
    assert summary["example"]["without_loss"].rstrip().endswith("assistant")


def test_train_writes_rope_settings_as_both_versions_of_transformers_read_them(reference):
    config = json.loads((reference[0].directory / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_train_writes_a_plain_model_equal_to_base_plus_adapter(reference, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    work, _ = reference
    merged = AutoModelForCausalLM.from_pretrained(work.directory)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([AutoTokenizer.from_pretrained(work.directory)("What is 3 + 4?")["input_ids"]])
    with torch.no_grad():
        untuned = base(ids).logits
        adapted = PeftModel.from_pretrained(base, work.directory / "adapter")(ids).logits
        tuned = merged(ids).logits
    assert torch.allclose(adapted, tuned, atol=1e-4)
    assert not torch.allclose(untuned, tuned, atol=1e-2)


@pytest.mark.parametrize(
    "fields",
    [{"micro_batch": 1}, {"workers": 2, "micro_batch": 2, "zero_stage": 2}],
    ids=["micro-batch 1", "two workers"],
)
def test_train_compute_does_not_move_the_trajectory(reference, tiny_model, tmp_path, fields):
    work = make_work(tmp_path, tiny_model, plan(**fields))
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
        assert (norm is None) == (zero_stage == 0)  # DeepSpeed does not tell it there
        assert norm is None or norm == pytest.approx(expected_norm, rel=1e-4)


def test_train_full_fine_tuning_moves_all_weights_and_reloads(ray_cluster, tiny_model, tmp_path):
    from safetensors.torch import load_file

    work = make_work(tmp_path, tiny_model, plan(), method="full", lr=1e-3, epochs=1)
    summary = train.build(work)
    before, after = load_file(tiny_model / "model.safetensors"), load_file(work.directory / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert summary["trainable_parameters"] == summary["parameters"]


def test_train_a_killed_worker_continues_from_its_checkpoint(reference, tiny_model, tmp_path):
    work = make_work(tmp_path, tiny_model, plan(checkpoint_every_steps=1))
    victim: list[int] = []
    over = threading.Event()

    def kill_once_a_checkpoint_is_there() -> None:
        while not over.wait(0.1):
            if list(work.resumable.glob("ray_train*/checkpoint_*/step")):
                for process in psutil.Process().children(recursive=True):  # of this test's own Ray
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        victim.append(process.pid)
                        os.kill(process.pid, signal.SIGKILL)
                        return

    killer = threading.Thread(target=kill_once_a_checkpoint_is_there, daemon=True)
    killer.start()
    train.build(work)
    over.set()
    assert victim, "the worker was killed"
    for got, expected in zip(losses(work), losses(reference[0]), strict=True):
        assert got == pytest.approx(expected, abs=1e-6)


def test_train_a_loss_that_is_no_number_stops_with_step_and_rows(ray_cluster, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageFailed, match=r"the loss at step 1 is nan \(training rows \["):
        train.build(make_work(tmp_path, broken, plan()))


def test_train_lora_targets_that_match_nothing_are_refused(tiny_model, tmp_path):
    work = make_work(tmp_path, tiny_model, plan(), lora={"targets": ("q_prj",)})
    with pytest.raises(UserError, match=r"train.lora.targets: the model has no q_prj. Did you mean q_proj\?"):
        train.build(work)


def test_train_rows_over_max_tokens_are_refused_with_their_number(tiny_model, tmp_path):
    work = make_work(tmp_path, tiny_model, plan(), max_tokens=10)
    with pytest.raises(UserError, match=r"train.max_tokens: 28 of 28 rows are longer than 10 tokens"):
        train.build(work)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_warms_up_to_its_peak_and_follows_the_schedule(schedule):
    settings = {"lr": 1.0, "warmup_fraction": 0.2, "schedule": schedule}
    rates = [train.learning_rate(step, 10, settings) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx({"cosine": 0.0381, "linear": 0.125, "constant": 1.0}[schedule], abs=1e-3)
