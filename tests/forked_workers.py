"""Ray's workers, forked from one process that has their imports: a start takes a fifth of the processor time.

Ray starts a worker as `py_executable FILE ARGUMENTS`, and each driver takes that from a variable. So a worker is first
this file as a program, which imports next to nothing, hands its arguments, variables and outputs to the server, and
ends as the fork ends. Without the variable workers start as they do for users.
"""

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# What workers import, but for Ray: its core takes the variables of a worker when it is imported.
IMPORTS = "datasets", "deepspeed", "lm_eval.evaluator", "pandas", "peft", "torch._dynamo"
IMPORTS += "transformers.models.auto.modeling_auto", "sdft_ray.pipeline"


@contextlib.contextmanager
def forked_workers(folder: Path) -> Iterator[None]:
    """Let each Ray that is started from here fork its workers; folder: for a socket, so of a short path."""
    address = str(folder / "workers")
    alive, held = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)  # a worker that comes before the imports are done waits
        descriptors = listener.fileno(), alive
        command = [sys.executable, "-P", __file__, *map(str, descriptors)]
        # As Ray starts workers: threads that wait for each other would not sleep.
        server = subprocess.Popen(command, pass_fds=descriptors, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(alive)
    client = f"{sys.executable} -I -S {Path(__file__).resolve()} {address}"
    os.environ[CONFIG] = json.dumps({"runtime_env": {"py_executable": client}, "metadata": {}})
    try:
        yield
    finally:
        del os.environ[CONFIG]
        os.close(held)
        server.wait()


def ask(address: str, arguments: list[str]) -> int:
    """Return how the process ended that the server forked for a file and its arguments."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        given = json.dumps([arguments, dict(os.environ), str(Path.cwd())]).encode()
        socket.send_fds(server, [len(given).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(given)
        status = server.recv(4)
    return os.waitstatus_to_exitcode(int.from_bytes(status, "big")) if status else 1


class Server:
    """Forks a process for each client, and kills it if its client is killed."""

    def __init__(self, listener: socket.socket, alive: int) -> None:
        self._listener, self._alive = listener, alive
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno())
        self._selector = selectors.DefaultSelector()
        for source in (listener, alive, self._woken):
            self._selector.register(source, selectors.EVENT_READ)
        self._clients: dict[int, socket.socket] = {}

    def serve(self) -> None:
        """Return once nobody holds the other end of `alive`."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == self._alive:
                    for pid in self._clients:
                        os.kill(pid, signal.SIGKILL)
                    return
                if key.fileobj is self._listener:
                    self._fork(self._listener.accept()[0])
                elif key.fileobj is self._woken:
                    self._woken.recv(4096)
                    self._reap()
                else:  # this client ended before its process
                    self._selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)

    def _fork(self, client: socket.socket) -> None:
        length, outputs, _, _ = socket.recv_fds(client, 4, 3)
        with client.makefile("rb") as given:
            arguments, environment, directory = json.loads(given.read(int.from_bytes(length, "big")))
        pid = os.fork()
        if not pid:
            client.close()
            self._close()
            become(arguments, environment, directory, outputs)
        for output in outputs:
            os.close(output)
        self._clients[pid] = client
        self._selector.register(client, selectors.EVENT_READ, pid)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):  # none is left
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                client = self._clients.pop(ended[0])
                with contextlib.suppress(KeyError):
                    self._selector.unregister(client)
                with contextlib.suppress(OSError), client:
                    client.sendall(ended[1].to_bytes(4, "big"))

    def _close(self) -> None:
        """Leave a fork nothing of the server."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        os.close(self._alive)
        for each in (self._listener, self._woken, self._waker, *self._clients.values()):
            each.close()


def become(arguments: list[str], environment: dict[str, str], directory: str, outputs: list[int]) -> None:
    """Be the program: a file that is run with arguments."""
    import runpy

    import numpy as np
    import torch

    os.setpgid(0, 0)  # Ray ends the group of a worker that has ended
    for number, output in enumerate(outputs):
        os.dup2(output, number)
        os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = arguments
    sys.path[:0] = [str(Path(arguments[0]).parent), *filter(None, environment.get("PYTHONPATH", "").split(":"))]
    np.random.seed()
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    runpy.run_path(arguments[0], run_name="__main__")
    sys.exit()


def main(listener: str, alive: str) -> None:
    """Import what workers import, and serve."""
    os.setpgid(0, 0)  # Ctrl-C is for whoever is at the keyboard
    for name in IMPORTS:
        importlib.import_module(name)
    assert "ray" not in sys.modules
    gc.freeze()  # else a fork that collects copies what it shares
    Server(socket.socket(fileno=int(listener)), int(alive)).serve()


if __name__ == "__main__":
    if sys.argv[1].isdecimal():
        main(*sys.argv[1:])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
