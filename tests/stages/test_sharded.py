"""Training that spreads a model over workers by ZeRO-3: what each loads, and its state, without Ray."""

import re
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_model
from workers import run_workers

from sdft_ray.core.rows import TrainingRow
from sdft_ray.spec.compute import Train as Plan
from sdft_ray.spec.training import Train
from sdft_ray.spec.wording import validate
from sdft_ray.stages.train.adapters import load_model, outline_model
from sdft_ray.stages.train.sharded import is_sharded

ROWS = [TrainingRow([(7 * i + 3 * j) % 250 + 3 for j in range(24)], 9 + i % 5) for i in range(6)]


def settings_of(method: str, dtype: str = "float32") -> Train:
    return validate(Train, {"method": method, "dtype": dtype, "lr": 1e-3, "lora": {"rank": 3, "dropout": 0.0}})


def start(base: Path, settings: Train, zero_stage: int, **zero):
    """Return module and engine of a worker."""
    from sdft_ray.stages.train import zero as spreading

    plan = validate(Plan, {"zero_stage": zero_stage, "cpus": 1})
    given = {"zero_optimization": zero} if zero else {}
    module = spreading.load_trainable(str(base), settings, plan, given)
    return module, lambda: spreading.start_engine(module, settings, plan, given)


def take_steps(engine, rank: int, workers: int, count: int) -> list[tuple[float, float]]:
    """Return loss and gradient norm of some steps; every worker takes a part of the rows."""
    from sdft_ray.stages.train.step import take_step

    passes = [[i] for i in range(rank, len(ROWS), workers)]
    passes += [[]] * (-(-len(ROWS) // workers) - len(passes))
    return [take_step(engine, ROWS, [f"{step}/{i}" for i in range(6)], passes, 1.0) for step in range(count)]


# --- the base, read by shares -------------------------------------------------------------------------------------


def load_both_ways(rank: int, base: Path, method: str, dtype: str) -> tuple:
    """Return which tensors differ between the plain load and the spread one, how far logits do, and both's steps."""
    import deepspeed

    from sdft_ray.stages.train.step import compute_logits

    settings = settings_of(method, dtype)
    plain = load_model(str(base), settings)
    module, start_engine = start(base, settings, 3)
    assert all(hasattr(parameter, "ds_id") for parameter in module.parameters() if not parameter.requires_grad)
    wrong = [] if [*dict(plain.named_parameters())] == [*dict(module.model.named_parameters())] else ["names differ"]
    pairs = [*zip(plain.named_parameters(), module.model.parameters(), strict=True)]
    for (name, expected), got in pairs:
        with deepspeed.zero.GatheredParameters([got]):
            kept = expected.to(getattr(torch, dtype))  # peft keeps adapters in float32
            if got.dtype != kept.dtype or not torch.equal(got, kept) or got.requires_grad != expected.requires_grad:
                wrong.append(name)
    for (name, expected), got in zip(plain.named_buffers(), module.model.buffers(), strict=True):
        if got.dtype != expected.dtype or not torch.equal(got, expected):
            wrong.append(name)
    engines = {3: start_engine(), (least := 0 if dtype == "float32" else 1): start(base, settings, least)[1]()}
    logits = {stage: compute_logits(engine, ROWS[:2]) for stage, engine in engines.items()}
    steps = {stage: take_steps(engine, rank, 2, 3) for stage, engine in engines.items()}
    difference = float((logits[3] - logits[least]).abs().max())
    return wrong, difference, steps[3], steps[least]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Make a tiny model once, stored in a dtype, in files of 100 kB."""
    made: dict[str, Path] = {}

    def make(name: str, architecture: str, stored: str, **overrides) -> Path:
        if name not in made:
            from transformers import AutoModelForCausalLM

            made[name] = make_tiny_model(tmp_path_factory.mktemp(name), architecture, **overrides)
            model = AutoModelForCausalLM.from_pretrained(made[name], dtype=getattr(torch, stored))
            (made[name] / "model.safetensors").unlink()
            model.save_pretrained(made[name], max_shard_size="100KB")
        return made[name]

    return make


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("name", "architecture", "stored", "overrides"),
    [
        ("tied", "llama", "float32", {}),
        ("untied", "llama", "bfloat16", {"tie_word_embeddings": False}),
        ("mixture", "qwen3_moe", "float32", {}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_read_by_shares_is_the_one_read_whole(models, name, architecture, stored, overrides, method, dtype):
    base = models(name, architecture, stored, **overrides)
    results = run_workers(2, load_both_ways, base, method, dtype)
    for wrong, logits_differ_by, steps, expected in results:
        assert not wrong
        assert logits_differ_by <= (1e-5 if dtype == "float32" else 0.1)
        for got, wanted in zip(steps, expected, strict=True):
            assert got == pytest.approx(wanted, rel=1e-4 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_worker_never_holds_the_whole_model(tmp_path, method):
    base = make_tiny_model(tmp_path, hidden_size=1024, intermediate_size=2048, num_attention_heads=32, head_dim=32)
    size = (base / "model.safetensors").stat().st_size
    assert size > 150e6, "far more than what the libraries themselves take meanwhile"
    assert max(run_workers(4, hold_after_load, base, method)) < size / 4 + 30e6


def hold_after_load(rank: int, base: Path, method: str) -> int:
    """Return the bytes that a load adds to the memory of this process that is no file's."""

    def held() -> int:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    import deepspeed  # noqa: F401 - what the libraries take is no part of it
    import peft  # noqa: F401

    before = held()
    module, _ = start(base, settings_of(method), 3)
    after = held()
    assert sum(parameter.ds_numel for parameter in module.parameters() if hasattr(parameter, "ds_id")) > 30e6
    return after - before


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 3}, True),
        ({"stage": 2}, False),
        ({"stage": 3, "reduce_bucket_size": 9}, True),
        ({"stage": 3, "zero_quantized_weights": True}, False),
        ({"stage": 3, "zero_hpz_partition_size": 8}, False),
    ],
)
def test_shares_in_another_form_are_loaded_as_before(zero, expected):
    assert is_sharded({"zero_optimization": zero}) is expected


# --- the state of a training ----------------------------------------------------------------------------------------


def resume(rank: int, workers: int, base: Path, method: str, zero_stage: int, saved: Path, again: Path):
    """Load a state, write it again, and return loss and gradient norm of the next steps."""
    from sdft_ray.stages.train.state import load_state, save_state

    engine = start(base, settings_of(method), zero_stage)[1]()
    best = load_state(engine, saved, steps=3)
    again.mkdir(parents=True, exist_ok=True)
    save_state(engine, again, best)
    return take_steps(engine, rank, workers, 2)


def write_state(base: Path, method: str, folder: Path) -> dict[str, torch.Tensor]:
    """Write a state of random numbers in two files, and return it."""
    from safetensors.torch import save_file

    outline = outline_model(base, settings_of(method))
    tensors, generator = {}, torch.Generator().manual_seed(1)
    for name, parameter in outline.named_parameters():
        if parameter.requires_grad:
            for key, scale in {"weight": 0.05, "exp_avg": 1e-3, "exp_avg_sq": 1e-6, "best": 0.05}.items():
                values = torch.randn(parameter.shape, generator=generator) * scale
                tensors[f"{key}/{name}"] = values.abs() if key == "exp_avg_sq" else values
    tensors["best/logits"] = torch.randn(5, 9, generator=generator)
    folder.mkdir()
    for rank in range(2):
        save_file(dict([*tensors.items()][rank::2]), folder / f"state-{rank:05d}.safetensors")
    return tensors


@pytest.mark.parametrize(("workers", "method"), [(3, "lora"), (5, "full"), (7, "lora")])
def test_a_state_moves_to_workers_that_divide_no_size(tiny_model, tmp_path, workers, method):
    from safetensors.torch import load_file

    state = write_state(tiny_model, method, tmp_path / "saved")
    assert any(values.numel() % workers for values in state.values())
    [alone] = run_workers(1, resume, 1, tiny_model, method, 0, tmp_path / "saved", tmp_path / "alone")
    together = run_workers(workers, resume, workers, tiny_model, method, 3, tmp_path / "saved", tmp_path / "again")
    written = {}
    for path in (tmp_path / "again").iterdir():
        written |= load_file(path)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    for steps in together:
        for got, expected in zip(steps, alone, strict=True):
            assert got == pytest.approx(expected, rel=1e-4)
