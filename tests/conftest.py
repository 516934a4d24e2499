"""What tests share: a tiny model, one Ray, and no network."""

import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from heavy import has_light_tests, is_heavy, refuse_ray

pytest.register_assert_rewrite("faked")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_configure(config) -> None:
    from hypothesis import settings

    settings.register_profile("any machine", deadline=None)  # a busy one may stop for a second
    settings.load_profile("any machine")
    # A script's background jobs ignore Ctrl-C, and so would the commands that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "not heavy" in config.option.markexpr:
        refuse_ray()


# Files that take half a minute or more, the longest first: two workers, which take a file at a time, end together.
LONGEST = ("test_train", "test_trials", "test_kill", "test_notebook", "test_chain", "test_distill", "test_submit")
LONGEST += ("test_finals", "test_evaluate_pool", "test_wrapped", "test_object_store", "test_teacher", "test_nodes")
LONGEST += ("test_score", "test_soft_arm", "test_loss")


def pytest_ignore_collect(collection_path, config) -> bool | None:
    """Import no file of which no test runs: it takes seconds."""
    wants_light = "not heavy" in config.option.markexpr and collection_path.match("test_*.py")
    return True if wants_light and not has_light_tests(collection_path) else None


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        if is_heavy(item.path, {item.originalname, *item.fixturenames}):
            item.add_marker("heavy")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    if not any(item.get_closest_marker("heavy") for item in session.items):
        return (yield)
    from forked_workers import forked_workers

    with tempfile.TemporaryDirectory() as folder, forked_workers(Path(folder)):
        return (yield)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The directory of a tiny random Llama; read it, never write to it."""
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def storage(tmp_path):
    """An empty root in a directory."""
    from sdft_ray.store.storage import Storage

    return Storage(str(tmp_path / "root"))


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for all tests that need one; its address."""
    import ray

    from sdft_ray.cluster import ray_cluster
    from sdft_ray.spec.compute import load_compute

    with ray_cluster(load_compute()):
        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="session")
def s3_proxy():
    """A proxy in front of an S3-speaking server, for all tests that need one."""
    from s3 import Proxy, s3_server

    with s3_server() as address:
        yield Proxy(address)


@pytest.fixture
def s3(s3_proxy, monkeypatch, tmp_path) -> str:
    """The URI of an empty root in a bucket of its own; this process reaches it, and keeps its copy in tmp_path."""
    import json
    import uuid

    import boto3
    import fsspec

    settings = {
        "AWS_ACCESS_KEY_ID": "planted-key",
        "AWS_SECRET_ACCESS_KEY": "planted-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_proxy.url,
        "AWS_MAX_ATTEMPTS": "2",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "FSSPEC_S3": json.dumps({"config_kwargs": {"read_timeout": 1, "connect_timeout": 1}}),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", json.loads(settings["FSSPEC_S3"]))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/some/artifacts"


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """This process remembers hashes and keeps copies in a directory of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)
