"""Which fields ask a CPU for half precision, when that is measured, and that it is said in one line."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from command import sdft_anew
from recipes import write_recipe

from sdft_ray import cli, cpu, pipeline
from sdft_ray.preflight import doctor, precision
from sdft_ray.spec.compute import Compute, load_compute
from sdft_ray.spec.loading import load_recipe
from sdft_ray.spec.wording import validate
from sdft_ray.store.storage import Storage

SKYLAKE = frozenset({"fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq"})
SAPPHIRE_RAPIDS = SKYLAKE | {"avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile"}
GRAVITON3 = frozenset({"fp", "asimd", "asimdhp", "sve", "bf16"})
LINE = r"{}: {} emulated on this CPU: measured {} times slower than float32\. Set float32\.\n"


@pytest.fixture
def folder(tiny_model, tmp_path, monkeypatch):
    """A directory, this one, with a recipe whose sections are in float32."""
    monkeypatch.chdir(tmp_path)
    write_dtypes(tiny_model)
    return tmp_path


def write_dtypes(model: Path, **dtypes: str) -> None:
    names = ("prune", "distill", "train", "draft", "evaluate")
    sections = {name: {"dtype": dtypes.get(name, "float32")} for name in names}
    sections["draft"] |= {"prompts": 2}
    sections["evaluate"] |= {"speed": True}
    write_recipe(Path(), model, **sections)


@pytest.mark.parametrize(
    ("dtypes", "gpus", "fields"),
    [
        ({}, (), {}),
        ({"prune": "bfloat16"}, (), {"prune.dtype": "bfloat16"}),
        ({"prune": "bfloat16"}, ("score",), {}),
        ({"distill": "float16", "evaluate": "bfloat16"}, ("distill",), {"evaluate.dtype": "bfloat16"}),
        ({"train": "bfloat16", "draft": "float16"}, ("score",), {"draft.dtype": "float16", "train.dtype": "bfloat16"}),
        ({"draft": "bfloat16", "train": "bfloat16"}, ("distill", "train"), {}),
        ({"evaluate": "float16"}, ("score", "train"), {"evaluate.dtype": "float16"}),
    ],
    ids=str,
)
def test_half_fields_are_those_of_stages_that_the_compute_file_gives_no_gpu(dtypes, gpus, fields, tiny_model, folder):
    write_dtypes(tiny_model, **dtypes)
    compute = load_compute().model_dump(mode="json")
    for name in gpus:
        compute[name]["gpus"] = 1
    plan = pipeline.chain(load_recipe(Path("recipe.yaml"))).in_order
    assert precision.half_fields(plan, validate(Compute, compute)) == fields


@pytest.mark.parametrize(
    ("dtype", "flags", "variables", "doubtful"),
    [
        ("bfloat16", SAPPHIRE_RAPIDS, {}, False),
        ("float16", SAPPHIRE_RAPIDS, {}, False),
        ("bfloat16", SKYLAKE, {}, True),
        ("bfloat16", SKYLAKE | {"avx512_bf16"}, {}, False),
        ("float16", SKYLAKE | {"avx512_bf16"}, {}, True),
        ("bfloat16", frozenset({"fma", "avx2"}), {}, True),
        ("bfloat16", GRAVITON3, {}, False),
        ("float16", GRAVITON3 - {"bf16"}, {}, False),
        ("bfloat16", GRAVITON3 - {"bf16"}, {}, True),
        ("bfloat16", None, {}, True),  # not Linux: only measuring tells
        ("bfloat16", SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, True),
        ("bfloat16", SAPPHIRE_RAPIDS, {"ATEN_CPU_CAPABILITY": "avx2"}, True),
        ("bfloat16", SAPPHIRE_RAPIDS, {"ATEN_CPU_CAPABILITY": ""}, False),
    ],
)
def test_dtype_is_doubtful_where_the_cpu_lacks_instructions_or_may_not_use_them(dtype, flags, variables, doubtful):
    assert precision.is_doubtful(dtype, flags, variables) == doubtful


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (
            "processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\nbugs\t: none\n\nprocessor\t: 1\nflags\t: x",
            "fpu avx2 amx_bf16",
        ),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd40\n", "fp asimd bf16"),
        ("processor\t: 0\ncpu\t\t: POWER9\n", None),
    ],
    ids=["x86", "ARM", "POWER"],
)
def test_flags_are_read_as_each_architecture_writes_them(text, flags, tmp_path):
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu.read_flags(tmp_path / "cpuinfo") == (flags and frozenset(flags.split()))
    assert cpu.read_flags(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("machine", "flags", "limit", "overflows"),
    [
        ("x86_64", {"avx2"}, "", True),
        ("x86_64", {"avx2", "avx_vnni"}, "", False),
        ("x86_64", {"avx512f", "avx512_vnni"}, "", False),
        ("x86_64", {"avx512f", "avx512_vnni"}, "AVX2", True),
        ("aarch64", {"asimd"}, "", False),
        ("x86_64", None, "", False),
    ],
)
def test_sums_of_int8_overflow_where_an_x86_cpu_has_no_instruction_for_them(
    monkeypatch, machine, flags, limit, overflows
):
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu, "read_flags", lambda: flags)
    for name in cpu._LIMITS:  # of whoever runs the tests
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert cpu.overflows_in_int8() == overflows


def test_check_says_in_one_line_what_the_cpu_emulates_and_how_much_slower_that_was_measured(tiny_model, folder):
    write_dtypes(tiny_model, train="bfloat16", evaluate="bfloat16")
    without = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = sdft_anew("check", "recipe.yaml", "--json", environment=without)
    assert done.returncode == 0, done.stderr
    said = re.fullmatch(LINE.format(r"evaluate\.dtype, train\.dtype", "bfloat16 is", r"(\d+\.\d)"), done.stderr)
    assert said and float(said[1]) >= 1.5
    assert json.loads(done.stdout)


@pytest.fixture
def emulated(monkeypatch):
    """A CPU that has to be measured, on which everything counts as slow."""
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setattr(precision, "_SLOW", 0.0)


def test_two_dtypes_that_are_emulated_are_one_line(emulated):
    line = precision.find_slow({"distill.dtype": "float16", "prune.dtype": "bfloat16"})
    numbers = r"\d+\.\d and \d+\.\d"
    assert re.fullmatch(LINE.format(r"distill\.dtype, prune\.dtype", "bfloat16 and float16 are", numbers), f"{line}\n")
    assert precision.find_slow({}) is None


@pytest.mark.parametrize("command", ["recipe", "sweep"])
def test_check_says_it_once_and_only_where_the_stages_run_here(command, emulated, tiny_model, folder, capsys):
    Path("sweep.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": {"train.lr": [1e-4, 2e-4]}}))
    Path("compute.yaml").write_text("ray: {address: auto}\n")
    arguments = ["check", f"{command}.yaml", "--json"]
    assert cli.main(arguments) == 0 and capsys.readouterr().err == ""  # all in float32
    write_dtypes(tiny_model, train="bfloat16")
    assert cli.main(arguments) == 0
    assert re.fullmatch(LINE.format(r"train\.dtype", "bfloat16 is", r"\d+\.\d"), capsys.readouterr().err)
    assert cli.main([*arguments, "--compute", "compute.yaml"]) == 0 and capsys.readouterr().err == ""


def test_run_says_it_before_anything_is_built_and_only_of_what_will_be(emulated, tiny_model, folder, capsys):
    write_dtypes(tiny_model, distill="bfloat16", evaluate="bfloat16")
    recipe = load_recipe(Path("recipe.yaml"))
    Path("root").mkdir()
    Path("root/locks").touch()  # so that nothing can be built
    with pytest.raises(FileExistsError):
        pipeline.run(recipe, load_compute(), Storage("root"), "distill")
    assert capsys.readouterr().err.startswith("distill.dtype: bfloat16 is emulated on this CPU: measured ")


def test_doctor_finds_on_a_node_what_its_cpu_emulates(monkeypatch, emulated, tmp_path):
    def look(fields):
        found = doctor._on_node(str(tmp_path), [], None, fields)
        return [(each.status, each.what.partition(":")[0], each.do) for each in found if each.check == "precision"]

    fields = {"distill.dtype": "bfloat16", "train.dtype": "bfloat16"}
    assert look(fields) == [("warn", "bfloat16 is emulated on this CPU", "Set distill.dtype, train.dtype: float32.")]
    assert look({}) == []
    monkeypatch.setattr(precision, "_SLOW", float("inf"))
    assert look(fields) == [("ok", "computes bfloat16 itself", "")]
