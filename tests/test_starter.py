"""`sdft init` writes a recipe that `sdft check` accepts, and guesses nothing silently."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import complaint

from sdft_ray import cli
from sdft_ray.data.readers import read_rows
from sdft_ray.preflight.starter import Columns, choose_columns
from sdft_ray.spec.loading import load_recipe
from sdft_ray.spec.sources import Fields, FileRows

SUMS = [{"question": f"What is {i} + {i}?", "answer": f"Twice {i} is\n#### {2 * i}"} for i in range(60)]
TALK = [
    {"instruction": f"Write about {i}.", "input": "A note." * (i % 2), "output": f"No {i}, a word."} for i in range(60)
]


def save(rows: list[dict], path: Path) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def init(tiny_model, tmp_path, monkeypatch):
    """Return what runs `sdft init` for the tiny model in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def run(rows: Path | str, *more: str, model: str | Path = tiny_model) -> int:
        return cli.main(["init", "--model", str(model), "--rows", str(rows), *more])

    return run


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("rows", [SUMS, TALK], ids=["sums", "talk"])
def test_init_writes_a_recipe_that_check_accepts(init, tmp_path, rows, suffix, capsys):
    assert init(save(rows, tmp_path / f"my rows{suffix}")) == 0, capsys.readouterr().err
    assert cli.main(["check", "recipe.yaml"]) == 0, capsys.readouterr().err


def test_init_fits_sizes_to_rows_and_model(init, tmp_path):
    init(save(SUMS, tmp_path / "rows.jsonl"))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.rows[0].held_out, recipe.rows[0].validation, recipe.rows[0].limit) == (6, 6, None)
    assert recipe.prune.blocks == 1  # of 6
    assert "held_out" in recipe.evaluate.tasks and recipe.rows[0].answer == "number"
    assert {recipe.distill.dtype, recipe.train.dtype, recipe.evaluate.dtype} == {"float32"}


def test_init_of_open_ended_rows_checks_no_answer(init, tmp_path):
    init(save(TALK, tmp_path / "rows.jsonl"))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.rows[0].answer == "none" and recipe.rows[0].held_out == 0 and "held_out" not in recipe.evaluate.tasks
    assert recipe.rows[0].fields.model_dump(exclude_none=True) == {
        "prompt": "instruction",
        "response": "output",
        "context": "input",
    }


def test_init_guesses_around_the_columns_that_are_given(init, tmp_path):
    rows = [{"question": f"{i}", "prompt": f"{i}?", "text": "x"} for i in range(40)]
    init(save(rows, tmp_path / "rows.jsonl"), "--response", "question")
    fields = load_recipe(tmp_path / "recipe.yaml").rows[0].fields
    assert (fields.prompt, fields.response) == ("prompt", "question")
    assert "# Columns of prompt guessed from: question, prompt, text." in (tmp_path / "recipe.yaml").read_text()


def test_init_of_a_large_file_takes_a_part_and_says_so(init, tmp_path):
    rows = [{"question": f"{i}?", "answer": f"{i}"} for i in range(1500)]
    init(save(rows, tmp_path / "rows.jsonl"))
    assert load_recipe(tmp_path / "recipe.yaml").rows[0].limit == 1000
    assert "The file has more rows" in (tmp_path / "recipe.yaml").read_text()


def test_init_of_long_rows_leaves_them_in(init, tmp_path, capsys):
    rows = [{"question": f"{i}?" + " why" * 150, "answer": f"{'so ' * 30}#### {i}"} for i in range(40)]
    assert init(save(rows, tmp_path / "rows.jsonl")) == 0
    assert cli.main(["check", "recipe.yaml"]) == 0, capsys.readouterr().err
    assert load_recipe(tmp_path / "recipe.yaml").train.max_tokens > 690  # bytes are tokens here


def test_init_names_all_columns_in_a_comment_where_it_guesses(init, tmp_path):
    rows = [row | {"id": "x"} for row in SUMS]
    init(save(rows, tmp_path / "rows.jsonl"))
    assert "# Columns of prompt, response guessed from: question, answer, id." in (tmp_path / "recipe.yaml").read_text()


def test_init_takes_an_answer_column_beside_the_solution(init, tmp_path):
    rows = [{"problem": f"{i} + 1?", "solution": "Add one.", "answer": i + 1} for i in range(40)]
    init(save(rows, tmp_path / "rows.jsonl"))
    fields = load_recipe(tmp_path / "recipe.yaml").rows[0].fields
    assert (fields.prompt, fields.response, fields.answer) == ("problem", "solution", "answer")


@pytest.mark.parametrize(
    "name", ["no", "1e5", "a: b", 'say "x"', "naïve 😀 #1", "line\nbreak", "sep\u2028x", "a,b", "{x}"]
)
def test_init_quotes_whatever_a_column_is_called(init, tmp_path, name, capsys):
    rows = [{name: f"{i}?", "answer": f"{i}"} for i in range(40)]
    assert init(save(rows, tmp_path / "rows.jsonl"), "--prompt", name) == 0
    assert load_recipe(tmp_path / "recipe.yaml").rows[0].fields.prompt == name
    assert cli.main(["check", "recipe.yaml"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "more", "line"),
    [
        (
            {"x": "1?", "answer": "1"},
            (),
            "--rows: no column of rows.jsonl is known to be the prompt (columns: x, answer). Give --prompt COL.",
        ),
        (
            {"x": "1?", "y": "1"},
            (),
            "--rows: no column of rows.jsonl is known to be the prompt or the response (columns: x, y). Give --prompt "
            "COL and --response COL.",
        ),
        (
            {"question": ["1?"], "answer": "1"},
            (),
            "--rows: no column of rows.jsonl is known to be the prompt (columns: question, answer). Give --prompt COL.",
        ),
        ({"x": "1?", "y": "1"}, ("--prompt", "zz"), "--prompt: rows.jsonl has no zz. Known: x, y."),
        (
            {"x": "1?", "y": "1"},
            ("--context", "x", "--response", "x"),
            "--response: x is the column of the context, too. Give another column.",
        ),
        (
            {"q": "1?", "a": "1"},
            ("--out", "none/recipe.yaml"),
            "--out: none is no directory. Make none.",
        ),
        ({"q": "", "a": "1"}, (), "rows: 0 usable rows (of 1; 1 rows had a blank prompt or response) leave none"),
    ],
)
def test_init_that_cannot_know_is_one_line_with_the_option_to_give(init, tmp_path, row, more, line, capsys):
    save([row], tmp_path / "rows.jsonl")
    assert init("rows.jsonl", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("rows", "model", "line"),
    [
        ("none.jsonl", None, "--rows: none.jsonl does not exist."),
        ("rows.jsonl", "./nowhere", "--model: nowhere does not exist. Give a model directory or a .gguf file."),
        ("empty.jsonl", None, "--rows: empty.jsonl has no rows."),
    ],
)
def test_init_without_its_inputs_is_one_line(init, tmp_path, tiny_model, rows, model, line, capsys):
    save(SUMS, tmp_path / "rows.jsonl")
    save([], tmp_path / "empty.jsonl")
    assert init(rows, model=model or tiny_model) == 2
    assert capsys.readouterr().err.startswith(line)


def test_init_overwrites_nothing(init, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("mine")
    assert init(save(SUMS, tmp_path / "rows.jsonl")) == 2
    assert capsys.readouterr().err == "recipe.yaml: exists already. Give another --out.\n"
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_init_for_a_hub_model_out_of_reach_leaves_the_commit_to_fill_in(init, tmp_path, capsys):
    assert init(save(SUMS, tmp_path / "rows.jsonl"), model="some/model") == 0
    assert "git ls-remote https://huggingface.co/some/model HEAD" in capsys.readouterr().err
    assert cli.main(["check", "recipe.yaml"]) == 2
    assert capsys.readouterr().err.startswith("model.revision: 'FILL_IN' moves.")
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert cli.main(["check", "recipe.yaml", "--set", f"model.revision={commit}"]) == 0


USER, REPLY = {"role": "user", "content": "4 + 4?"}, {"role": "assistant", "content": "8"}


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"id": 1, "messages": json.dumps([USER, REPLY])}, {"messages": "messages"}),
        (
            {"conversations": json.dumps([{"from": "human", "value": "4?"}, {"from": "gpt", "value": "8"}])},
            {"messages": "conversations", "format": "sharegpt"},
        ),
        ({"input": [USER], "output": "8", "category": "math"}, {"messages": "input", "response": "output"}),
        ({"prompt": [USER], "completion": [REPLY]}, {"messages": "prompt", "response": "completion"}),
        ({"completion": [REPLY], "prompt": [USER]}, {"messages": "prompt", "response": "completion"}),
        ({"prompt": "4 + 4?", "rejected": [USER, REPLY], "chosen": [USER, REPLY]}, {"messages": "chosen"}),
        ({"messages": [USER, REPLY], "tools": "[]"}, {"messages": "messages", "tools": "tools"}),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY]}, {"messages": "prompt", "response": "chosen"}),
        ({"messages": [USER, REPLY], "system": "Be short."}, {"messages": "messages", "context": "system"}),
        ({"messages": [{"role": "system", "content": "Be."}, USER, REPLY], "system": "Be."}, {"messages": "messages"}),
    ],
)
def test_choose_columns_of_conversations_takes_those_with_a_response(tmp_path, row, fields):
    path = save([row], tmp_path / "rows.jsonl")
    assert choose_columns(str(path), Columns())[0] == fields


@pytest.mark.parametrize("missing", [{"input": float("nan")}, {"input": None}, {}])
def test_choose_columns_takes_a_context_that_some_rows_lack(tmp_path, missing):
    row = {"instruction": "Who came?", "output": "Ann."}
    path = save([{**row, **missing}, {**row, "input": "Ann came."}], tmp_path / "rows.jsonl")
    fields = choose_columns(str(path), Columns())[0]
    assert fields == {"prompt": "instruction", "response": "output", "context": "input"}
    rows = read_rows(FileRows(path=str(path), fields=Fields.model_validate(fields)))
    assert [row.prompt for row in rows] == ["Who came?", "Ann came.\n\nWho came?"]


def test_choose_columns_of_conversations_where_one_ends_with_the_user_takes_them(tmp_path):
    path = save([{"messages": [USER]}, {"messages": [USER, REPLY]}], tmp_path / "rows.jsonl")
    assert choose_columns(str(path), Columns())[0] == {"messages": "messages"}


def test_choose_columns_of_conversations_without_responses_is_one_line(tmp_path):
    path = save([{"turns": [USER], "note": "n"}], tmp_path / "rows.jsonl")
    assert complaint(choose_columns, str(path), Columns()) == (
        f"--rows: the conversations of turns in {path} end before a response (columns: turns, note). "
        "Put the response behind them, as a turn of the assistant."
    )


def test_choose_columns_of_a_home_of_nobody_is_one_line():
    line = "--rows: ~nobody-1729/rows.jsonl begins with the home of nobody here. Write the whole path."
    assert complaint(choose_columns, "~nobody-1729/rows.jsonl", Columns()) == line
