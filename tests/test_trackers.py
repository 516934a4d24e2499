"""Trackers: each training is one run that survives restarts, and no tracker can stop, slow or fail a training."""

import importlib.util
import json
import os
import sqlite3
import sys
import threading
from types import SimpleNamespace

import pytest
from tracked import Server

from sdft_ray import trackers
from sdft_ray.errors import UserError
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.wording import validate
from sdft_ray.stages.train.log import Log
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage
from sdft_ray.trackers import Tracking, libraries, run_of

RUN = run_of(Stage("train", "tiny-sft", 1, {"train": {"lr": 1e-3, "lora": {"targets": ["q", "v"]}}}))


@pytest.fixture
def server():
    return Server()


def track(server: Server, storage: Storage, steps, names=("mlflow",), results=None) -> None:
    with Tracking(names, RUN, storage, "0123456789ab", server.make) as tracking:
        for step in steps:
            tracking.log(step, {"train/loss": 1 / step})
        if results:
            tracking.conclude(results)


def logged(steps) -> list:
    return [(step, {"train/loss": 1 / step}) for step in steps]


def test_tracking_settings_are_flat_and_plain():
    assert RUN.settings == {"train.lr": 1e-3, "train.lora.targets": "['q', 'v']"}
    assert RUN.name.startswith("tiny-sft-")


def test_tracking_after_a_restart_goes_on_in_the_same_run_and_logs_no_step_twice(server, storage):
    track(server, storage, [1, 2, 3])
    track(server, storage, [2, 3, 4])  # taken again from a checkpoint
    assert server.runs == {"run-0": logged([1, 2, 3, 4])}
    assert server.statuses == ["done", "done"]


def test_tracking_a_training_that_fails_is_closed_as_stopped(server, storage):
    with pytest.raises(KeyboardInterrupt), Tracking(["mlflow"], RUN, storage, "0", server.make) as tracking:
        tracking.log(1, {"train/loss": 1.0})
        raise KeyboardInterrupt
    assert server.statuses == ["stopped"]


def test_tracking_a_tracker_that_is_down_at_the_start_is_one_line_and_catches_up(server, storage, capsys):
    server.down = True
    track(server, storage, [1, 2])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"compute.track: mlflow: {RUN.name}: failed (ConnectionError: connection refused). "
        "Work goes on without it; the same command logs the rest when it answers."
    ]
    server.down = False
    track(server, storage, [1, 2, 3])
    assert server.runs == {"run-0": logged([1, 2, 3])}


def test_tracking_a_tracker_that_fails_in_the_middle_is_one_line_and_catches_up(server, storage, capsys):
    server.takes = 3  # the start and two steps
    track(server, storage, range(1, 9))
    assert server.runs == {"run-0": logged([1, 2])}
    assert capsys.readouterr().err.count("\n") == 1
    server.takes = 99
    track(server, storage, range(1, 9))
    assert server.runs == {"run-0": logged(range(1, 9))}


def test_tracking_a_tracker_that_hangs_holds_up_neither_the_others_nor_the_end(server, storage, capsys, monkeypatch):
    released, answered = threading.Event(), Server()
    monkeypatch.setattr(trackers, "_END_SECONDS", 0.2)

    def make(name):
        tracker = (server if name == "wandb" else answered).make(name)
        if name == "wandb":
            tracker.call = released.wait
        return tracker

    with Tracking(["wandb", "mlflow"], RUN, storage, "0", make) as tracking:
        tracking.log(1, {"train/loss": 1.0})
    assert answered.runs == {"run-0": logged([1])}
    assert capsys.readouterr().err.startswith(f"compute.track: wandb: {RUN.name}: does not answer. ")
    released.set()


def test_tracking_results_are_logged_once_and_a_run_with_nothing_new_is_not_opened(server, storage):
    track(server, storage, [1], results={"final/mean": 0.5})
    server.down = True
    track(server, storage, [1], results={"final/mean": 0.5})
    server.down = False
    track(server, storage, [1], results={"final/mean": 0.75})
    assert server.runs == {"run-0": [*logged([1]), (None, {"final/mean": 0.5}), (None, {"final/mean": 0.75})]}


def test_tracking_by_a_server_that_was_replaced_is_one_line_and_logs_everything_anew(
    server, storage, capsys, monkeypatch
):
    monkeypatch.setattr(trackers, "_replaced", set())
    other = RUN._replace(name="another")

    def track_both(to: Server, mean: float) -> None:
        for run, training in ((RUN, "0"), (other, "1")):
            with Tracking(["mlflow"], run, storage, training, to.make) as tracking:
                for step in (1, 2, 3):
                    tracking.log(step, {"train/loss": 1 / step})
                tracking.conclude({"final/mean": mean})

    track_both(server, 0.5)
    replaced = Server()
    track_both(replaced, 0.5)  # nothing new: nobody asks
    assert replaced.runs == {} and capsys.readouterr().err == ""
    for _ in range(2):
        track_both(replaced, 0.75)
    assert list(replaced.runs.values()) == 2 * [[*logged([1, 2, 3]), (None, {"final/mean": 0.75})]]
    assert capsys.readouterr().err == (
        "compute.track: mlflow: knows no run that was logged before: it is another server or store. "
        "Runs begin anew there with all their steps.\n"
    )


def test_tracking_by_nobody_writes_nothing(storage):
    track(Server(), storage, [1], names=())
    assert not (storage.root / "tracking").exists()


def test_watcher_of_a_training_passes_on_each_step_once_also_after_a_worker_began_again(server, storage, monkeypatch):
    import ray

    from sdft_ray.progress import Progress
    from sdft_ray.results import Step
    from sdft_ray.stages.train.fit import _Watcher
    from sdft_ray.stages.train.log import Begun, Stepped

    def took(number: int, loss: float | None = None) -> Step:
        return Step(step=number, loss=1 / number, lr=0.1, grad_norm=1.0, validation_loss=loss)

    def report(step: Step) -> Stepped:
        return Stepped(step, "", step.metrics() | {"tokens_per_second": 9.0})

    reports = [Begun(()), report(took(1)), report(took(2, 0.5)), Begun((took(1), took(2, 0.5))), report(took(3))]
    monkeypatch.setattr(ray, "get", lambda given: [given.pop(0) for _ in list(given)])
    ticker = SimpleNamespace(read=SimpleNamespace(remote=lambda: reports))
    validated, progress = [], Progress("train", "steps", 3)
    work = SimpleNamespace(progress=progress, validated=lambda *pair: validated.append(pair))
    with Tracking(["mlflow"], RUN, storage, "0", server.make) as tracking, _Watcher(work, ticker, tracking) as watcher:
        pass
    assert watcher.earlier_steps == 0, "what a dead worker did is of the same command"
    (run,) = server.runs.values()
    assert [(step, metrics["train/loss"]) for step, metrics in run] == [(n, 1 / n) for n in (1, 2, 3)]
    assert run[1][1]["train/validation_loss"] == 0.5 and run[2][1]["train/tokens_per_second"] == 9.0
    assert (validated, progress.done) == ([(2, 0.5)], 3)


def test_watcher_of_a_training_knows_the_steps_of_an_earlier_command(storage, monkeypatch):
    import ray

    from sdft_ray.progress import Progress
    from sdft_ray.results import Step
    from sdft_ray.stages.train.fit import _Watcher
    from sdft_ray.stages.train.log import Begun

    taken = tuple(Step(step=n, loss=1.0, lr=0.1, grad_norm=1.0) for n in (1, 2, 3))
    reports = [Begun(taken[:2]), Begun(taken)]  # a worker died behind the third
    monkeypatch.setattr(ray, "get", lambda given: [given.pop(0) for _ in list(given)])
    ticker = SimpleNamespace(read=SimpleNamespace(remote=lambda: reports))
    work = SimpleNamespace(progress=Progress("train", "steps", 4), validated=None)
    with Tracking([], RUN, storage, "0") as tracking, _Watcher(work, ticker, tracking) as watcher:
        pass
    assert watcher.earlier_steps == 2


def test_watcher_of_a_training_says_once_what_fails_and_goes_on(storage, monkeypatch, capsys):
    import ray

    from sdft_ray.progress import Progress
    from sdft_ray.results import Step
    from sdft_ray.stages.train.fit import _Watcher
    from sdft_ray.stages.train.log import Stepped

    steps = [Step(step=n, loss=1.0, lr=0.1, grad_norm=1.0, validation_loss=n / 2) for n in (1, 2, 3, 4)]
    reports = [[Stepped(step, "", {})] for step in steps]
    answers = iter([*reports[:2], OSError("no answer"), [*reports[2], *reports[3]]])
    read, validated = threading.Event(), []

    def get(_) -> list:
        answer = next(answers, [])
        if not answer:
            read.set()
        if isinstance(answer, OSError):
            raise answer
        return answer

    def pass_on(step: int, loss: float) -> None:
        if step in (1, 3):
            raise ValueError(f"nobody wants step {step}")
        validated.append((step, loss))

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(sys.modules[_Watcher.__module__], "_ASK_SECONDS", 0.01)
    ticker = SimpleNamespace(read=SimpleNamespace(remote=lambda: None))
    progress = Progress("train", "steps", 4)
    work = SimpleNamespace(progress=progress, validated=pass_on)
    with Tracking([], RUN, storage, "0") as tracking, _Watcher(work, ticker, tracking):
        assert read.wait(30)
    assert (validated, progress.done) == ([(2, 1.0), (4, 2.0)], 4)
    assert capsys.readouterr().err == (
        "train: its progress: ValueError: nobody wants step 1; nothing else depends on it, and further errors are not "
        "shown\n"
    )


# --- the compute file ----------------------------------------------------------------------------------------


def test_compute_file_with_an_unknown_tracker_is_one_clear_line():
    with pytest.raises(UserError) as error:
        validate(Compute, {"track": ["mlfow"]})
    (line,) = error.value.problems
    assert line.startswith("compute.track.0: ") and "mlflow" in line


def test_compute_file_with_a_tracker_twice_is_refused():
    with pytest.raises(UserError, match=r"^compute\.track: has a name twice\. Remove one"):
        validate(Compute, {"track": ["mlflow", "mlflow"]})


def test_tracker_without_its_library_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert list(libraries.missing(["trackio"])) == [
        "compute.track: the library of trackio is not installed. Do: pip install 'sdft-ray[trackio]', or remove it "
        "from track."
    ]


def test_tracker_is_not_taken_for_installed_because_of_the_folder_that_it_writes(tmp_path, monkeypatch):
    if (spec := importlib.util.find_spec("wandb")) and spec.origin:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert "wandb is not installed" in next(libraries.missing(["wandb"]))


def test_tracker_mlflow_without_an_address_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=name))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (line,) = libraries.missing(["wandb", "mlflow", "trackio"])
    assert line.startswith("compute.track: mlflow needs the variable MLFLOW_TRACKING_URI. ")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert list(libraries.missing(["mlflow"])) == []


# --- metrics.jsonl -------------------------------------------------------------------------------------------


def test_log_of_a_resumed_training_replaces_the_steps_that_are_taken_again(tmp_path):
    log = Log(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 2})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill
    log = Log(tmp_path, 2)  # the checkpoint has two steps behind it
    log.write(3, {"loss": 9.0, "validation_loss": 1.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert lines[2]["validation_loss"] == 1.0 and lines[0]["time"] <= lines[2]["time"]


# --- the libraries themselves, where they are installed ------------------------------------------------------


def track_twice(name: str, storage: Storage) -> None:
    """Log two steps, restart, log one of them again and another, then results."""
    for steps, results in (((1, 2), None), ((2, 3), {"final/mean": 0.5})):
        with Tracking([name], RUN._replace(group="sweep-1"), storage, "0123456789ab") as tracking:
            for step in steps:
                tracking.log(step, {"train/loss": 1 / step})
            if results:
                (storage.root / "metrics.jsonl").write_text("{}\n")
                tracking.conclude(results, [storage.root / "metrics.jsonl"])


def test_trackio_itself_keeps_one_run_of_a_training_that_was_restarted(storage, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which is read at the import
    pytest.importorskip("trackio")
    track_twice("trackio", storage)
    assert "compute.track" not in capsys.readouterr().err
    (database,) = (tmp_path / "trackio").glob("sdft_ray*.db")
    with sqlite3.connect(database) as connection:
        lines = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, *_ in lines} == {RUN.name}
    steps = [(step, metrics["train/loss"]) for _, step, text in lines if "train/loss" in (metrics := json.loads(text))]
    assert steps == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert json.loads(lines[-1][2])["final/mean"] == 0.5


def test_wandb_itself_writes_offline_what_sync_sends_later(storage, tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    track_twice("wandb", storage)
    assert "compute.track" not in capsys.readouterr().err
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1, "one run in two pieces"
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/files/metrics.jsonl")
    assert not kept.is_symlink()


def test_mlflow_itself_keeps_one_run_below_its_sweep(storage, tmp_path, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", os.environ.get("TEST_MLFLOW_URI", f"file://{tmp_path}/mlruns"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    track_twice("mlflow", storage)
    assert "compute.track" not in capsys.readouterr().err
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert {*by_name} == {RUN.name, "sweep-1"}
    run = by_name[RUN.name]
    assert run.data.tags["mlflow.parentRunId"] == by_name["sweep-1"].info.run_id
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert run.data.metrics["final/mean"] == 0.5 and run.data.params["train.lr"] == "0.001"
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["metrics.jsonl"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/another")
    monkeypatch.setattr(trackers, "_replaced", set())
    with Tracking(["mlflow"], RUN._replace(group="sweep-1"), storage, "0123456789ab") as tracking:
        for step in (1, 2, 3):
            tracking.log(step, {"train/loss": 1 / step})
        tracking.conclude({"final/mean": 0.75})
    line = "knows no run that was logged before: it is another server or store. Runs begin anew"
    errors = [error for error in capsys.readouterr().err.splitlines() if "compute.track" in error]
    assert len(errors) == 1 and line in errors[0]
    client = mlflow.MlflowClient()
    found = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id])
    (run,) = (run for run in found if run.info.run_name == RUN.name)
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3]
