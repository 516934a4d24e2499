"""Training that spreads a model over workers by ZeRO-3: what each loads, and its state, without Ray."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from architectures import VARIANTS
from machine import anonymous_bytes
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
    return validate(Train, {"method": method, "dtype": dtype, "lr": 1e-3, "lora": {"rank": 4, "dropout": 0.0}})


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

    passes = [[*range(rank, len(ROWS), workers)]]
    steps = (take_step(engine, ROWS, [f"{step}/{i}" for i in range(6)], passes, 1.0) for step in range(count))
    return [(losses.mean, norm) for losses, norm in steps]


# --- the base, read by shares -------------------------------------------------------------------------------------


class Compared(NamedTuple):
    """The plain load of a model beside the one by shares."""

    differing: list[str]
    """Tensors of the two that are not the same."""
    logits_differ_by: float
    steps: list[tuple[float, float]]
    """Loss and gradient norm, of the model that is spread."""
    expected: list[tuple[float, float]]


def compare_loads(rank: int, cases: list[tuple[Path, str, str]]) -> list[Compared]:
    return [compare(rank, *case) for case in cases]


def compare(rank: int, base: Path, method: str, dtype: str) -> Compared:
    from sdft_ray.stages.train.step import compute_logits

    settings, least = settings_of(method, dtype), 0 if dtype == "float32" else 1
    differing, start_engine = differing_tensors(base, settings)
    engines = [start_engine(), start(base, settings, least)[1]()]
    logits = [compute_logits(engine, ROWS[:2]) for engine in engines]
    steps = [take_steps(engine, rank, 2, 2) for engine in engines]
    return Compared(differing, float((logits[0] - logits[1]).abs().max()), *steps)


def differing_tensors(base: Path, settings: Train) -> tuple[list[str], Callable]:
    """Return which tensors of the plain load and the one by shares are not the same, and what starts the latter."""
    import deepspeed

    plain = load_model(str(base), settings)
    module, start_engine = start(base, settings, 3)
    shared = module.model
    assert all(hasattr(parameter, "ds_id") for parameter in shared.parameters() if not parameter.requires_grad)
    differing = [*{*dict(plain.named_parameters())} ^ {*dict(shared.named_parameters())}]
    for (name, expected), got in zip(plain.named_parameters(), shared.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([got]):
            kept = expected.to(getattr(torch, settings.dtype))  # peft keeps adapters in float32
            same = got.dtype == kept.dtype and torch.equal(got, kept) and got.requires_grad == expected.requires_grad
            differing += [] if same else [name]
    for (name, expected), got in zip(plain.named_buffers(), shared.named_buffers(), strict=True):
        same = got[0] == name and got[1].dtype == expected.dtype and torch.equal(got[1], expected)
        differing += [] if same else [name]
    return differing, start_engine


FEW = {"num_hidden_layers": 2}
MODELS: dict[str, tuple[str, str, dict]] = {
    "tied": ("llama", "float32", FEW),
    "untied": ("llama", "bfloat16", FEW | {"tie_word_embeddings": False}),
    "mixture": ("qwen3_moe", "float32", FEW | {"mlp_only_layers": [0], "decoder_sparse_step": 1}),
    "router in float32": ("ernie4_5_moe", "bfloat16", FEW),
}
CASES = [
    *itertools.product(["mixture"], ("lora", "full"), ("float32", "bfloat16")),
    *(("tied", "lora", "float32"), ("tied", "full", "bfloat16"), ("untied", "full", "float32")),
    ("untied", "lora", "bfloat16"),
    ("router in float32", "full", "bfloat16"),
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> dict[tuple[str, str, str], list[Compared]]:
    """What each of two workers found of all cases, of models in files of 100 kB."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")
    for name, (architecture, stored, overrides) in MODELS.items():
        base = make_tiny_model(folder / name, architecture, **overrides)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, stored))
        (base / "model.safetensors").unlink()
        model.save_pretrained(base, max_shard_size="100KB")
    cases = [(folder / name, method, dtype) for name, method, dtype in CASES]
    return dict(zip(CASES, zip(*run_workers(2, compare_loads, cases), strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_model_read_by_shares_is_the_one_read_whole(compared, case):
    half = case[2] == "bfloat16"
    for found in compared[case]:
        assert not found.differing
        assert found.logits_differ_by <= (0.1 if half else 1e-5)
        for got, expected in zip(found.steps, found.expected, strict=True):
            assert got == pytest.approx(expected, rel=2e-2 if half else 1e-4)


def compare_tensors(rank: int, bases: list[Path]) -> list[list[str]]:
    return [differing_tensors(base, settings_of("full", "bfloat16"))[0] for base in bases]


@pytest.mark.full
def test_every_architecture_is_read_by_shares(tmp_path):
    bases = [make_tiny_model(tmp_path / str(i), name, **fields) for i, (name, fields) in enumerate(VARIANTS)]
    for found in run_workers(3, compare_tensors, bases):
        assert not [(*variant, names) for variant, names in zip(VARIANTS, found, strict=True) if names]


def test_a_worker_never_holds_the_whole_model(tmp_path):
    base = make_tiny_model(tmp_path, hidden_size=1024, intermediate_size=2048, num_attention_heads=32, head_dim=32)
    size = (base / "model.safetensors").stat().st_size
    assert size > 150e6, "far more than what the libraries themselves take meanwhile"
    for held in run_workers(4, hold_after_load, base):
        assert max(held) < size / 4 + 30e6


def hold_after_load(rank: int, base: Path) -> list[int]:
    """Return the bytes that loads for LoRA and full fine-tuning add to this process and are no file's."""
    return [added_by_load(base, method) for method in ("lora", "full")]


def added_by_load(base: Path, method: str) -> int:
    before = anonymous_bytes()
    module, _ = start(base, settings_of(method), 3)
    added = anonymous_bytes() - before
    assert sum(parameter.ds_numel for parameter in module.parameters() if hasattr(parameter, "ds_id")) > 30e6
    return added


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


class Alone(NamedTuple):
    """A state, and how one worker goes on from it."""

    base: Path
    saved: Path
    state: dict[str, torch.Tensor]
    steps: list[tuple[float, float]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Alone]:
    """By method a state, and the steps of one worker behind it."""
    base = make_tiny_model(tmp_path_factory.mktemp("base"), **FEW)
    folders = {method: tmp_path_factory.mktemp(method) for method in ("lora", "full")}
    states = {method: write_state(base, method, folder / "saved") for method, folder in folders.items()}
    [steps] = run_workers(1, resume_each, base, folders)
    return {method: Alone(base, folders[method] / "saved", states[method], steps[method]) for method in folders}


def resume_each(rank: int, base: Path, folders: dict[str, Path]) -> dict[str, list]:
    return {
        method: resume(rank, 1, base, method, 0, folder / "saved", folder / "alone")
        for method, folder in folders.items()
    }


@pytest.mark.parametrize(
    ("workers", "method"),
    [
        (3, "lora"),
        pytest.param(5, "full", marks=pytest.mark.full),
        pytest.param(7, "lora", marks=pytest.mark.full),
    ],
)
def test_a_state_moves_to_workers_that_divide_no_size(alone, tmp_path, workers, method):
    from safetensors.torch import load_file

    base, saved, state, expected = alone[method]
    assert any(values.numel() % workers for values in state.values())
    together = run_workers(workers, resume, workers, base, method, 3, saved, tmp_path)
    written = {}
    for path in tmp_path.iterdir():
        written |= load_file(path)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    for steps in together:
        for got, wanted in zip(steps, expected, strict=True):
            assert got == pytest.approx(wanted, rel=1e-4)
