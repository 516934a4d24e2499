"""A recipe as a job of a real Ray cluster with token authentication, on loopback."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import requests
import yaml

from sdft_ray import submit
from sdft_ray.errors import UserError

TOKEN = "0f" * 32


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


@pytest.fixture(scope="module")
def head():
    """The dashboard's address of a Ray head that asks for a token; it ends with the tests."""
    folder = Path(tempfile.mkdtemp(prefix="sdft-"))  # short: sockets lie below it
    ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    ports["ray-client-server-port"] = free_port()
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PATH": path}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    session = requests.Session()
    retries = requests.adapters.Retry(total=60, connect=60, backoff_factor=0.2, backoff_max=1)
    session.mount("http://", requests.adapters.HTTPAdapter(max_retries=retries))
    session.get(f"{address}/api/version", timeout=60)
    yield address
    process.terminate()
    process.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A directory with a recipe whose rows, texts and model are local files."""
    rows = "".join(json.dumps({"q": f"{i}?", "a": f"{i}"}) + "\n" for i in range(9))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "texts.txt").write_text("\n\n".join(f"Text number {i}." for i in range(6)))
    recipe = {
        "model": {"path": str(tiny_model)},
        "rows": {"path": "rows.jsonl", "fields": {"prompt": "q", "response": "a"}, "held_out": 2, "validation": 2},
        "prune": {"blocks": 2, "calibration": {"text": "texts.txt", "limit": 3}},
        "evaluate": {"tasks": ["held_out"]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def sdft(*arguments: object, cwd: Path, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = str(cwd)  # where Ray looks for a token by itself
    if token:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [sys.executable, "-m", "sdft_ray.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_submitted_recipe_is_built_with_its_files_and_not_built_again(head, folder):
    arguments = ("submit", "recipe.yaml", "--address", head, "--root", folder / "root", "--until", "cut")
    first = sdft(*arguments, cwd=folder)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "cut: " in first.stdout
    (manifest,) = (folder / "root" / "cut").glob("*/manifest.json")
    made = manifest.stat().st_mtime_ns
    again = sdft(*arguments, cwd=folder)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Nothing to do" in again.stdout
    assert manifest.stat().st_mtime_ns == made
    # What was built from files that travelled is what is found from here.
    plan = json.loads(sdft("check", "recipe.yaml", "--root", folder / "root", "--json", cwd=folder).stdout)
    assert {line["stage"]: line["status"] for line in plan}["cut"] == "done"


def test_submitted_job_that_fails_ends_with_its_exit_code_and_line(head, folder):
    (folder / "rows.jsonl").write_text("")
    done = sdft("submit", "recipe.yaml", "--address", head, "--root", folder / "root", cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "rows: 0 usable rows (of 0) leave none to train on" in done.stdout


@pytest.mark.parametrize("token", [None, "1e" * 32])
def test_client_without_the_token_is_refused_in_one_line(head, folder, token):
    done = sdft("submit", "recipe.yaml", "--address", head, "--root", "/r", cwd=folder, token=token)
    assert done.returncode == 2
    assert done.stderr == (
        f"{head}: this cluster asks for a token, and yours is missing or wrong. "
        "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token.\n"
    )


def test_submit_where_nobody_answers_or_without_a_shared_root_is_refused_in_one_line(folder):
    nobody = f"http://127.0.0.1:{free_port()}"
    done = sdft("submit", "recipe.yaml", "--address", nobody, "--root", "/r", cwd=folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"{nobody}: no Ray dashboard answers")
    done = sdft("submit", "recipe.yaml", "--address", nobody, cwd=folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("--root: ./artifacts is relative")


def test_pack_ships_local_files_under_their_names_and_leaves_what_nodes_see(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    root = folder / "root"
    root.mkdir()
    shutil.copy("texts.txt", root / "shared.txt")
    axes = {"rows.path": ["rows.jsonl"], "prune.calibration": [{"text": str(root / "shared.txt")}, {"text": "boolq"}]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": axes}))
    bundle = tmp_path / "bundle"
    command = submit.pack(Path("sweep.yaml"), None, str(root), None, bundle)
    assert command.split()[2:5] == ["sdft_ray.cli", "sweep", "sweep.yaml"]
    packed = yaml.safe_load((bundle / "sweep.yaml").read_text())
    (rows,) = packed["axes"]["rows.path"]
    assert (bundle / rows).read_text() == (folder / "rows.jsonl").read_text() and Path(rows).name == "rows.jsonl"
    assert packed["axes"]["prune.calibration"] == [{"text": str(root / "shared.txt")}, {"text": "boolq"}]
    inner = yaml.safe_load((bundle / packed["recipe"][0]).read_text())
    assert (bundle / inner["model"]["path"] / "config.json").is_file()


def test_pack_of_a_large_file_says_to_put_it_under_the_root(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    with (folder / "rows.jsonl").open("a") as rows:
        rows.truncate(200_000_000)  # sparse
    with pytest.raises(UserError, match=r"rows.jsonl: 200 MB; 90 MB in all travel with a job. Put it under /r and"):
        submit.pack(Path("recipe.yaml"), None, "/r", None, tmp_path / "bundle")
