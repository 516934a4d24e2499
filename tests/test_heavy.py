"""Tests are sorted by what they start."""

import pytest
from heavy import has_light_tests, is_heavy

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


def test_file_whose_tests_are_all_heavy_is_told_from_others(tmp_path):
    heavy, _, light = FILE.rpartition("\ndef test_nothing")
    texts = (
        (FILE, True),
        (heavy, False),
        (f"pytestmark = pytest.mark.heavy\ndef test_nothing{light}", False),
        (f"pytestmark = pytest.mark.usefixtures('other')\ndef test_nothing{light}", True),
        (f"OTHERS = pytest.param(1, marks=pytest.mark.heavy)\ndef test_nothing{light}", True),
    )
    for i, (text, expected) in enumerate(texts):
        file = tmp_path / f"test_{i}.py"
        file.write_text(text)
        assert has_light_tests(file) == expected, text
