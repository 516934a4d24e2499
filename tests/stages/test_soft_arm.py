"""The arm `logits` on real Ray Train and DeepSpeed: online and stored targets, and what must not move its losses."""

import shutil

import pytest
import torch
from test_train import losses, plan
from tiny import make_tiny_model

from sdft_ray.core.packing import Schedule, pack_rows
from sdft_ray.core.rows import Row, TrainingRow
from sdft_ray.core.surgery import rename_tensor
from sdft_ray.progress import Progress
from sdft_ray.spec import compute
from sdft_ray.spec.training import Soft, Train
from sdft_ray.spec.wording import validate
from sdft_ray.stages import Work, cut, rows, train
from sdft_ray.stages.train import targets
from sdft_ray.stages.train.encoded import FOLDER, EncodedRows
from sdft_ray.stages.train.prepare import encode_split
from sdft_ray.stages.train.teacher import Teacher
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

REMOVED = (1,)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, and it without a block."""
    folder = tmp_path_factory.mktemp("soft")
    base = make_tiny_model(folder / "base")
    (folder / "pruned").mkdir()
    cut.remove_blocks(base, folder / "pruned", REMOVED)
    return base, folder / "pruned"


def make_works(root, models, soft: Soft, section=None, **settings) -> list[Work]:
    """Return the works of the arm: of its targets where they are stored, and of its training."""
    storage = Storage(str(root))
    raw = [Row(f"What is {i} + {i + j}?", f"{i} + {i + j} = {i + i + j}") for i in range(12) for j in range(3)]
    splits, _ = rows.split_rows(raw, "number", 0, 2, 4)
    own = Stage("rows", "sums", 1, {}), Stage("distill", "sums", 1, {})
    for stage in own:
        if storage.status(stage) != "done":
            rows.write_splits(storage.scratch(stage), splits)
            if stage.name == "distill":
                rewrite(storage.scratch(stage) / "train.parquet")
            storage.commit(stage, {}, 0.0)
    base = Stage("model", "base", 1, {}, location=models[0])
    pruned = Stage("cut", "pruned", 1, {"blocks": 1}, {"model": base})
    if storage.status(pruned) != "done":
        shutil.copytree(models[1], storage.scratch(pruned), dirs_exist_ok=True)
        made = {"removed": REMOVED, "metric": "angular", "cost": 0.0, "agreement": 1.0}
        storage.commit(pruned, made, 0.0)
    usual = {"global_batch_size": 8, "validate_every_steps": 2, "lora": {"rank": 4, "dropout": 0.1}, "lr": 3e-3}
    chosen = validate(Train, usual | settings)
    data = [{"rows": own[0], "distilled": own[1]}]
    takes = compute.Compute(train=section or plan(), score=validate(compute.Score, {"cpus": 1}))
    stage = train.stage(chosen, "logits", pruned, data, soft, base)
    return [
        Work(each, storage, takes, Progress(each.name, "steps"))
        for each in (*([stage.inputs["targets"]] if soft.likeliest else []), stage)
    ]


def rewrite(file):
    """Make rewrites of references: as distill writes them, with a response."""
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    pq.write_table(table.append_column("response", table["reference"]), file)


def run(root, models, soft: Soft, section=None, **settings) -> tuple[train.Summary, list[tuple[float, float]]]:
    *before, work = make_works(root, models, soft, section, **settings)
    for each in before:
        each.storage.commit(each.stage, targets.build(each).plain(), 0.0)
    return train.build(work), losses(work)


def close(first, second, tolerance=2e-4):
    return all(
        a == pytest.approx(b, rel=tolerance)
        for pair in zip(first, second, strict=True)
        for a, b in zip(*pair, strict=True)
    )


@pytest.fixture(scope="module")
def online(ray_cluster, models, tmp_path_factory):
    return run(tmp_path_factory.mktemp("online"), models, Soft())


def test_the_loss_is_the_divergence_of_base_and_pruned_model(online, models, tmp_path):
    """Of the first step, before anything is trained: computed from whole logits of rows one by one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    summary, steps = online
    assert summary.arm == "logits" and summary.validation_rows == 4
    (work,) = make_works(tmp_path, models, Soft())

    tally = encode_split(work, AutoTokenizer.from_pretrained(models[1]), "train")
    encoded = EncodedRows(work.resumable / FOLDER, "train")
    base, pruned = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float64) for each in models)
    total, tokens = 0.0, 0
    for i in Schedule(tally.rows, 1, 8, 0)[0]:
        row = encoded[i]
        ids, kept = torch.tensor([row.ids]), slice(row.trained_from - 1, len(row.ids) - 1)
        with torch.no_grad():
            log_p, log_q = (model(ids).logits[0, kept].log_softmax(-1) for model in (base, pruned))
        total += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += len(row.ids) - row.trained_from
    assert steps[0][0] == pytest.approx(total / tokens, rel=1e-4)
    assert steps[-1][0] < steps[0][0]


def test_stored_targets_over_the_vocabulary_train_as_the_teacher_beside_the_student(online, models, tmp_path):
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(models[0]).vocab_size
    _, stored = run(tmp_path, models, Soft(likeliest=vocabulary))
    assert close(stored, online[1])


@pytest.mark.full
def test_few_likeliest_tokens_and_a_temperature_are_another_loss(online, models, tmp_path):
    soft = Soft(likeliest=4, temperature=2.0, cross_entropy=0.5)
    _, steps = run(tmp_path, models, soft)
    assert len(steps) == len(online[1]) and not close(steps, online[1], 1e-2)


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"workers": 2, "micro_batch": 1, "zero_stage": 2}, {}),
        pytest.param({"workers": 2, "micro_batch": 2, "zero_stage": 3}, {}, marks=pytest.mark.full),
    ],
)
def test_no_compute_setting_moves_the_trajectory(online, models, tmp_path, fields, settings):
    _, steps = run(tmp_path, models, Soft(), plan(**fields), **settings)
    assert close(steps, online[1], 1e-3)


def test_teacher_reads_the_frozen_weights_of_a_student_with_adapters(models):
    from sdft_ray.stages.train.adapters import load_model

    base, pruned = models
    student = load_model(str(pruned), validate(Train, {"lora": {"rank": 2}}))
    teacher = Teacher(base, "float32", "cpu")
    blocks = [name for name, _ in teacher.model.named_parameters() if rename_tensor(name, REMOVED) is None]
    expected = sum(teacher.model.get_parameter(name).numel() for name in blocks)
    packed = pack_rows([TrainingRow([1, 2, 3], 1)])
    before = teacher.logits(packed)
    assert teacher.share(student, REMOVED) == expected > 0
    assert torch.equal(teacher.logits(packed), before)
    with torch.no_grad():  # they are one memory: what would change one changes the other
        student.get_base_model().model.embed_tokens.weight.zero_()
    assert not teacher.model.model.embed_tokens.weight.any()
    full = load_model(str(pruned), validate(Train, {"method": "full"}))
    assert Teacher(base, "float32", "cpu").share(full, REMOVED) == sum(p.numel() for p in teacher.model.parameters())


def test_history_of_validation_compares_with_other_arms(online, tmp_path, models):
    """It is the cross-entropy of references, as of every arm."""
    summary, _ = online
    assert summary.validation_loss is not None and summary.final_loss < summary.validation_loss
