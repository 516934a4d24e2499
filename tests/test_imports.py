"""Imports point one way, and the command starts without anything heavy."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from sdft_ray import cli, pipeline

PACKAGE = Path(__file__).parents[1] / "sdft_ray"
# Each imports only what stands before it. A package stands for its modules, among which there is no circle.
ORDER = (
    *("imports", "errors", "environment", "cpu", "progress", "store", "spec", "core", "data", "models", "results"),
    "cluster",
    *("endpoint", "engine", "generated", "text_pool", "losses", "trackers", "overlap", "stages"),
    *("preflight.precision", "preflight.teachers", "preflight.limits", "preflight.cuts", "preflight.engines"),
    "preflight.checks",
    *("training_data", "cutting", "tuning", "measures", "building", "pipeline", "sweep"),
    *(
        "preflight.memory",
        "preflight.shapes",
        "preflight.hours",
        "preflight.costs",
        "preflight.disk",
        "preflight.savings",
        "preflight.doctor",
    ),
    "preflight.starter",
    *("report", "verify", "submit", "publish", "surface", "completion", "inspection", "commands", "cli"),
)
HEAVY = ("torch", "ray", "vllm", "deepspeed", "lm_eval", "transformers")


def module_name(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".").removesuffix("__init__").rstrip(".")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """Return every node of a file's syntax."""
    return list(ast.walk(ast.parse(path.read_text())))


def imported(path: Path) -> set[str]:
    """Return every module that a file imports, at the top or inside functions; ours without the package's name."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            ours = {name for name in inside if name.removeprefix("sdft_ray.") in MODULES}
            names |= ours | ({node.module or ""} if ours != inside else set())
    return {name.removeprefix("sdft_ray.") for name in names if name != "sdft_ray"}


def place(module: str) -> int:
    """Return where a module stands in ORDER."""
    return next(i for i, name in enumerate(ORDER) if module == name or module.startswith(f"{name}."))


def test_imports_point_one_way():
    assert len(MODULES) > 25
    for module, path in MODULES.items():
        for other in imported(path) & MODULES.keys():
            if module:
                assert place(other) <= place(module), f"{module} imports {other}"


def test_stages_import_no_other_stage():
    stages = {module: path for module, path in MODULES.items() if module.startswith("stages.")}
    own = {module: module.split(".")[1] for module in stages}
    assert {*own.values()} == {module.build.__module__.split(".")[2] for module in pipeline.MODULES.values()}
    for module, path in stages.items():
        for other in imported(path) & stages.keys():
            assert own[other] == own[module], f"{module} imports {other}"


def test_imports_make_no_circle():
    imports = {module: imported(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    assert list(graphlib.TopologicalSorter(imports).static_order())


def is_key(node: ast.AST) -> bool:
    """Return whether a dictionary, or what is like one, is taken apart by a string there."""
    if not (isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)):
        return False
    return isinstance(node.slice.value, str) and ast.unparse(node.value) != "Literal"


def test_code_is_short_and_typed_as_the_design_has_it():
    every = [node for path in MODULES.values() for node in nodes(path)]
    functions = [node for node in every if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in functions)
    assert max(len(path.read_text().splitlines()) for path in MODULES.values()) <= 400
    assert lengths[-1] <= 60 and lengths[len(lengths) * 9 // 10] <= 26
    assert sum(map(is_key, every)) <= 100, "what comes from elsewhere is read once, into a type"


def test_core_is_pure():
    for path in (PACKAGE / "core").glob("*.py"):
        for name in imported(path):
            assert name.partition(".")[0] not in {"ray", "vllm", "deepspeed", "lm_eval", "subprocess"}, (
                f"{path} imports {name}"
            )
            if name in MODULES:
                assert name.partition(".")[0] in {"core", "errors"}, f"{path} imports {name}"


def test_cli_import_loads_nothing_heavy():
    code = f"import sys, sdft_ray.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_planning_modules_load_nothing_heavy():
    code = f"import sys, sdft_ray.pipeline; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_spec_alone_loads_nothing_heavy():
    names = sorted(name for name in MODULES if name.startswith("spec."))
    code = f"import sys, {', '.join(f'sdft_ray.{name}' for name in names)}; "
    code += f"print([m for m in {(*HEAVY, 'datasets', 'pyarrow', 'numpy')!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(names) > 5 and done.stdout.strip() == "[]"


def test_help_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "sdft_ray.cli", "--help"], capture_output=True, text=True, check=True)
    for command in cli._parser().get_default("parsers"):
        assert re.search(rf"^    {command}\s", done.stdout, re.MULTILINE)


def test_transformers_is_imported_without_scikit_learn_and_scipy_which_work_all_the_same():
    script = """
    import sys, sdft_ray
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.generation import candidate_generator
    from transformers.loss import loss_for_object_detection
    assert not {"sklearn", "scipy", "pandas"} & {*sys.modules}
    assert candidate_generator.is_sklearn_available()
    assert candidate_generator.roc_curve([0, 1], [0.2, 0.7])[1].tolist() == [0, 1, 1]
    assert loss_for_object_detection.linear_sum_assignment([[1, 0], [0, 1]])[1].tolist() == [1, 0]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
