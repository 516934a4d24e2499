"""Which tests are heavy (start a command, Ray or an engine, or run the harness): read from what they use.

In: the text of a test's file. Out: the marker `heavy`, which `make test-fast` leaves out; files that compute with many
models have it themselves. Should a test that starts Ray slip through, `refuse_ray` fails it.
"""

import ast
import functools
import sys
from pathlib import Path
from typing import Any

HEAVY = {"subprocess", "ray", "run_workers", "compare_with_vllm", "lm_eval", "task_manager"}
HERE = Path(__file__).parent


def is_heavy(file: Path, names: set[str]) -> bool:
    """Return whether functions or fixtures of a test file, or what those use in turn, are heavy."""
    uses = _read_uses(HERE / "conftest.py") | _read_uses(file)
    seen: set[str] = set()
    while new := names - seen:
        seen |= new
        names = names.union(*(uses.get(name, set()) for name in new))
    return bool(seen & HEAVY)


def has_light_tests(file: Path) -> bool:
    """Return whether a test of a file is not heavy, by its own text."""
    body = ast.parse(file.read_text()).body
    lines = [ast.unparse(node) for node in body if isinstance(node, ast.Assign)]
    marked = any(line.startswith("pytestmark = ") and "mark.heavy" in line for line in lines)
    tests = [node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return not marked and not all(is_heavy(file, {name}) for name in tests)


@functools.cache
def _read_uses(file: Path) -> dict[str, set[str]]:
    """Return the names that each function and class uses: those of a file and of the helpers that it imports from."""
    uses: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            uses |= _read_uses(helper) if (helper := HERE / f"{node.module}.py").is_file() else {}
            uses |= {alias.asname: {alias.name} for alias in node.names if alias.asname}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            uses[node.name] = {_name(part) for part in ast.walk(node)} - {node.name}
    return uses


def _name(node: ast.AST) -> str:
    match node:
        case ast.Name(id=name) | ast.arg(arg=name) | ast.alias(name=name) | ast.ImportFrom(module=str(name)):
            return name.partition(".")[0]
    return ""


def refuse_ray() -> None:
    """Let whatever starts Ray in this process from now on fail."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and str(arguments[0]).endswith("gcs_server"):
            raise AssertionError("a test without the marker `heavy` starts Ray. Let it use the fixture ray_cluster.")

    sys.addaudithook(refuse)
