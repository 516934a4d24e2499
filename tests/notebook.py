"""Runs the code of a notebook, without a server: its cells in one namespace."""

import ast
import json
from pathlib import Path
from typing import Any


def run_cells(notebook: Path, **given: Any) -> list[Any]:
    """Return what each code cell shows, the value of its last expression; given: names with values of a test's own,
    which replace what a cell gives them."""
    namespace: dict[str, Any] = {}
    return [
        _run(ast.parse("".join(cell["source"])), namespace, given)
        for cell in json.loads(notebook.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]


def _run(code: ast.Module, namespace: dict[str, Any], given: dict[str, Any]) -> Any:
    last = code.body.pop().value if isinstance(code.body[-1], ast.Expr) else ast.Constant(None)
    exec(compile(code, "cell", "exec"), namespace)
    namespace |= given
    return eval(compile(ast.fix_missing_locations(ast.Expression(last)), "cell", "eval"), namespace)
