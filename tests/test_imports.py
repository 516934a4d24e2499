"""Imports point one way, and the command starts without anything heavy."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sdft_ray"
ORDER = [
    {"errors", "__init__"},
    {"recipe", "compute", "progress", "shards", "objects", "lease", "readers"},
    {"artifacts", "storage", "ledger", "sources", "cluster", "precision"},
    {"core"},
    {"directory"},
    {"stages"},
    {"limits"},
    {"pipeline"},
    {"sweep"},
    {"costs"},
    {"submit"},
    {"manifest"},
    {"trials"},
    {"report", "agreement"},
    {"verify", "doctor"},
    {"cli"},
]
HEAVY = ("torch", "ray", "vllm", "deepspeed", "lm_eval", "transformers")


def imported(path: Path) -> set[str]:
    """Return every module that a file imports, at the top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def test_imports_point_one_way():
    rank = {name: i for i, names in enumerate(ORDER) for name in names}
    modules = list(PACKAGE.rglob("*.py"))
    assert len(modules) > 25
    for path in modules:
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported(path):
            if name.startswith("sdft_ray.") and room(name) in rank:
                assert rank[room(name)] <= rank[here], f"{path} imports {name}"


def test_core_is_pure():
    for path in (PACKAGE / "core").glob("*.py"):
        for name in imported(path):
            assert name.partition(".")[0] not in {"ray", "vllm", "deepspeed", "lm_eval"}, f"{path} imports {name}"
            if name.startswith("sdft_ray."):
                assert room(name) in {"core", "errors"}, f"{path} imports {name}"


def test_cli_import_loads_nothing_heavy():
    code = f"import sys, sdft_ray.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_planning_modules_load_nothing_heavy():
    code = f"import sys, sdft_ray.pipeline; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "sdft_ray.cli", "--help"], capture_output=True, text=True, check=True)
    for command in ("check", "run", "sweep", "submit", "report", "verify", "doctor", "show", "diff"):
        assert f"    {command} " in done.stdout
