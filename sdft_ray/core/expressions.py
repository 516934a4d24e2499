"""Mathematical answers: math-verify, in a process of its own.

In: texts with LaTeX or plain expressions. Out: the final expression as text, and whether two mean the same. A model can
write what never ends computing (`9^{9^{9^9}}`). math-verify's own guard is a signal: it works in the main thread only,
and no arithmetic in C heeds it. The kernel ends a process at its limit of CPU time everywhere, also on a busy machine.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import re
import signal
import subprocess
import sys
import threading
from typing import Any

# Most texts take 3 ms. Another number may change what is kept: bump the VERSION of rows, distill and evaluate.
CPU_SECONDS = 5
_one_at_a_time = threading.Lock()


_CONSTANT = r"\\(?:math|text|operatorname|mathop)(?:rm|it|up)?\s*\{\s*(?P<name>e|i)\s*\}|\{\\rm\s+(?P<old_name>e|i)\s*\}"
_UPRIGHT = re.compile(_CONSTANT + r"|\\(?:mathrm|text)\s*(?P<function>\{\s*(?:ln|log|exp|sin|cos|tan)\s*\})")


def read_expression(text: str, whole: bool = False) -> str | None:
    r"""Return the expression that a text ends up at: in \boxed{}, behind "answer", else the last; None without one.

    whole: the text is nothing but the expression.

    >>> read_expression(r"So $x = 3$, and half of it is \boxed{\frac32}.")
    '\\frac{3}{2}'
    """
    # What is set upright is a unit to math-verify.
    text = _UPRIGHT.sub(lambda name: f" {name['name'] or name['old_name'] or chr(92) + name['function'].strip('{ }')} ", text)
    found: str | None = _ask("whole", rf"\boxed{{{text}}}") if whole else _ask("read", text)
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
    from latex2sympy2_extended import math_normalization

    # Its own reaches over braces to the end: 2 - 3 and 2 + 3 divided by the same unit would both be cut to nothing.
    math_normalization.unit_superscript_regex = re.compile(r"(\\(?:text|mbox)\s*\{[^{}]*\})(\^\d|\{\^\d\})?$")
    logging.disable()  # of having no time limit
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    answers = {"read": _read, "whole": _read_whole, "same": _same}
    for line in sys.stdin:
        kind, *texts = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = answers[kind](*texts)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def _read(text: str) -> str | None:
    from math_verify import parse

    found = parse(text, parsing_timeout=None)
    return str(found[-1]) if found else None


def _parse_latex(text: str) -> list[Any]:
    # Not as plain text too: of LaTeX that is not understood that reads a number somewhere in it.
    from math_verify import LatexExtractionConfig, parse

    return list(parse(text, [LatexExtractionConfig()], parsing_timeout=None))


def _read_whole(text: str) -> str | None:
    found = _parse_latex(text)
    return str(found[-1]) if found else None


_PERCENT = r"\s*\\?%\s*$"


def _same(answer: str, found: str) -> bool:
    from math_verify import verify

    # Percent is no LaTeX that it knows; 50 % is 50, as in `number`.
    gold, other = (_parse_latex(f"${re.sub(_PERCENT, '', text)}$") for text in (answer, found))
    return verify(gold, other, timeout_seconds=None) or bool(gold and other and _equal_where_real(gold[0], other[0]))


def _equal_where_real(first: Any, second: Any) -> bool:
    r"""Return whether two expressions with roots agree wherever both are real, as \sqrt{3/m} and \sqrt3/\sqrt m do."""
    import sympy

    if not all(isinstance(each, sympy.Expr) and each.has(sympy.Pow) for each in (first, second)):
        return False
    first, second = first.doit(), second.doit()
    symbols = sorted(first.free_symbols, key=str)
    if not 0 < len(symbols) < 4 or first.free_symbols != second.free_symbols or not _has_root(first):
        return False
    positive = {symbol: sympy.Dummy(positive=True) for symbol in symbols}
    if sympy.simplify(first.subs(positive) - second.subs(positive)) != 0:
        return False
    for signs in itertools.product((1, -1), repeat=len(symbols)):
        point = {symbol: sign * sympy.prime(i + 2) for i, (symbol, sign) in enumerate(zip(symbols, signs, strict=True))}
        values = [each.subs(point).evalf() for each in (first, second)]
        if all(value.is_real for value in values) and abs(values[0] - values[1]) > 1e-9:
            return False
    return True


def _has_root(expression: Any) -> bool:
    import sympy

    return any(not power.exp.is_integer for power in expression.atoms(sympy.Pow))


if __name__ == "__main__":
    _serve()
