"""The variables that processes are started with."""

import subprocess
import sys

from sdft_ray import environment


def test_a_worker_on_a_cpu_allocates_by_the_library_that_ray_brings(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    given = environment.for_tensors_on_cpus()
    assert [*given] == ["LD_PRELOAD"]
    look = "print('libjemalloc' in open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", look], env=given, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_an_allocator_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so")
    assert environment.for_tensors_on_cpus() == {}
