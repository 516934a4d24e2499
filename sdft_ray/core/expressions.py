"""Mathematical answers: math-verify, in a process of its own.

In: texts with LaTeX or plain expressions. Out: the final expression as text, and whether two mean the same. A model can
write what never ends computing (`9^{9^{9^9}}`). math-verify's own guard is a signal: it works in the main thread only,
and no arithmetic in C heeds it. The kernel ends a process at its limit of CPU time everywhere, also on a busy machine.
"""

from __future__ import annotations

import functools
import json
import logging
import signal
import subprocess
import sys
import threading
from typing import Any

# Most texts take 3 ms. Another number may change what is kept: bump the VERSION of rows, distill and evaluate.
CPU_SECONDS = 5
_one_at_a_time = threading.Lock()


def read_expression(text: str) -> str | None:
    r"""Return the expression that a text ends up at: in \boxed{}, behind "answer", else the last; None without one.

    >>> read_expression(r"So $x = 3$, and half of it is \boxed{\frac32}.")
    '\\frac{3}{2}'
    """
    found: str | None = _ask("read", text)
    return found


def same_expression(answer: str, found: str) -> bool:
    r"""Return whether two expressions mean the same.

    >>> same_expression(r"\frac{1}{2}", "0.5"), same_expression("(x+1)^2", "x^2+2x+1"), same_expression("3", "4")
    (True, True, False)
    """
    return bool(_ask("same", answer, found))


def _ask(*question: str) -> Any:
    """Return the child's answer; None where computing it takes more than CPU_SECONDS."""
    with _one_at_a_time:
        child = _child()
        assert child.stdin and child.stdout
        print(json.dumps(question), file=child.stdin, flush=True)
        if line := child.stdout.readline():
            return json.loads(line)
        _child.cache_clear()
        code = child.wait()
    if code == -signal.SIGPROF:
        return None
    raise RuntimeError(f"the process of math-verify ended with code {code}; see stderr")


@functools.cache
def _child() -> subprocess.Popen[str]:
    # Not multiprocessing: that would import the main module again, or fork a process full of threads. It ends with
    # its standard input, so with its parent. -P: the modules beside this file are none of its business.
    return subprocess.Popen([sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _serve() -> None:
    """Answer one question a line until standard input ends."""
    from math_verify import parse, verify

    logging.disable()  # of having no time limit
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    for line in sys.stdin:
        kind, *texts = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        if kind == "read":
            found = parse(texts[0], parsing_timeout=None)
            answer: Any = str(found[-1]) if found else None
        else:
            gold, other = (parse(f"${text}$", parsing_timeout=None) for text in texts)
            answer = verify(gold, other, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
