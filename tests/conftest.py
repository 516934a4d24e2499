"""What tests share: a tiny model, one Ray, and no network."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The directory of a tiny random Llama; read it, never write to it."""
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for all tests that need one; its address."""
    import ray

    from sdft_ray.cluster import ray_cluster
    from sdft_ray.compute import load_compute

    with ray_cluster(load_compute()):
        yield ray.get_runtime_context().gcs_address
