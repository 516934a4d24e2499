"""Where rows, models and texts come from, and how bad input is refused: with file, line and what to do."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdft_ray import sources
from sdft_ray.errors import UserError
from sdft_ray.recipe import FileRows, GymRows, LocalModel, PackagedModel

FIELDS = {"prompt": "question", "response": "answer"}
GSM = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(5)]
HARD_SUMS = {"min_digits": 5, "max_digits": 5}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model that may be spoilt."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def complaint(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def file_rows(path, **settings) -> FileRows:
    return FileRows.model_validate({"path": str(path), "fields": FIELDS, **settings})


def read_jsonl(path, lines, **settings):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return sources.read_rows(file_rows(path, **settings))


# --- rows -----------------------------------------------------------------------------------------------------


def write_parquet(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(GSM), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", lambda path: path.write_text("\n".join(json.dumps(row) for row in GSM))),
        ("rows.json", lambda path: path.write_text(json.dumps(GSM))),
        ("rows.parquet", write_parquet),
    ],
)
def test_read_rows_is_the_same_from_every_kind_of_file(tmp_path, name, write):
    write(tmp_path / name)
    assert sources.read_rows(file_rows(tmp_path / name)) == [
        {"prompt": f"{i}?", "reference": f"#### {i}", "answer": None} for i in range(5)
    ]


@pytest.mark.parametrize(("limit", "read"), [(None, 5), (2, 2), (5, 5), (99, 5)])
def test_read_rows_takes_at_most_limit_rows_from_the_start(tmp_path, limit, read):
    rows = read_jsonl(tmp_path / "rows.jsonl", GSM, limit=limit)
    assert [row["prompt"] for row in rows] == [f"{i}?" for i in range(read)]


def test_read_rows_puts_context_before_the_prompt_and_makes_the_answer_text(tmp_path):
    fields = {**FIELDS, "context": "passage", "answer": "final"}
    rows = read_jsonl(
        tmp_path / "rows.jsonl",
        [
            {"question": "q", "answer": "a", "passage": "Long ago.", "final": 4.5},
            {"question": "q", "answer": "a", "passage": "", "final": "4"},
            {"question": "q", "answer": "a", "passage": None, "final": None},
        ],
        fields=fields,
    )
    assert [(row["prompt"], row["answer"]) for row in rows] == [("Long ago.\n\nq", "4.5"), ("q", "4"), ("q", None)]


@pytest.mark.parametrize(
    ("lines", "line", "what"),
    [
        ([GSM[0], '{"question": "x", \n'], 2, "is not JSON ("),
        ([GSM[0], "\n", "not JSON\n"], 3, "is not JSON (Expecting value at column 1). Fix this line"),
        ([GSM[0], "[1, 2]\n"], 2, "is not an object. Each line is one {...}."),
        ([{"question": 3, "answer": "a"}], 1, "question is a number, not text. Fix this row."),
        ([GSM[0], {"question": "q", "answer": None}], 2, "answer is empty, not text. Fix this row."),
    ],
)
def test_read_rows_of_a_bad_line_names_file_and_line(tmp_path, lines, line, what):
    path = tmp_path / "rows.jsonl"
    assert complaint(read_jsonl, path, lines).startswith(f"{path}:{line}: {what}")


def test_read_rows_without_a_column_suggests_the_nearest(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert complaint(read_jsonl, path, [GSM[0], {"qestion": "q", "answer": "a"}]) == (
        f"rows.fields.prompt: {path}:2 has no question. Did you mean qestion?"
    )
    assert complaint(read_jsonl, path, [{"instruction": "q", "output": "a"}]) == (
        f"rows.fields.prompt: {path}:1 has no question. Known: instruction, output."
    )


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (
            "rows.json",
            b'{"question": "q"}',
            "{path}: is an object, not a list (of question). Give a list of objects, or a .jsonl file.",
        ),
        ("rows.json", b'[{"question": "q", "answer": "a"}, 3]', "{path}:2: is not an object. Give a list of objects."),
        ("rows.json", b"[\n1,\n", "{path}:3: is not JSON (Expecting value). Fix this line."),
        (
            "rows.csv",
            b"a,b",
            "{path}: is a .csv file, which is not known. Save it as a .json, .jsonl or .parquet file.",
        ),
    ],
)
def test_read_rows_of_a_bad_file_is_one_clear_line(tmp_path, name, content, line):
    path = tmp_path / name
    path.write_bytes(content)
    assert complaint(sources.read_rows, file_rows(path)).startswith(line.format(path=path))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.json"])
def test_read_rows_of_a_file_of_other_bytes_names_it(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'[{"question": "caf\xe9"}]')
    assert complaint(sources.read_rows, file_rows(path)).startswith(str(path))


def test_read_rows_of_a_missing_file_is_one_clear_line(tmp_path):
    path = tmp_path / "none.jsonl"
    line = f"rows.path: {path} does not exist. Give a .json, .jsonl or .parquet file."
    assert complaint(sources.read_rows, file_rows(path)) == line
    assert complaint(sources.rows_identity, file_rows(path)) == line


def test_rows_identity_of_a_file_moves_with_its_content_and_columns_and_not_with_its_place(tmp_path):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for path, text in zip(paths, ("same", "same", "other"), strict=True):
        path.write_text(text)
    same, moved, other = (sources.rows_identity(file_rows(path)) for path in paths)
    assert same == moved
    assert same != other
    assert sources.rows_identity(file_rows(paths[0], fields={**FIELDS, "answer": "x"})) != same
    assert str(tmp_path) not in json.dumps(same)


def test_gym_rows_of_neighbouring_seeds_share_none():
    prompts = [
        {row["prompt"] for row in sources.read_rows(GymRows(gym="chain_sum", limit=40, seed=seed, options=HARD_SUMS))}
        for seed in (0, 1)
    ]
    assert [len(each) for each in prompts] == [40, 40]
    assert not prompts[0] & prompts[1]


def test_gym_rows_of_a_larger_limit_begin_with_those_of_a_smaller():
    few, many = (
        sources.read_rows(GymRows(gym="chain_sum", limit=limit, seed=3, options=HARD_SUMS)) for limit in (5, 12)
    )
    assert len(few) == 5
    assert many[:5] == few


def test_gym_rows_are_checkable_by_their_own_answer():
    for row in sources.read_rows(GymRows(gym="chain_sum", limit=5)):
        expression = row["prompt"].partition(":")[2].strip(" =")
        assert int(row["answer"]) == eval(expression)  # a sum that reasoning-gym wrote
        assert row["reference"] == row["answer"]


def test_gym_rows_of_an_unknown_task_suggest_the_nearest():
    line = complaint(sources.read_rows, GymRows(gym="chain_sums", limit=2))
    assert line == "rows.gym: chain_sums is no task of reasoning-gym. Did you mean chain_sum?"


@pytest.mark.parametrize("options", [{"max_termz": 2}, {"min_terms": 5, "max_terms": 2}])
def test_gym_rows_with_options_that_the_task_refuses_are_one_clear_line(options):
    line = complaint(sources.read_rows, GymRows(gym="chain_sum", limit=2, options=options))
    assert line.startswith("rows.options: chain_sum refuses them (")


# --- models ---------------------------------------------------------------------------------------------------


def test_describe_directory_reads_architecture_and_blocks(model):
    assert sources.describe_directory(model) == sources.ModelFacts("llama", 6, context=2048)


@pytest.mark.parametrize(
    ("lost", "line"),
    [
        ("config.json", "{path}/config.json: is no Hugging Face model directory. Check the path."),
        (
            "model.safetensors",
            "{path}: has no weights (expected *.safetensors). Copy or download them, too.",
        ),
        ("tokenizer.json", "{path}: has no tokenizer. Put the model's tokenizer files beside it."),
        ("chat_template.jinja", "{path}: has no chat template. Give an instruction-tuned model."),
    ],
)
def test_describe_directory_that_lacks_a_part_names_it(model, lost, line):
    (model / lost).unlink()
    assert complaint(sources.describe_directory, model) == line.format(path=model)


def test_describe_directory_with_pickled_weights_gives_a_command_that_converts_them(model):
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    line = complaint(sources.describe_directory, model)
    assert line.startswith(f"{model}: has pickled weights only, and a pickle can run code (expected *.safetensors). ")
    command = line.partition("Convert it: python -c ")[2].removesuffix(".")
    subprocess.run([sys.executable, "-c", *shlex.split(command)], check=True, capture_output=True)
    assert sources.describe_directory(model).blocks == 6
    assert all(torch.equal(state[name], tensor) for name, tensor in load_file(model / "model.safetensors").items())


def test_code_that_a_model_brings_is_never_run(model, tmp_path):
    (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    config = json.loads((model / "config.json").read_text())
    del config["tie_word_embeddings"]  # so that the library is asked for the default
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "own.C"}}))
    sources.describe_directory(model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["own.C", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    what = "asks for a tokenizer that is code of the model's own, which is never run (auto_map). Give a model whose"
    assert what in complaint(sources.describe_directory, model)
    assert not (tmp_path / "ran").exists()


def test_describe_directory_with_quantised_weights_says_so(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    assert complaint(sources.describe_directory, model) == (
        f"{model / 'config.json'}: its weights are quantised (mxfp4). Give the model as it was before, in bfloat16."
    )


def test_describe_directory_with_a_damaged_shard_names_it(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert complaint(sources.describe_directory, model).startswith(f"{path}: is damaged: its header tells of ")


@pytest.fixture
def sharded(model):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    whole.save_pretrained(model, max_shard_size="200KB")
    return model


def test_describe_directory_with_an_index_that_names_a_missing_tensor_says_which(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = sorted(set(index["weight_map"].values()))[1]
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"model.layers.9.up.weight": file}}))
    assert complaint(sources.describe_directory, sharded) == (
        f"{path}: says that {file} holds model.layers.9.up.weight, which it does not. Copy or download the model again."
    )


def test_describe_directory_with_an_index_that_names_a_missing_file_says_which(sharded):
    path = sharded / "model.safetensors.index.json"
    file = sorted(set(json.loads(path.read_text())["weight_map"].values()))[1]
    (sharded / file).unlink()
    assert complaint(sources.describe_directory, sharded) == (
        f"{path}: names {file}, which is not beside it. Copy or download that file, too."
    )


def test_describe_directory_with_an_index_that_is_none_says_so(sharded):
    path = sharded / "model.safetensors.index.json"
    path.write_text("[]")
    assert complaint(sources.describe_directory, sharded) == f"{path}: is not an object. Copy or download it again."


@pytest.mark.parametrize("told", [True, False], ids=["tied-by-config", "tied-by-default"])
def test_describe_directory_of_a_tied_model_takes_an_equal_head_and_refuses_another(model, told):
    path = model / "model.safetensors"
    config = json.loads((model / "config.json").read_text())
    if not told:
        del config["tie_word_embeddings"]
        config |= {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}
        (model / "config.json").write_text(json.dumps(config))
    weights = load_file(path)
    head = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, path)
    assert sources.describe_directory(model).blocks == 6
    head[-1, -1] += 1
    save_file(weights | {"lm_head.weight": head}, path)
    assert complaint(sources.describe_directory, model) == (
        f"{model / 'config.json'}: tie_word_embeddings is true, but lm_head.weight is not the embeddings. "
        "Set it to false, or take lm_head.weight out of the weights."
    )


def test_describe_directory_of_an_untied_model_takes_any_head(model):
    path = model / "model.safetensors"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": torch.zeros_like(weights["model.embed_tokens.weight"])}, path)
    assert sources.describe_directory(model).blocks == 6


def test_describe_directory_takes_a_chat_template_inside_the_tokenizer_config(model):
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    assert sources.describe_directory(model).blocks == 6


def test_describe_directory_with_a_broken_config_names_file_and_line(model):
    (model / "config.json").write_text('{"model_type": "llama",\n"x": }')
    assert complaint(sources.describe_directory, model).startswith(f"{model / 'config.json'}:2: is not JSON (")


def test_model_stage_of_a_directory_lies_where_it_is_and_moves_with_its_content(model, tmp_path):
    stage = sources.model_stage(LocalModel(path=str(model)), 1)
    assert stage.location == model
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    assert sources.model_stage(LocalModel(path=str(copy)), 1).id == stage.id
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert sources.model_stage(LocalModel(path=str(copy)), 1).id != stage.id


def test_model_stage_of_a_path_that_is_no_model_is_one_clear_line(tmp_path):
    missing, text = tmp_path / "none", tmp_path / "model.txt"
    text.write_text("hi")
    assert complaint(sources.model_stage, LocalModel(path=str(missing)), 1) == (
        f"model.path: {missing} does not exist. Give a model directory or a .gguf file."
    )
    assert complaint(sources.model_stage, LocalModel(path=str(text)), 1) == (
        f"model.path: {text} is not a .gguf file. Give the directory it lies in."
    )


@pytest.mark.parametrize("content", [b"no header", b"GGUF\x03\x00\x00\x00\x01"], ids=["other", "cut"])
def test_describe_model_refuses_a_gguf_file_that_cannot_be_read(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.gguf: cannot be read as GGUF \(.*\)\. Download it again\.") as caught:
        sources.describe_model(LocalModel(path=str(tmp_path / "model.gguf")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("package", "file", "line"),
    [
        ("no_such_thing", "x.gguf", "model.package: no_such_thing is not installed. "),
        ("no_such_thing.inner", "x.gguf", "model.package: no_such_thing.inner is not installed. "),
        ("reasoning_gym", "x.gguf", "model.file: reasoning_gym has no x.gguf. "),
    ],
)
def test_model_stage_of_a_package_that_lacks_it_is_one_clear_line(package, file, line):
    assert complaint(sources.model_stage, PackagedModel(package=package, file=file), 1).startswith(line)


# --- calibration texts and benchmark files ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.txt", "one\ntwo\n\nthree\n\n\n\n one\ntwo \n\nfour"),
        (
            "texts.jsonl",
            "".join(json.dumps({"text": t}) + "\n" for t in ("one\ntwo", "three", " ", "one\ntwo", "four")),
        ),
    ],
)
def test_read_calibration_takes_the_first_distinct_texts(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert sources.read_calibration(path, "text", 9) == ["one\ntwo", "three", "four"]
    assert sources.read_calibration(path, "text", 2) == ["one\ntwo", "three"]


def test_read_calibration_without_the_column_suggests_the_nearest(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"texts": "a"}\n')
    assert complaint(sources.read_calibration, path, "text", 2) == (
        f"prune.calibration.field: {path}:1 has no text. Did you mean texts?"
    )


@pytest.mark.parametrize("content", ["", " \n\n \n"])
def test_read_calibration_of_no_text_is_one_clear_line(tmp_path, content):
    path = tmp_path / "texts.txt"
    path.write_text(content)
    assert complaint(sources.read_calibration, path, "text", 2) == (
        f"prune.calibration.text: {path} holds no text. Give a file with texts."
    )


def test_offline_task_file_of_an_unknown_task_suggests_the_nearest():
    assert complaint(sources.offline_task_file, "arc_eazy") == (
        "evaluate.tasks: no offline files for arc_eazy. "
        "Did you mean arc_easy? Or set evaluate.preset: harness for tasks of a hub."
    )
