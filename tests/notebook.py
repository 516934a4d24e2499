"""Runs the code of a notebook, without a server: its cells in one namespace."""

import ast
import json
from pathlib import Path
from typing import Any


def run_cells(notebook: Path, **given: Any) -> list[Any]:
    """Return what each code cell shows, the value of its last expression; given: names with values of a test's own,
    which replace what a cell gives them."""
    namespace: dict[str, Any] = {}
    shown = []
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            *body, last = ast.parse("".join(cell["source"])).body
            is_value = isinstance(last, ast.Expr)
            exec(compile(ast.Module(body if is_value else [*body, last], []), notebook.name, "exec"), namespace)
            shown.append(
                eval(compile(ast.Expression(last.value), notebook.name, "eval"), namespace) if is_value else None
            )
            namespace |= given
    return shown
