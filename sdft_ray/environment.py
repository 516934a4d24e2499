"""All environment variables that this package sets for libraries, each with its reason.

A user's own values stay, except where they would break something. Ray, Tune, vLLM and DeepSpeed read
theirs when they are imported or started, so these functions are called before that.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def for_command() -> None:
    """Silence libraries before they are loaded: their bars, hints and accelerator guesses are not our interface."""
    _set_default(TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
    _set_default(DS_ACCELERATOR="cpu")  # for the driver; workers set their own


def for_ray() -> None:
    """Leave progress to this package, and usage reports to the user."""
    _set_default(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    _set_default(RAY_BACKEND_LOG_LEVEL="fatal")  # else the core writes to our stderr
    _set_default(RAY_TRAIN_ENABLE_PRINT_PATCH="0")
    # A thread that still works when Ray ends, after Ctrl-C, must not start another Ray.
    _set_default(RAY_ENABLE_AUTO_CONNECT="0")
    # The warning about the number of workers is dropped: they are kept on purpose.
    _set_default(RAY_DEDUP_LOGS_SKIP_REGEX="worker processes have been started")
    # On a busy machine a worker takes longer to start than the 60 s after which Ray gives it up; then `ray.init`
    # waits for ever for the first one (docs/footguns.md).
    _set_default(RAY_worker_register_timeout_seconds="300")


def for_local_ray(dashboard: str) -> None:
    """Prepare for a Ray that is started here."""
    # Workers need the dashboard's address: where several Rays share a machine they do not guess it, and the resources
    # of a dead trainer stay taken (docs/footguns.md).
    _force(RAY_API_SERVER_ADDRESS=dashboard)
    # Nobody takes this node away, so no process needs to watch for that. And an end is seen sooner.
    _set_default(RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0", RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5")
    # A worker that has imported lm-eval is kept for the next evaluation: Ray ends workers after an idle second.
    _set_default(RAY_idle_worker_killing_time_threshold_ms="30000")


def for_tune() -> None:
    """Keep Ctrl-C for this package, and a trial in the directory of the command."""
    _set_default(TUNE_DISABLE_SIGINT_HANDLER="1", RAY_CHDIR_TO_TRIAL_DIR="0", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1")
    _set_default(RAY_AIR_NEW_OUTPUT="0")  # the new one prints a table whatever its verbosity


def for_vllm(alone: bool) -> None:
    """Prepare for an engine in this process; alone: no other engine is on this machine."""
    _force(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING")
    _force(HF_HUB_OFFLINE="1")  # the model is a local directory
    # vLLM leaves a core idle and pins its threads; two engines on one machine must not pin to the same cores.
    _force(VLLM_CPU_NUM_OF_RESERVED_CPU="0")
    if not alone:
        _force(VLLM_CPU_OMP_THREADS_BIND="nobind")


def for_deepspeed(gpus: float) -> None:
    """Choose the accelerator of a training worker, instead of the driver's."""
    _force(DS_ACCELERATOR="cuda" if gpus else "cpu")


def for_tensors_on_cpus() -> dict[str, str]:
    """Return the variables of a worker that makes many tensors on a CPU of this machine, for Ray to start it with.

    It allocates by jemalloc, which Ray brings along: with the C library's allocator a training grows and slows down
    from step to step (docs/footguns.md). Nothing where Ray has none, or where the user has chosen one.
    """
    ray = importlib.util.find_spec("ray")
    library = Path(ray.origin if ray and ray.origin else "ray").parent / "core" / "libjemalloc.so"
    return {"LD_PRELOAD": str(library)} if library.is_file() and not os.environ.get("LD_PRELOAD") else {}


def for_upload() -> None:
    """Let the hub's client upload by plain HTTP: its other protocol has a client of its own, which no test reaches."""
    _set_default(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1")


def for_trackers() -> None:
    """Keep usage statistics of trackers at home, their notices off the terminal, and their waits short."""
    _set_default(MLFLOW_DISABLE_TELEMETRY="true", WANDB_ERROR_REPORTING="false", GRADIO_ANALYTICS_ENABLED="False")
    _set_default(MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true")
    # A server that is down is tried for minutes else, and each call of a run would begin anew.
    _set_default(MLFLOW_HTTP_REQUEST_TIMEOUT="10", MLFLOW_HTTP_REQUEST_MAX_RETRIES="2", WANDB_INIT_TIMEOUT="30")


def go_offline() -> None:
    """Keep this process from trying a network, and from its timeouts."""
    _force(HF_HUB_OFFLINE="1")


def forget(*names: str) -> None:
    """Remove variables."""
    for name in names:
        os.environ.pop(name, None)


def _set_default(**variables: str) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _force(**variables: str) -> None:
    os.environ.update(variables)
