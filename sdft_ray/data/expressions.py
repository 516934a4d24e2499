"""Read and compare mathematical answers with math-verify, in a process of its own.

In: texts with LaTeX or plain expressions. Out: the final expression as text, and whether two mean the same. A model can
write an expression that computes for ever (`9^{9^{9^9}}`). math-verify's own guard is a signal: it works in the main
thread only, and no arithmetic in C heeds it. The kernel ends a process at its limit of CPU time everywhere, also on a
busy machine.
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
from collections.abc import Callable
from typing import Any

# Most texts take 3 ms. Another number may change what is kept: bump the VERSION of rows, distill and evaluate.
CPU_SECONDS = 5
_one_at_a_time = threading.Lock()
# math-verify takes upright text for a unit, and does not know a comma inside of braces.
_UPRIGHT = re.compile(
    r"\\(?:mathrm|mathup|text|textrm|operatorname|mathop)\s*\{\s*(?:(e|i)|(ln|log|exp|sin|cos|tan))\s*\}"
    r"|\{\\rm\s+(e|i)\s*\}"
)
_GROUPED = re.compile(r"(?<=(?<!\\)\{)\d{1,3}(?:,\d{3})+(?=\})")


def read_expression(text: str, whole: bool = False) -> str | None:
    r"""Return the final expression of a text: in \boxed{}, after "answer", else the last; None without one.

    whole: the text is the expression alone.

    >>> read_expression(r"So $x = 3$, and half of it is \boxed{\frac32}.")
    '\\frac{3}{2}'
    """
    text = _GROUPED.sub(lambda number: number[0].replace(",", ""), _UPRIGHT.sub(_set_in_italics, text))
    expression: str | None = _ask("whole", rf"\boxed{{{text}}}") if whole else _ask("read", text)
    return expression


def _set_in_italics(name: re.Match[str]) -> str:
    constant, function, old = name.groups()
    if function:
        return rf"\{function} "
    return " " * name.string[: name.start()][-1:].isalpha() + (constant or old)


def same_expression(answer: str, other: str) -> bool:
    r"""Return whether two expressions mean the same.

    >>> same_expression(r"\frac{1}{2}", "0.5"), same_expression("(x+1)^2", "x^2+2x+1"), same_expression("3", "4")
    (True, True, False)
    """
    return bool(_ask("same", answer, other))


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
    # its standard input, so with its parent. -P: it must not import the modules beside this file.
    return subprocess.Popen([sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _serve() -> None:
    """Answer one question a line until standard input ends."""
    _correct_units()
    logging.disable()  # its warnings of having no time limit
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    answers: dict[str, Callable[..., str | bool | None]] = {"read": _read, "whole": _read_whole, "same": _same}
    for line in sys.stdin:
        kind, *texts = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = answers[kind](*texts)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def _correct_units() -> None:
    r"""Make math-verify take away units behind a number only.

    Its own patterns reach over braces, take any character for the point of `a .`, and stop at no operator: of
    `2 - \frac{3}{\text{e}}` and `x + a b` they leave `2 - \frac{3}{` and `x +`, and two such remains may be equal. Of
    `2ab` and `3t` they leave the numbers: units in letters that formulas have count in \text{} only, which it knows.
    """
    from latex2sympy2_extended import math_normalization as its

    its.unit_superscript_regex = re.compile(r"(\\(?:text|mbox)\s*\{[^{}]*\})(\^\d|\{\^\d\})?$")
    units = "|".join(map(re.escape, sorted({*its.units} - {*"cehlost", "ab", "bc", "by"}, key=len, reverse=True)))
    its.units_regex = re.compile(
        rf"^(-?(?:\\[a-zA-Z]+|[^a-zA-Z+-])*(?:[\d}}]|\\pi))\s*(?:(?:{units})(?:s|es)?(?![a-zA-Z])\s*)+$"
    )


def _read(text: str) -> str | None:
    from math_verify import parse

    parsed = parse(text, parsing_timeout=None)
    return str(parsed[-1]) if parsed else None


def _parse_latex(text: str) -> list[Any]:
    # Not as plain text too: math-verify would read a number somewhere in LaTeX that it does not understand.
    from math_verify import LatexExtractionConfig, parse

    return list(parse(text, [LatexExtractionConfig()], parsing_timeout=None))


def _read_whole(text: str) -> str | None:
    parsed = _parse_latex(text)
    return str(parsed[-1]) if parsed else None


_PERCENT = r"\s*\\?%\s*$"


def _same(answer: str, response: str) -> bool:
    from math_verify import verify

    # Percent is no LaTeX that it knows; 50 % is 50, as in `number`.
    gold, other = (_parse_latex(f"${re.sub(_PERCENT, '', text)}$") for text in (answer, response))
    if verify(gold, other, timeout_seconds=None):
        return True
    try:
        return bool(gold and other) and _equal_where_real(gold[0], other[0])
    except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError):
        return False  # sympy does not know


def _equal_where_real(first: Any, second: Any) -> bool:
    r"""Return whether two expressions with roots agree wherever both are real, as \sqrt{3/m} and \sqrt3/\sqrt m do."""
    import sympy

    if not all(isinstance(side, sympy.Expr) and _has_root(side) for side in (first, second)):
        return False
    first, second = first.doit(), second.doit()
    symbols = sorted(first.free_symbols, key=str)
    if not 0 < len(symbols) < 4 or first.free_symbols != second.free_symbols:
        return False
    positive = {symbol: sympy.Dummy(positive=True) for symbol in symbols}
    if sympy.simplify(first.subs(positive) - second.subs(positive)) != 0:
        return False
    for signs in itertools.product((1, -1), repeat=len(symbols)):
        point = {symbol: sign * sympy.prime(i + 2) for i, (symbol, sign) in enumerate(zip(symbols, signs, strict=True))}
        parts = [part.subs(point).evalf() for side in (first, second) for part in (side, *side.atoms(sympy.Pow))]
        if all(part.is_real for part in parts) and abs((first - second).subs(point).evalf()) > 1e-9:
            return False
    return True


def _has_root(expression: Any) -> bool:
    import sympy

    return any(power.exp.is_integer is False for power in expression.atoms(sympy.Pow))


if __name__ == "__main__":
    _serve()
