"""What a built wheel holds is enough: commands run from it outside the checkout, with nothing of the checkout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The directory that a wheel of this checkout is installed in, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools writes build/ and an egg-info beside what it builds
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "sdft_ray", source / "sdft_ray", ignore=shutil.ignore_patterns("__pycache__"))
    run_pip("wheel", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    run_pip("install", "--target", folder / "installed", wheel)
    return folder / "installed"


def run_pip(command: str, *arguments: object) -> None:
    """Run pip without a network."""
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", command, "--no-deps", "--no-index", *arguments]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def sdft_of(installed: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run the installed command; it fails where anything of the package is imported from elsewhere."""
    code = (
        "import sys, sdft_ray.cli; code = sdft_ray.cli.main(sys.argv[2:]); "
        "files = [m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] == 'sdft_ray']; "
        "assert all(f.startswith(sys.argv[1]) for f in files), files; sys.exit(code)"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code, installed, *arguments]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def test_wheel_holds_every_file_of_the_package(installed):
    wanted = {path.relative_to(ROOT) for path in (ROOT / "sdft_ray").rglob("*") if path.is_file()}
    wanted = {path for path in wanted if "__pycache__" not in path.parts}
    assert {path for path in wanted if not (installed / path).is_file()} == set()


def test_wheel_has_the_command(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, installed / "bin" / "sdft", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0 and "explain" in done.stdout, done.stderr


def test_wheel_prints_the_schema(installed, tmp_path):
    done = sdft_of(installed, "schema", "recipe", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((ROOT / "docs/schema/recipe.json").read_text())


def test_wheel_writes_and_checks_a_recipe(installed, tiny_model, tmp_path):
    rows = "".join(json.dumps({"question": f"{i}?", "answer": f"{i}"}) + "\n" for i in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    for arguments in (("init", "--model", tiny_model, "--rows", "rows.jsonl"), ("check", "recipe.yaml")):
        done = sdft_of(installed, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "missing" in done.stdout
