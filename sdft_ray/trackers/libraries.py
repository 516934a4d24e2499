"""Weights & Biases, MLflow and Trackio, each through its own library, behind one protocol.

In: a run and its numbers. Out: what the library makes of them. Addresses and keys come from the environment alone, from
the variables that each library reads. Nothing goes out but what is given here: no host name, command line, code,
package list or load of the machine, and no usage statistics of the library (environment.py).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from sdft_ray import environment
from sdft_ray.errors import problem
from sdft_ray.spec.compute import TrackerName

PROJECT = "sdft_ray"
"""Where runs go unless the library's own variable names another project or experiment."""


class Run(NamedTuple):
    """One training, as people find it in a tracker."""

    name: str
    group: str | None
    """The sweep that it belongs to."""
    settings: Mapping[str, str | int | float]
    """By dotted key."""


class UnknownRun(Exception):
    """A tracker knows no run of a key: its server is another one."""


class Tracker(Protocol):
    """One run in one tracker. Every call may raise whatever the library raises."""

    def start(self, run: Run, key: str | None) -> str:
        """Open a new run, or the one with a key that `start` returned before; return its key. Raises UnknownRun."""
        ...

    def log(self, step: int | None, metrics: Mapping[str, float]) -> None:
        """Log numbers of a step (from 1), or of the run as a whole."""
        ...

    def artifact(self, file: Path) -> None:
        """Keep a small file with the run."""
        ...

    def finish(self, status: Literal["done", "stopped"]) -> None:
        """Close the run; `start` may open it again."""
        ...


class Wandb:
    """A run of Weights & Biases: on disk where the environment has no key, to be sent by `wandb sync` later."""

    def start(self, run: Run, key: str | None) -> str:
        import wandb

        variables = os.environ
        quiet = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=variables.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            group=run.group,
            id=key,
            resume="allow" if key else None,
            # Without a key the library would ask for one on the terminal.
            mode=variables.get("WANDB_MODE") or ("online" if variables.get("WANDB_API_KEY") else "offline"),
            reinit="create_new",  # trainings side by side have a run each
            settings=quiet,
        )
        self._run.config.update(dict(run.settings), allow_val_change=True)
        return str(self._run.id)

    def log(self, step: int | None, metrics: Mapping[str, float]) -> None:
        if step is None:
            self._run.summary.update(dict(metrics))
        else:
            self._run.log(dict(metrics), step=step)

    def artifact(self, file: Path) -> None:
        copy = shutil.copy(file, self._run.dir)  # of another file it keeps a link, which may break before `wandb sync`
        self._run.save(copy, base_path=self._run.dir, policy="now")

    def finish(self, status: Literal["done", "stopped"]) -> None:
        self._run.finish(exit_code=0 if status == "done" else 1)


class Mlflow:
    """A run of MLflow, by its client: no state of the process changes. A sweep is the parent of its runs."""

    _SWEEP = "sdft_ray.sweep"

    def start(self, run: Run, key: str | None) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient()
        if key is None:
            experiment = self._experiment()
            parent = {"mlflow.parentRunId": self._parent(experiment, run.group)} if run.group else {}
            key = str(self._client.create_run(experiment, tags=parent, run_name=run.name).info.run_id)
        else:
            try:
                self._client.update_run(key, status="RUNNING")
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    raise UnknownRun from error
                raise
        self._key = key
        # A value that is there already may be logged again as long as it is the same.
        self._client.log_batch(key, params=[Param(name, str(value)) for name, value in run.settings.items()])
        return key

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        return str(known.experiment_id if known else self._client.create_experiment(name))

    def _parent(self, experiment: str, sweep: str) -> str:
        """Return the run that stands for a sweep. The caller holds the sweep's lock, so there is one."""
        found = self._client.search_runs([experiment], f"tags.`{self._SWEEP}` = '{sweep}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        parent = str(self._client.create_run(experiment, tags={self._SWEEP: sweep}, run_name=sweep).info.run_id)
        self._client.set_terminated(parent)  # it only holds the others together
        return parent

    def log(self, step: int | None, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._key, [Metric(name, value, now, step or 0) for name, value in metrics.items()])

    def artifact(self, file: Path) -> None:
        self._client.log_artifact(self._key, str(file))

    def finish(self, status: Literal["done", "stopped"]) -> None:
        self._client.set_terminated(self._key, "FINISHED" if status == "done" else "KILLED")


class Trackio:
    """A run of Trackio: in its own database on this machine, unless the environment names a space or a server."""

    def start(self, run: Run, key: str | None) -> str:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=key or run.name,
            group=run.group,
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        return str(self._run.name)

    def log(self, step: int | None, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def artifact(self, file: Path) -> None:
        """Keep nothing: its files belong to a project, not to a run."""

    def finish(self, status: Literal["done", "stopped"]) -> None:
        self._run.finish()


_TRACKERS: Mapping[TrackerName, type[Any]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


def make(name: TrackerName) -> Tracker:
    """Return a tracker that has no run yet."""
    environment.for_trackers()
    tracker: Tracker = _TRACKERS[name]()
    return tracker


def missing(names: Iterable[TrackerName]) -> Iterator[str]:
    """Yield a problem for each tracker that cannot work here: without its library, or an address that it needs."""
    for name in names:
        # A folder `wandb`, which W&B writes where a command runs, counts as a package without an origin.
        if not ((spec := importlib.util.find_spec(name)) and spec.origin):
            do = f"Do: pip install 'sdft-ray[{name}]', or remove it from track"
            yield problem("compute.track", f"the library of {name} is not installed", do)
        elif name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
            do = "Set it to the address of your server, for example http://127.0.0.1:5000"
            yield problem("compute.track", "mlflow needs the variable MLFLOW_TRACKING_URI", do)
