"""A recipe as a job of a real Ray cluster with token authentication, on loopback."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import yaml
from command import sdft_anew
from machine import free_port
from ray._private.runtime_env.packaging import unzip_package
from recipes import write_recipe

from sdft_ray.errors import StageFailed, UserError
from sdft_ray.store.files import hash_source
from sdft_ray.submit import job, kuberay

TOKEN = "0f" * 32


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
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    session = requests.Session()
    retries = requests.adapters.Retry(total=60, connect=60, backoff_factor=0.2, backoff_max=1)
    session.mount("http://", requests.adapters.HTTPAdapter(max_retries=retries))
    session.get(f"{address}/api/version", timeout=60)
    yield address
    os.killpg(process.pid, signal.SIGKILL)  # told to end, it waits half a minute for its own processes
    process.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A directory with a recipe whose rows, texts and model are local files."""
    write_recipe(tmp_path, tiny_model, where=Path(), prune={"calibration": {"text": "texts.txt", "limit": 3}})
    return tmp_path


def sdft(*arguments: object, cwd: Path, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = str(cwd)  # where Ray looks for a token by itself
    if token:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    return sdft_anew(*arguments, cwd=cwd, environment=environment)


def ignore_everything(folder: Path) -> None:
    """Put a recipe's files where everything that Ray's packer looks at says to leave them out."""
    for file in (".gitignore", ".rayignore"):
        (folder / file).write_text("*\n")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    model = folder / "venv"  # Ray leaves out directories of this name wherever they are
    shutil.copytree(recipe["model"]["path"], model)
    (model / ".gitignore").write_text("*.safetensors\n*.json\n")
    (model / ".rayignore").write_text("*.jinja\n")
    (model / ".git" / "lfs").mkdir(parents=True)
    with (model / ".git" / "lfs" / "object").open("wb") as twice:
        twice.truncate(200_000_000)  # sparse; a clone of a hub's repository holds its weights twice
    recipe["model"]["path"] = str(model)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def pack(recipe: str, root: object, folder: Path) -> tuple[str, Path]:
    """Pack a recipe; return the command and the job's directory as a node unpacks it."""
    archive = folder / "job.zip"
    command = job.pack(Path(recipe), None, str(root), None, archive)
    unzip_package(archive, folder / "job", remove_top_level_directory=False, unlink_zip=False)
    return command, folder / "job"


def test_submitted_recipe_is_built_with_its_files_and_not_built_again(head, folder):
    ignore_everything(folder)
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


def test_upload_that_breaks_is_one_line_about_the_connection(tmp_path, monkeypatch):
    def submit_job(**_) -> str:
        raise ConnectionError("Connection aborted.")

    monkeypatch.setattr(job, "connect", lambda _: SimpleNamespace(submit_job=submit_job))
    with pytest.raises(
        StageFailed, match=r"^submit: the connection to http://h:1 is lost \(Connection aborted\.?\)\. "
    ):
        job.submit("http://h:1", tmp_path / "job.zip", "sdft run", "recipe.yaml")


def test_pack_ships_local_files_under_their_names_and_leaves_what_nodes_see(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    root = folder / "root"
    root.mkdir()
    shutil.copy("texts.txt", root / "shared.txt")
    axes = {"rows.path": ["rows.jsonl"], "prune.calibration": [{"text": str(root / "shared.txt")}, {"text": "boolq"}]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": axes}))
    command, job = pack("sweep.yaml", root, tmp_path)
    assert command.split()[2:5] == ["sdft_ray.cli", "sweep", "sweep.yaml"]
    packed = yaml.safe_load((job / "sweep.yaml").read_text())
    (rows,) = packed["axes"]["rows.path"]
    assert (job / rows).read_text() == (folder / "rows.jsonl").read_text() and Path(rows).name == "rows.jsonl"
    assert packed["axes"]["prune.calibration"] == [{"text": str(root / "shared.txt")}, {"text": "boolq"}]
    inner = yaml.safe_load((job / packed["recipe"][0]).read_text())
    assert (job / inner["model"]["path"] / "config.json").is_file()


def test_pack_ships_what_ignore_files_name_and_the_package_but_nothing_hidden(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    ignore_everything(folder)
    os.utime(folder / "rows.jsonl", (0, 0))  # older than a zip file can say
    _, job = pack("recipe.yaml", "/r", tmp_path)
    packed = yaml.safe_load((job / "recipe.yaml").read_text())
    model = job / packed["model"]["path"]
    assert {file.name for file in model.rglob("*")} == {
        file.name for file in (folder / "venv").iterdir() if not file.name.startswith(".")
    }
    assert (model / "model.safetensors").read_bytes() == (folder / "venv" / "model.safetensors").read_bytes()
    assert hash_source(model) == hash_source(folder / "venv")  # the same artifacts there as here
    assert (job / packed["rows"]["path"]).is_file() and (job / packed["prune"]["calibration"]["text"]).is_file()
    assert (job / "sdft_ray" / "submit" / "rayjob.yaml.jinja").is_file() and not list(job.rglob("*.pyc"))


def test_pack_of_the_same_files_is_the_same_package(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    first, second = tmp_path / "first.zip", tmp_path / "second.zip"
    job.pack(Path("recipe.yaml"), None, "/r", None, first)
    (folder / "rows.jsonl").touch()
    job.pack(Path("recipe.yaml"), None, "/r", None, second)
    assert first.read_bytes() == second.read_bytes()  # Ray uploads it once


def test_pack_leaves_a_users_own_options_alone(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    options = {"text": "rows.jsonl", "path": "nowhere"}
    recipe["distill"] = {"template_options": options}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    _, job = pack("recipe.yaml", "/r", tmp_path)
    assert yaml.safe_load((job / "recipe.yaml").read_text())["distill"]["template_options"] == options


def test_pack_of_a_name_that_ray_does_not_unpack_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    shutil.copy("rows.jsonl", "rows\\old.jsonl")
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["rows"]["path"] = "rows\\old.jsonl"
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=r"has a name that Ray does not unpack\. Rename it"):
        job.pack(Path("recipe.yaml"), None, "/r", None, tmp_path / "job.zip")


@pytest.mark.parametrize(
    ("root", "right"), [("s3:/b/x", "s3://b/x"), ("S3://b/x", "s3://b/x"), ("file:///shared/x", "/shared/x")]
)
def test_root_that_is_spelled_wrongly_is_refused_with_the_right_spelling(folder, tmp_path, root, right):
    for refuse in (
        lambda: job.pack(folder / "recipe.yaml", None, root, None, tmp_path / "job.zip"),
        lambda: kuberay.render(folder / "recipe.yaml", None, root, None, "image"),
    ):
        with pytest.raises(UserError, match=rf"^--root: .*\. Write {right}\.$"):
            refuse()


def test_pack_of_a_large_file_says_to_put_it_under_the_root(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    with (folder / "rows.jsonl").open("a") as rows:
        rows.truncate(200_000_000)  # sparse
    with pytest.raises(UserError, match=r"rows.jsonl: 200 MB; a job carries at most 90 MB in all. Put it under /r and"):
        job.pack(Path("recipe.yaml"), None, "/r", None, tmp_path / "job.zip")
