"""Workers that are forked end as their clients see it, and with them."""

import json
import os
import shlex
import signal
import subprocess

import psutil
import pytest
from forked_workers import CONFIG


@pytest.fixture
def start(tmp_path):
    """Return what starts a program as Ray starts a worker."""

    def begin(text: str, *arguments: str, **variables: str) -> subprocess.Popen:
        (tmp_path / "program.py").write_text(text)
        client = shlex.split(json.loads(os.environ[CONFIG])["runtime_env"]["py_executable"])
        command = [*client, str(tmp_path / "program.py"), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables})

    return begin


def test_fork_has_the_arguments_variables_and_outputs_of_its_client_and_gives_it_its_end(start):
    program = "import os, sys; print(sys.argv[1:], os.environ['GIVEN'], 'torch' in sys.modules); sys.exit(3)"
    client = start(program, "one", "two", GIVEN="a\nb")
    assert (client.communicate(timeout=60)[0], client.returncode) == ("['one', 'two'] a\nb True\n", 3)


def test_fork_ends_with_its_client(start):
    client = start("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    fork = psutil.Process(int(client.stdout.readline()))
    client.send_signal(signal.SIGKILL)
    fork.wait(timeout=60)


def test_client_ends_with_its_fork(start):
    client = start("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    os.kill(int(client.stdout.readline()), signal.SIGKILL)
    assert client.wait(timeout=60) != 0
