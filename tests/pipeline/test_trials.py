"""A sweep through the command on a tiny model: real Ray Tune, Ray Train and lm-eval, a fake at the engine boundary."""

import csv
import io
import json
import os
import re
import signal
import time
from pathlib import Path

import faked
import psutil
import pytest
import yaml
from command import sdft
from events import read_events
from faked import finish, kill, wait_for

from sdft_ray import pipeline
from sdft_ray.cluster import require_capacity
from sdft_ray.data.benchmarks import offline_task_file
from sdft_ray.errors import UserError
from sdft_ray.spec.compute import Compute, cores, load_compute
from sdft_ray.spec.wording import validate
from sdft_ray.stages import evaluate
from sdft_ray.store.identity import Stage
from sdft_ray.store.manifest import read_manifest
from sdft_ray.store.objects import Objects
from sdft_ray.store.storage import Storage


def make_folder(folder: Path, tiny_model: Path, address: str, axes, asha=None, seconds_a_row=0, **more) -> Path:
    compute = {
        "ray": {"address": address},
        "score": {"cpus": 1},
        "distill": {"cpus": 1, "piece_rows": 4},
        "train": {"workers": 1, "cpus": 1, "micro_batch": 4, "checkpoint_every_steps": 2},
    }
    train = {"global_batch_size": 8, "lr": 1e-3, "validate_every_steps": 2}
    faked.make_folder(folder, tiny_model, compute, rows=32, seconds_a_row=seconds_a_row, train=train, **more)
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": axes, "asha": asha}))
    return folder


def start(folder: Path, *more: str, **environment: str):
    return faked.start(folder, "sweep", "sweep.yaml", *more, **environment)


@pytest.fixture(scope="module")
def swept(ray_cluster, tiny_model, tmp_path_factory):
    """A sweep of three trials, one of which must fail, in its own directory; and what its command said."""
    axes = [{"prune.blocks": [2]}, {"prune.blocks": [2], "arms.distilled.lr": [1e30]}]
    draft = {"models": ["distilled"], "prompts": 1, "tokens": [1], "max_new_tokens": 4, "dtype": "float32"}
    folder = make_folder(tmp_path_factory.mktemp("sweep"), tiny_model, ray_cluster, axes, draft=draft)
    process = start(folder, "--json", "--html", "sweep.html", "--csv", "sweep.csv")
    out, errors = process.communicate()
    assert process.returncode == 1, errors
    return folder, json.loads(out), errors


def test_sweep_shows_a_failed_trial_with_its_reason_and_finishes_the_others(swept):
    _, report, errors = swept
    assert [(trial["arm"], trial["status"]) for trial in report["trials"]] == [
        ("sft", "done"), ("distilled", "done"), ("distilled", "failed")
    ]  # fmt: skip
    failed = report["trials"][2]
    assert failed["values"] == {"arms.distilled.lr": 1e30}
    assert re.search(r"train: the loss at step \d is (nan|inf)", failed["reason"])
    assert errors.strip().splitlines()[-1].startswith("sweep: 1 failed, 2 of 3 trials are done.")
    assert "Traceback" not in errors


def test_sweep_tries_drafts_of_what_was_trained_and_tells_what_it_leaves_out(swept):
    _, report, errors = swept
    assert "draft distilled, lr 1e+30, blocks 2: left out, there is no such model" in errors
    (draft,) = report["drafts"]
    assert (draft["arm"], draft["blocks"], draft["greedy"]["tokens"], report["untried"]) == ("distilled", 2, 1, [])
    assert draft["greedy"]["speedup"] > 0 and [trial["draft"] is None for trial in report["trials"]] == [
        True, False, True
    ]  # fmt: skip


@pytest.mark.full
def test_sweep_with_a_goal_trains_until_it_is_decided_and_shares_artifacts_with_a_grid(
    ray_cluster, tiny_model, tmp_path
):
    folder = make_folder(tmp_path, tiny_model, ray_cluster, {"prune.blocks": [1, 2]})
    sweep = {"recipe": "recipe.yaml", "axes": {"prune.blocks": [1, 2]}, "goal": {"recovery": 1e6, "arm": "sft"}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    before = sdft("report", "sweep.yaml", cwd=folder)
    assert before.returncode == 2 and before.stderr.count("\n") == 1
    out, errors = start(folder, "--json", "--html", "sweep.html").communicate()
    goal = json.loads(out)["goal"]
    assert (goal["chosen"], goal["following"], goal["depths"], len(goal["lines"])) == (None, None, [1, 2], 1), errors
    assert goal["lines"][0].startswith("1 block: recovery ") and goal["lines"][0].endswith("which misses 1e+06 %")
    assert "no depth keeps 1e+06 %" in (folder / "sweep.html").read_text()
    trained = [*folder.glob("artifacts/train/*")]
    assert len(trained) == 1
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep | {"goal": {"recovery": 1e-6, "arm": "sft"}}))
    out, errors = start(folder, "--json").communicate()
    assert json.loads(out)["goal"]["chosen"] == 2, errors
    assert len([*folder.glob("artifacts/train/*")]) == 2


@pytest.mark.parametrize("command", ["sweep", "run"])
def test_command_scores_while_it_generates_and_ends_at_once_when_interrupted(
    ray_cluster, tiny_model, tmp_path, command
):
    folder = make_folder(tmp_path, tiny_model, ray_cluster, {"prune.blocks": [1, 2]}, seconds_a_row=2.0)
    artifacts = folder / "artifacts"
    process = faked.start(folder, command, {"sweep": "sweep.yaml", "run": "recipe.yaml"}[command])
    wait_for(process, lambda: list(artifacts.glob("score/*")) and list(artifacts.glob("ledger/*/part-*")))
    assert not list(artifacts.glob("distill/*")), "64 seconds are not over"
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors.strip().splitlines()[-1]) == (
        130, "Stopped. Finished work is kept; the same command goes on from there."
    ), errors  # fmt: skip
    assert "Traceback" not in errors
    assert not [child for child in started if child.is_running()]


def test_run_evaluates_what_is_there_while_it_trains(ray_cluster, tiny_model, tmp_path):
    folder = make_folder(tmp_path, tiny_model, ray_cluster, {"prune.blocks": [2]}, arms={"distilled": {}})
    errors = finish(faked.start(folder, "run", "recipe.yaml"))
    times = {}
    for path in folder.glob("artifacts/*/*/manifest.json"):
        seconds = read_manifest(path.parent).provenance.wall_seconds
        times[path.parent.name.rpartition("-")[0]] = (path.stat().st_mtime - seconds, path.stat().st_mtime)
    (trained,) = [times[path.name.rpartition("-")[0]] for path in folder.glob("artifacts/train/*")]
    for model in ("base", "pruned"):
        begun, ended = times[f"arc-easy-{model}"]
        assert trained[0] < ended and begun < trained[1], f"{model} was not evaluated beside the training"
    assert times["arc-easy-distilled"][0] > trained[1]
    lines = [line for line in errors.splitlines() if ": beside" in line and "which is done" not in line]
    assert lines == ["score, cut: beside distill", "evaluate: beside train"]


def test_evaluations_end_with_the_one_beside_them_that_fails(ray_cluster, tiny_model, tmp_path):
    storage, compute = Storage(str(tmp_path / "root")), load_compute()

    def evaluation(task: str, model: Path) -> Stage:
        settings = evaluate.TaskSettings(
            task=task,
            dtype="float32",
            metric="acc,none",
            shots=0,
            limit=None,
            chat_template=False,
            file=str(offline_task_file(task)),
        )
        base = Stage("model", "tiny", 1, {"name": model.name}, location=model)
        return Stage("evaluate", task, 1, settings, {"model": base})

    (tmp_path / "empty").mkdir()
    failing, long = evaluation("arc_easy", tmp_path / "empty"), evaluation("hellaswag", tiny_model)  # 10,042 items
    with pytest.raises(UserError, match=r"empty/config\.json: does not exist"):
        pipeline.build([failing, long], compute, storage)
    everything = {"evaluate": {"cpus": cores()}, "ray": {"wait_seconds": 15}}
    require_capacity(validate(Compute, compute.model_dump(mode="json") | everything), evaluate.NEEDS, "evaluate")
    assert storage.status(long) == "missing"


@pytest.mark.full
def test_sweep_whose_drafts_fail_names_each_and_keeps_the_rest(swept):
    folder, _, _ = swept
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["draft"] |= {"models": ["pruned", "sft"], "max_new_tokens": 10**6}  # more than the model's context
    (folder / "long.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "failing.yaml").write_text(yaml.safe_dump({"recipe": "long.yaml", "axes": {"prune.blocks": [2]}}))
    process = faked.start(folder, "sweep", "failing.yaml", "--json")
    out, errors = process.communicate()
    assert process.returncode == 1, errors
    assert [(d["draft"], d["status"]) for d in json.loads(out)["untried"]] == [
        ("draft pruned, blocks 2", "failed"), ("draft sft, blocks 2", "failed")
    ]  # fmt: skip
    assert errors.strip().splitlines()[-1].startswith("sweep: 2 failed, 2 of 2 trials are done.")


def test_sweep_reports_recovery_and_a_paired_difference(swept):
    _, report, _ = swept
    base, pruned = report["models"]
    assert (base["model"], pruned["model"], pruned["blocks"]) == ("base", "pruned", 2)
    assert base["recovery"] == 100 and pruned["parameters"] < base["parameters"]
    assert [(group["arm"], group["rows"], group["chosen"]) for group in report["groups"]] == [
        ("sft", 32, True), ("distilled", 32, True)
    ]  # fmt: skip
    (compared,) = report["comparisons"]
    means = {group["arm"]: group["mean"] for group in report["groups"]}
    assert compared["mean"]["value"] == pytest.approx(means["distilled"] - means["sft"])
    assert compared["mean"]["low"] <= compared["mean"]["value"] <= compared["mean"]["high"]
    assert compared["mean"]["n"] == compared["tasks"]["arc_easy"]["n"] == 20


def test_sweep_page_is_one_file_without_network_that_links_manifests(swept):
    folder, report, _ = swept
    html = (folder / "sweep.html").read_text()
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    for outside in ("http://", "https://", "<script", "<link", "@import", "url("):
        assert outside not in re.sub(r"url\(#\w+\)", "", without_namespaces)
    links = re.findall(r'<a href="([^"]+)"', html)
    assert [read_manifest((folder / link).parent).id for link in links] == [
        trial["id"] for trial in report["trials"] if trial["status"] == "done"
    ]
    for said in ("LIMITED", "Failed: 2 blocks, 32 rows, distilled", "Recovery by depth", "blocks [", "arc_easy"):
        assert said in html


def test_sweep_csv_has_one_line_a_trial(swept):
    folder, report, _ = swept
    lines = list(csv.DictReader(io.StringIO((folder / "sweep.csv").read_text())))
    assert [(line["id"], line["status"]) for line in lines] == [(t["id"], t["status"]) for t in report["trials"]]
    assert float(lines[0]["arc_easy"]) == report["trials"][0]["tasks"]["arc_easy"]["value"]
    assert lines[2]["arms.distilled.lr"] == "1e+30" and lines[2]["mean"] == ""


def test_sweep_artifacts_are_those_of_a_recipe_run_alone(swept):
    folder, report, _ = swept
    plan = json.loads(sdft("check", "recipe.yaml", "--json", "--compute", "compute.yaml", cwd=folder).stdout)
    assert {line["status"] for line in plan["stages"]} == {"done"}
    manifest = read_manifest(Path(report["trials"][0]["directory"]))
    assert manifest.provenance.command == ("script.py", "sweep"), "the driver's, though a worker wrote it"
    assert not list((folder / "artifacts" / "scratch").glob("sweep-*"))


def test_sweep_run_again_submits_no_finished_trial(swept):
    folder, _, _ = swept
    before = {path: path.stat().st_mtime_ns for path in (folder / "artifacts").rglob("manifest.json")}
    (folder / "good.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": {"prune.blocks": [2]}}))
    again = sdft("sweep", "good.yaml", "--compute", "compute.yaml", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "Nothing to do: all 12 artifacts are there already" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "artifacts").rglob("manifest.json")} == before


@pytest.mark.full
def test_sweep_whose_trial_and_then_driver_are_killed_repeats_no_finished_trial(
    ray_cluster, tiny_model, tmp_path, record_property
):
    from ray.util.state import list_actors

    folder = make_folder(tmp_path, tiny_model, ray_cluster, {"prune.blocks": [2, 3]}, arms={"sft": {}})
    artifacts = folder / "artifacts"
    process = start(folder)
    wait_for(process, lambda: list(artifacts.glob("resumable/train/*/ray_train*/checkpoint_*")))
    trials = list_actors(address=ray_cluster, filters=[("class_name", "=", "ImplicitFunc"), ("state", "=", "ALIVE")])
    assert trials
    for trial in trials:
        os.kill(trial.pid, signal.SIGKILL)
    wait_for(process, lambda: list(artifacts.glob("train/*/manifest.json")))
    kill(process)
    before = {path: path.stat().st_mtime_ns for path in artifacts.glob("*/*/manifest.json")}
    assert all(len(json.loads(path.read_text())) == 4 for path in artifacts.glob("train/*/losses.json"))

    begun = time.time()
    again = start(folder, "--json")
    wait_for(again, lambda: set(artifacts.glob("*/*/manifest.json")) - before.keys())
    record_property("sweep: seconds from the command to the next artifact", time.time() - begun)
    out, errors = again.communicate()
    assert again.returncode == 0, errors
    steps = [step for log in artifacts.glob("train/*/tensorboard") for step, _ in read_events(log, "train/loss")]
    record_property("sweep: steps taken again", len(steps) - 8)
    assert [trial["status"] for trial in json.loads(out)["trials"]] == ["done", "done"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list((artifacts / "failures").glob("*"))


@pytest.mark.full
def test_sweep_in_an_object_store_is_killed_on_one_node_and_ended_on_another(tiny_model, s3, tmp_path):
    folder = make_folder(tmp_path, tiny_model, "local", {"prune.blocks": [2, 3]}, arms={"sft": {}})
    objects = Objects(s3)

    def manifests(stage: str) -> dict[str, bytes]:
        keys = [key for key in objects.list() if key.startswith(f"{stage}/") and key.endswith("/manifest.json")]
        return {key: objects.read(key) for key in keys}

    process = start(folder, "--root", s3, XDG_CACHE_HOME=str(tmp_path / "first"))
    wait_for(process, lambda: manifests("train"))
    kill(process)
    before = manifests("train")

    again = start(folder, "--json", "--root", s3, XDG_CACHE_HOME=str(tmp_path / "second"))
    out, errors = again.communicate()
    assert again.returncode == 0 and "planted" not in errors, errors
    assert [trial["status"] for trial in json.loads(out)["trials"]] == ["done", "done"]
    assert before.items() <= manifests("train").items() and len(manifests("train")) == 2
    assert not any(key.startswith(("failures", "resumable", "scratch")) for key in objects.list())

    shown = sdft("report", "sweep.yaml", "--json", "--html", "sweep.html", "--root", s3, cwd=folder)
    assert shown.returncode == 0 and json.loads(shown.stdout)["groups"] == json.loads(out)["groups"], shown.stderr
    assert "Nothing to do" in finish(start(folder, "--root", s3))


@pytest.mark.full
def test_sweep_with_asha_stops_a_trial_that_learns_less_and_does_not_try_it_again(ray_cluster, tiny_model, tmp_path):
    axes = {"prune.blocks": [2], "train.lr": [1e-3, 1e-9], "train.epochs": [4]}
    asha = {"grace_steps": 4, "reduction_factor": 2}
    folder = make_folder(tmp_path, tiny_model, ray_cluster, axes, asha, arms={"sft": {}})
    out, errors = (process := start(folder, "--json", "--html", "sweep.html")).communicate()
    assert process.returncode == 0, errors
    good, bad = json.loads(out)["trials"]
    assert (good["status"], bad["status"]) == ("done", "stopped")
    step = int(re.fullmatch(r"stopped at step (\d+), validation loss \d+\.\d+", bad["reason"])[1])
    assert 4 <= step < 16 and bad["reason"] in errors and bad["reason"] in (folder / "sweep.html").read_text()
    again = sdft("sweep", "sweep.yaml", "--compute", "compute.yaml", cwd=folder)
    assert again.returncode == 0 and "Nothing to do" in again.stderr, again.stderr
    (folder / "artifacts" / "failures").rename(tmp_path / "forgotten")
    for evaluation in (folder / "artifacts" / "evaluate").glob("arc-easy-sft-*"):
        # the finished trial is open again: it reports its losses to the other once more
        evaluation.rename(tmp_path / "lost")
    third = sdft("sweep", "sweep.yaml", "--compute", "compute.yaml", "--json", cwd=folder)
    assert [trial["status"] for trial in json.loads(third.stdout)["trials"]] == ["done", "stopped"], third.stderr


def test_report_of_a_sweep_that_is_not_finished_shows_what_is_there(swept):
    folder, report, _ = swept
    axes = [{"prune.blocks": [2]}, {"prune.blocks": [2], "train.seed": [7]}]
    (folder / "more.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": axes}))
    shown = json.loads(sdft("report", "more.yaml", "--json", cwd=folder).stdout)
    assert [trial["status"] for trial in shown["trials"]] == ["done", "done", "missing", "missing"]
    assert shown["groups"] == report["groups"]
