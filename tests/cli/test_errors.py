"""Every mistake a user is likely to make, through the command: one clear line, exit code 2, nothing touched."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import sdft
from recipes import write_recipe
from rich.console import Console
from tiny import make_tiny_model

from sdft_ray.models.sizes import sizes_of
from sdft_ray.report.table import plain
from sdft_ray.spec.sources import LocalModel


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A directory with a good recipe; a test spoils one thing."""
    exact = {"dtype": "float32"}  # elsewhere a CPU that emulates bfloat16 has a line of its own
    write_recipe(tmp_path, tiny_model, where=Path(), distill=exact, evaluate=exact)
    return tmp_path


@pytest.mark.parametrize(
    ("architecture", "form", "line"),
    [
        ("gemma2", "q8_0", "is a gemma2 model, which is not written as GGUF here (known: granite, llama, mistral, "),
        ("mixtral", "int8", ".w1.weight, and int8 is written of dense decoders alone. Leave int8 out of export."),
        ("llama", "q4_k_m", "export.formats: q4_k_m needs libgguf, which is not installed. Do: pip install 'sdft-ray"),
    ],
)
def test_check_of_an_export_that_cannot_be_written_is_one_line(architecture, form, line, folder):
    if form == "q4_k_m" and importlib.util.find_spec("libgguf"):
        pytest.skip("libgguf is installed")
    model = make_tiny_model(folder / architecture, architecture)
    done = sdft("check", "recipe.yaml", "--set", f"model.path={model}", "--set", f"export.formats=[{form}]", cwd=folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert line in done.stderr


def test_check_of_a_good_recipe_touches_nothing(folder):
    before = sorted(folder.rglob("*"))
    done = sdft("check", "recipe.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "missing" in done.stdout and str(folder / "artifacts" / "cut") in done.stdout
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("prune", "line"),
    [
        (
            None,
            "Cut: 2 of 6 blocks (LEFT of ALL parameters are left): the span of least loss among the best 5 by distance "
            "and by influence.",
        ),
        ("{remove: [4, 2]}", "Cut: blocks 2, 4 of 6 (LEFT of ALL parameters are left), named by the recipe."),
        (
            "{target: {parameters: 160000}, metric: angular, calibration: {text: texts.txt}}",
            "Cut: 2 of 6 blocks, the fewest for 160,000 parameters or less (LEFT of ALL parameters are left): the span "
            "of least angular distance.",
        ),
        (
            "{blocks: 2, contiguous: false, calibration: {text: texts.txt}}",
            "Cut: 2 of 6 blocks (LEFT of ALL parameters are left): one after the other, each time the one without "
            "which the loss is least.",
        ),
        (
            "{blocks: 2, metric: tail, protect: {last: 1}}",
            "Cut: 2 of 6 blocks (LEFT of ALL parameters are left): the last ones, but for 1 protected.",
        ),
    ],
)
def test_check_says_which_blocks_go_or_how_they_are_chosen(folder, tiny_model, prune, line):
    done = sdft("check", "recipe.yaml", *(["--set", f"prune={prune}"] if prune else []), cwd=folder)
    assert done.returncode == 0, done.stderr
    sizes = sizes_of(LocalModel(path=str(tiny_model)))
    left, whole = f"{sizes.total - 2 * sizes.blocks[0]:,}", f"{sizes.total:,}"
    assert done.stdout.splitlines()[0] == line.replace("LEFT", left).replace("ALL", whole)
    stages = {line.split()[0] for line in done.stdout.splitlines()}
    assert ("score" in stages) == ("the span" in line)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["distill.tempreature=1.0"], "distill.tempreature: unknown key. Did you mean temperature?"),
        (["train.lr=fast"], 'train.lr: got "fast"; expected a number. Change this value.'),
        (["prune.blocks=6"], "prune.blocks: 6 removes every block of a 6-block model. Give 1 to 5."),
        (["prune={remove: [1, 6]}"], "prune.remove: 6 is no block of a 6-block model. Give blocks from 0 to 5."),
        (
            ["prune={remove: [0, 1, 2, 3, 4, 5]}"],
            "prune.remove: removes every block of a 6-block model. Give at most 5.",
        ),
        (
            ["prune={target: {parameters: 1000}}"],
            "prune.target.parameters: 1,000 cannot be reached: without 5 of 6 blocks ",
        ),
        (
            ["prune.remove=[1, 2]"],
            "prune.blocks: decides nothing beside prune.remove. Keep one of them.",
        ),
        (
            ["rows.path=nowhere.jsonl"],
            "rows.path: nowhere.jsonl does not exist. Give a .json, .jsonl, .csv, .parquet or .arrow file, a "
            "directory or a glob.",
        ),
        (["rows.fields.prompt=question"], "rows.fields.prompt: rows.jsonl:1 has no question. Known: a, q."),
        (["model.path=nowhere"], "model.path: nowhere does not exist. Give a model directory or a .gguf file."),
        (
            ["train.global_batch_size=6"],
            "train.global_batch_size: 6 is not a multiple of micro_batch 8 x 2 workers = 16.",
        ),
        (["evaluate.tasks=[arc_esy]"], "evaluate.tasks: arc_esy is not in the offline preset. Did you mean arc_easy?"),
        (
            ["rows={gym: products, options: {max_trems: 2}, limit: 9, held_out: 2, validation: 2}"],
            "rows.options: products refuses them (",
        ),
        (["rows={gym: prodcts, limit: 9}"], "rows.gym: prodcts is no task of reasoning-gym. Did you mean products?"),
        (["train.lr"], "--set train.lr: is not KEY=VALUE. Write for example --set train.lr=2e-4."),
    ],
)
def test_check_of_a_wrong_value_says_where_what_and_how_to_fix_it(folder, settings, line):
    done = sdft("check", "recipe.yaml", *(x for s in settings for x in ("--set", s)), cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_check_of_several_mistakes_says_all_of_them(folder):
    wrong = ["--set", "prune.blcks=2", "--set", "train.epochs=0", "--set", "distill.top_p=2"]
    done = sdft("check", "recipe.yaml", *wrong, cwd=folder)
    assert done.returncode == 2
    assert {line.partition(":")[0] for line in done.stderr.splitlines()} == {
        "prune.blcks",
        "train.epochs",
        "distill.top_p",
    }


def test_check_of_a_torn_line_names_file_and_line(folder):
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"q": "torn\n')
    done = sdft("check", "recipe.yaml", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("rows.jsonl:10: is not JSON")


@pytest.mark.parametrize(
    ("name", "content", "settings", "line"),
    [
        ("rows.jsonl", b'{"q": "1?", "a": "1"}\n{"q": ["2?"], "a": "2"}\n', [], "rows.jsonl:2: q is a list, not text."),
        (
            "rows.jsonl",
            b'{"messages": [{"role": "user", "content": "1?"}]}',
            [],
            "rows.jsonl:1: messages is a conversation. Set rows.fields to",
        ),
        ("rows.json", b'{"q": "1?"}\n{"q": "2?"}', ["rows.path=rows.json"], "rows.json: holds JSON lines, not a list."),
        ("texts.txt", b"One text.\n\nTwo caf\xe9s.\n\nThree.", [], "texts.txt:3: is not UTF-8 text."),
        ("texts.txt", b"A\n\nB\n\nC\n\nD", [], "prune.calibration.text: texts.txt has 0 texts of two tokens or more"),
        ("t.jsonl", b'{"text": "a \\ud800"}', ["prune.calibration.text=t.jsonl"], "t.jsonl:1: holds half a character"),
        (
            "rows.jsonl",
            b'{"q": "1?", "a": "1"}\n' * 9,
            [],
            "rows: 1 usable rows (of 9; 8 prompts came before) leave none",
        ),
        (
            "rows.jsonl",
            b'{"q": "%s", "a": "1"}' % (b"1" * 3000),
            [],
            "rows: 1 usable rows (of 1) leave none to train on",
        ),
        ("-", b"", ["train.max_tokens=5000"], "train.max_tokens: 5000 is more than the model's context of 2048 holds."),
        ("-", b"", ["distill.samples=3", "distill.temperature=0"], "distill.samples: 3 is the same text 3 times at"),
        ("-", b"", ["train.rows=6"], "train.rows: 6 is more than the 5 training rows. Lower train.rows."),
    ],
)
def test_check_of_wrong_input_is_one_line(folder, name, content, settings, line):
    if content:
        (folder / name).write_bytes(content)
    done = sdft("check", "recipe.yaml", *(x for s in settings for x in ("--set", s)), cwd=folder)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert done.stderr.startswith(line)


def test_run_of_empty_rows_is_refused_before_anything_starts(folder):
    (folder / "rows.jsonl").write_text("")
    done = sdft("run", "recipe.yaml", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("rows: 0 usable rows (of 0) leave none to train on after 2 held-out and 2 validation")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("tokenizer.json", "has no tokenizer. Put the model's tokenizer files beside it."),
        ("chat_template.jinja", "has no chat template. Give an instruction-tuned model."),
        ("model.safetensors", "has no weights (expected *.safetensors). Copy or download them, too."),
        ("config.json", "is no Hugging Face model directory. Check the path."),
    ],
)
def test_check_of_a_model_directory_that_lacks_a_part_names_it(folder, tiny_model, tmp_path, file, line):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_model.iterdir():
        if path.name != file:
            (broken / path.name).symlink_to(path)
    done = sdft("check", "recipe.yaml", "--set", f"model.path={broken}", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.strip().endswith(line)


def test_check_of_an_unknown_architecture_names_it(folder, tiny_model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_model.iterdir():
        if path.name != "config.json":
            (other / path.name).symlink_to(path)
    config = json.loads((tiny_model / "config.json").read_text()) | {"model_type": "mamba"}
    (other / "config.json").write_text(json.dumps(config))
    done = sdft("check", "recipe.yaml", "--set", f"model.path={other}", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "model: cannot prune a mamba model: its blocks are state-space blocks without attention. Give one of these: "
    )


def test_run_with_too_few_cpus_is_an_error_and_never_waits(folder):
    (folder / "compute.yaml").write_text("train: {workers: 999, cpus: 1}")
    done = sdft("run", "recipe.yaml", "--compute", "compute.yaml", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("compute.train: 999 x 1 CPUs = 999 is more than the ")


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        (["ctu"], "--until: ctu is no stage. Did you mean cut?"),
        (["cut", "--html", "x.html"], "--html: shows what --until cut leaves out. Remove --html."),
        (["cut", "--json"], "--json: shows what --until cut leaves out. Remove --json."),
        (
            ["merge"],
            "--until: this recipe has no stage merge. "
            "Give one of model, rows, score, loss, cut, distill, train, nll, evaluate.",
        ),
    ],
)
def test_run_until_a_stage_that_is_not_there_builds_nothing(folder, stage, line):
    done = sdft("run", "recipe.yaml", "--until", *stage, cwd=folder)
    assert (done.returncode, done.stderr.strip()) == (2, line)
    assert not (folder / "artifacts").exists()


def test_output_that_nobody_reads_to_its_end_is_no_error(folder):
    command = f"{sys.executable} -m sdft_ray.cli check recipe.yaml --json | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=folder, check=True)
    assert done.stderr == ""


def test_job_script_leaves_what_is_wrong_with_a_file_to_the_command(folder):
    (folder / "recipe.yaml").write_text("model: [")
    script = Path(__file__).parents[2] / "jobs" / "run.py"
    for arguments, code in ((["recipe.yaml"], 2), ([], 2)):
        done = subprocess.run(
            [sys.executable, script, *arguments], capture_output=True, text=True, cwd=folder, check=False
        )
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


def test_report_of_an_unfinished_recipe_says_what_is_missing(folder):
    done = sdft("report", "recipe.yaml", cwd=folder)
    assert done.returncode == 2
    missing = "(missing: rows, score, loss, cut, distill, train, nll, evaluate). Do: sdft run recipe.yaml."
    assert f"is not finished under {folder / 'artifacts'} {missing}" in done.stderr


@pytest.mark.parametrize("option", ["--html", "--csv"])
def test_report_is_not_written_over_a_recipe(option, folder):
    before = (folder / "recipe.yaml").read_text()
    done = sdft("report", "recipe.yaml", "recipe.yaml", option, "recipe.yaml", cwd=folder)
    says = f"{option}: recipe.yaml is named as a recipe is. Give a name in .{option[2:]}.\n"
    assert (done.returncode, done.stderr) == (2, says)
    assert (folder / "recipe.yaml").read_text() == before
    done = sdft("report", "recipe.yaml", "recipe.yaml", option, "recipe.YML", cwd=folder)
    assert done.returncode == 2 and "recipe.YML is named as a recipe is" in done.stderr


def test_unknown_command_suggests_the_nearest(folder):
    done = sdft("chekc", cwd=folder)
    assert done.returncode == 2
    assert "Did you mean check?" in done.stderr


def test_show_of_an_unknown_id_says_where_it_looked(folder):
    done = sdft("show", "abcdef123456", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith(f"abcdef123456: is no artifact under {folder / 'artifacts'}.")


def test_diff_of_two_recipes_names_the_values_that_differ(folder):
    text = (folder / "recipe.yaml").read_text()
    (folder / "other.yaml").write_text(text.replace("blocks: 2", "blocks: 3"))
    done = sdft("diff", "recipe.yaml", "other.yaml", "--json", cwd=folder)
    assert json.loads(done.stdout) == {"prune.blocks": [2, 3]}
    for name in ("OTHER.YML", "other"):
        shutil.copy(folder / "other.yaml", folder / name)
        assert sdft("diff", "other.yaml", name, cwd=folder).stdout == "No value differs.\n"


def test_diff_on_a_narrow_terminal_shows_whole_values():
    table = plain("value", "a")
    table.add_row("model.path", "/a/long/path/of/a/model/that/is/long")
    console = Console(width=30, record=True, file=io.StringIO())
    console.print(table)
    assert "…" not in console.export_text()


def test_diff_of_a_recipe_and_an_artifact_says_that_they_have_nothing_in_common(folder):
    done = sdft("diff", "abcdef123456", "recipe.yaml", cwd=folder)
    says = "recipe.yaml: is a recipe, and abcdef123456 is none. Give two recipes or two artifacts.\n"
    assert (done.returncode, done.stderr) == (2, says)


@pytest.mark.parametrize("command", ["show", "verify", "export"])
def test_an_empty_name_is_no_artifact_and_not_the_current_directory(command, folder):
    done = sdft(command, "", cwd=folder)
    assert done.returncode == 2 and done.stderr.startswith("an empty name: is no artifact under ")


def run_on(ray: dict, folder):
    compute = {"ray": {"wait_seconds": 1, **ray}, "score": {"cpus": 4096}}
    (folder / "compute.yaml").write_text(yaml.safe_dump(compute))
    return sdft("run", "recipe.yaml", "--compute", "compute.yaml", "--until", "score", cwd=folder)


def test_run_on_a_cluster_whose_nodes_are_too_small_is_an_error_at_once(folder, ray_cluster):
    done = run_on({"address": ray_cluster}, folder)
    assert done.returncode == 2
    needs = "compute.score: needs 4096 CPUs and 0 GPUs on one node; the largest has "
    assert done.stderr.splitlines()[-1].startswith(needs) and "waiting" not in done.stderr


def test_run_on_a_cluster_that_may_grow_waits_visibly_and_says_what_is_there(folder, ray_cluster):
    done = run_on({"address": ray_cluster, "largest_node": {"cpus": 8192}}, folder)
    assert done.returncode == 2
    needs = "needs 1 x (4096 CPUs, 0 GPUs); the cluster has "
    assert f"score: {needs}" in done.stderr and "waiting up to 1 s" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"compute.score: {needs}")
