"""The command `sdft`, as a user's shell runs it: a process of its own, forked from one that has its imports already."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["tests.preloaded"])  # Python drops the paths of pytest on the way there


class Command:
    """`sdft` at work with some arguments in a directory; used as a `subprocess.Popen`.

    script: a file that calls `sdft` itself, else the command is plain; environment: more variables.
    """

    def __init__(self, *arguments: object, cwd: Path, script: Path | None = None, **environment: str) -> None:
        self.words = ["sdft", *map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._errors = Path(self._folder.name) / "out", Path(self._folder.name) / "errors"
        given = (self.words, cwd, script, self._out, self._errors, {**os.environ, **environment})
        self._process = _FORKED.Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        """Return once it has ended; raises subprocess.TimeoutExpired after so many seconds."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.words, timeout)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return what it wrote, once it has ended."""
        self.wait(timeout)
        return self._out.read_text(), self._errors.read_text()

    def end(self) -> subprocess.CompletedProcess:
        """Return what came of it, once it has ended."""
        out, errors = self.communicate()
        return subprocess.CompletedProcess(self.words, self.returncode, out, errors)


def sdft(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run `sdft` with these arguments in a directory and return what came of it."""
    return Command(*arguments, cwd=cwd).end()


def sdft_anew(
    *arguments: object, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run `sdft` in a process that imports everything itself: libraries read variables when they are imported."""
    command = [sys.executable, "-m", "sdft_ray.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def _run(
    words: list[str], cwd: Path, script: Path | None, out: Path, errors: Path, environment: dict[str, str]
) -> None:
    """Be the command, in a process of its own."""
    for number, path in ((0, os.devnull), (1, out), (2, errors)):
        os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(script or words[0]), *words[1:]]
    from ray._raylet import Config

    Config.initialize("")  # Ray's core read its variables when it was imported
    if script:
        runpy.run_path(str(script), run_name="__main__")
    from sdft_ray import cli

    sys.exit(cli.main())
