"""Tests are sorted by what they start."""

import pytest
from heavy import is_heavy

FILE = """
import subprocess
import pytest
from command import sdft as command
from tiny import make_tiny_model

@pytest.fixture
def cluster(ray_cluster):
    return ray_cluster

def run(*words):
    return command(*words, cwd=".")

def test_fixture(cluster): ...
def test_helper(): run("check")
def test_directly(): subprocess.run(["true"])
def test_import(): import ray.data
def test_vllm():
    from sdft_ray.verify.agreement import compare_with_vllm
def test_nothing(tmp_path): make_tiny_model(tmp_path)
"""


@pytest.mark.parametrize("name", ["fixture", "helper", "directly", "import", "vllm", "nothing"])
def test_what_is_heavy_is_told_from_what_is_not(tmp_path, name):
    file = tmp_path / "test_file.py"
    file.write_text(FILE)
    assert is_heavy(file, {f"test_{name}"}) == (name != "nothing")
