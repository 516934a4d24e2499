"""Where rows, models and texts come from, and how bad input is refused: with file, line and what to do."""

import codecs
import json
import math
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import BLOCK, make_tiny_gguf

from sdft_ray.core.rows import Row
from sdft_ray.data import benchmarks, calibration, readers
from sdft_ray.errors import UserError
from sdft_ray.models import directory, sources, tokens
from sdft_ray.spec.sources import FileRows, GymRows, LocalModel, PackagedModel
from sdft_ray.stages.model import stage as model_stage

FIELDS = {"prompt": "question", "response": "answer"}
GSM = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(5)]
EXTRA = {"context": "context", "answer": "final"}
HARD_SUMS = {"min_digits": 5, "max_digits": 5}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model that may be spoilt."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def complaint(call, *arguments, **settings) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **settings)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def file_rows(path, **settings) -> FileRows:
    return FileRows.model_validate({"path": str(path), "fields": FIELDS, **settings})


def rows_identity(path, **settings) -> dict:
    return readers.rows_content(file_rows(path, **settings)).hashed()


def read_jsonl(path, lines, **settings):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return readers.read_rows(file_rows(path, **settings))


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
    assert readers.read_rows(file_rows(tmp_path / name)) == [Row(f"{i}?", f"#### {i}", None) for i in range(5)]


@pytest.mark.parametrize(("limit", "read"), [(None, 5), (2, 2), (5, 5), (99, 5)])
def test_read_rows_takes_at_most_limit_rows_from_the_start(tmp_path, limit, read):
    rows = read_jsonl(tmp_path / "rows.jsonl", GSM, limit=limit)
    assert [row.prompt for row in rows] == [f"{i}?" for i in range(read)]


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
    assert [(row.prompt, row.answer) for row in rows] == [("Long ago.\n\nq", "4.5"), ("q", "4"), ("q", None)]


@pytest.mark.parametrize(
    ("lines", "line", "what"),
    [
        ([GSM[0], '{"question": "x", \n'], 2, "is not JSON ("),
        ([GSM[0], "\n", "not JSON\n"], 3, "is not JSON (Expecting value at column 1). Fix this line"),
        ([GSM[0], "[1, 2]\n"], 2, "is not an object. Write one {...} a line."),
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
            "{path}: is an object, not a list (of question). Give a list of objects.",
        ),
        ("rows.json", b'[{"question": "q", "answer": "a"}, 3]', "{path}:2: is not an object. Give a list of objects."),
        ("rows.json", b"[\n1,\n", "{path}:3: is not JSON (Expecting value). Fix this line."),
        (
            "rows.tsv",
            b"a,b",
            "{path}: is a .tsv file, which is not known. Save it as a .json, .jsonl, .csv, .parquet or .arrow file.",
        ),
    ],
)
def test_read_rows_of_a_bad_file_is_one_clear_line(tmp_path, name, content, line):
    path = tmp_path / name
    path.write_bytes(content)
    assert complaint(readers.read_rows, file_rows(path)).startswith(line.format(path=path))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.json"])
def test_read_rows_of_a_file_of_other_bytes_names_it(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'[{"question": "caf\xe9"}]')
    assert complaint(readers.read_rows, file_rows(path)).startswith(str(path))


@pytest.mark.parametrize("missing", [float("nan"), None, "", "  "])
def test_read_rows_of_no_context_is_the_prompt_alone(tmp_path, missing):
    row = {"question": "What is 4 + 4?", "context": missing, "answer": "#### 8"}
    (read,) = read_jsonl(tmp_path / "rows.jsonl", [row], fields={**FIELDS, "context": "context"})
    assert read.prompt == "What is 4 + 4?"


def test_read_rows_of_a_table_takes_its_missing_values_for_missing(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {"question": ["q", "r"], "answer": ["a", "b"], "year": [math.nan, None], "final": [math.nan, 7.5]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    fields = {**FIELDS, "context": "year", "answer": "final"}
    rows = readers.read_rows(file_rows(tmp_path / "rows.parquet", fields=fields))
    assert [(row.prompt, row.answer) for row in rows] == [("q", None), ("r", "7.5")]


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("context", ["Ann came.", "Bob left."], "context is a list, not text"),
        ("context", {"text": "Ann came."}, "context is an object, not text"),
        ("context", 3, "context is a number, not text"),
        ("context", True, "context is true, not text"),
        ("final", ["3", "4"], "final is a list, not text or a number"),
        ("final", {"value": 4}, "final is an object, not text or a number"),
        ("final", False, "final is false, not text or a number"),
        ("question", ["q"], "question is a list, not text"),
        ("answer", math.nan, "answer is empty, not text"),
    ],
)
def test_read_rows_of_what_is_no_text_names_file_line_and_kind(tmp_path, column, value, what):
    path = tmp_path / "rows.jsonl"
    good = {"question": "q", "answer": "a", "context": "c", "final": 4}
    line = complaint(read_jsonl, path, [good, {**good, column: value}], fields={**FIELDS, **EXTRA})
    assert line == f"{path}:2: {what}. Fix this row."


@pytest.mark.parametrize(
    ("key", "turns", "do"),
    [
        ("messages", [{"role": "user", "content": "4 + 4?"}, {"role": "assistant", "content": "8"}], ""),
        ("conversations", [{"from": "human", "value": "4?"}, {"from": "gpt", "value": "8"}], ", format: sharegpt"),
        ("messages", json.dumps([{"role": "user", "content": "4?"}, {"role": "assistant", "content": "8"}]), ""),
        ("question", [{"role": "user", "content": "4 + 4?"}], ", response: answer"),
    ],
)
def test_read_rows_of_a_conversation_as_columns_names_the_fields_to_set(tmp_path, key, turns, do):
    path = tmp_path / "rows.jsonl"
    line = complaint(read_jsonl, path, [{"answer": "8", key: turns}])
    assert line == f"{path}:1: {key} is a conversation. Set rows.fields to {{messages: {key}{do}}}."


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b'%s{"question": "q", "answer": "a"}\n%s{"question": "r", "answer": "b"}\n%s'),
        ("rows.json", b'%s[{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]'),
        ("ROWS.JSONL", b'%s{"question": "q", "answer": "a"}\r\n\r\n{"question": "r", "answer": "b"}'),
    ],
)
def test_read_rows_does_not_mind_byte_order_marks_line_ends_and_capital_suffixes(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.replace(b"%s", codecs.BOM_UTF8))
    assert [row.prompt for row in readers.read_rows(file_rows(path))] == ["q", "r"]


LINES = b'{"question": "q", "answer": "a"}\n{"question": "r", "answer": "b"}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("rows.json", LINES, "{path}: holds JSON lines, not a list. Rename it to end in .jsonl."),
        ("rows.json", codecs.BOM_UTF8 + LINES, "{path}: holds JSON lines, not a list. Rename it to end in .jsonl."),
        (
            "rows.jsonl",
            b'[{"question": "q"}]',
            "{path}: is a JSON list, not one object a line. Rename it to end in .json.",
        ),
        ("rows.jsonl", b"[\n{}\n]", "{path}: is a JSON list, not one object a line. Rename it to end in .json."),
        ("rows.jsonl", b'{\n"question": "q"\n}', "{path}:1: is not JSON (Expecting property name"),
        (
            "rows.json",
            b'{"version": 1, "data": [{"question": "q"}]}',
            "{path}: is an object, not a list (with a list in data). Save one list of objects by itself.",
        ),
        ("rows.json", b'"text"', "{path}: is not a list. Give a list of objects."),
        ("rows.jsonl", LINES.decode().encode("utf-16"), "{path}: is UTF-16 text. Save it as UTF-8."),
        ("rows.json", "[]".encode("utf-16-le"), "{path}: is UTF-16 text. Save it as UTF-8."),
        ("rows.jsonl", LINES.decode().encode("utf-32"), "{path}: is UTF-32 text. Save it as UTF-8."),
        ("rows.jsonl", LINES + b'{"question": "caf\xe9"}', "{path}:3: is not UTF-8 text. Save the file as UTF-8."),
        ("rows.jsonl", POINTER, "{path}: is a Git LFS pointer, not the file itself. Do: git lfs pull."),
        ("rows.parquet", POINTER, "{path}: is a Git LFS pointer, not the file itself. Do: git lfs pull."),
        (
            "rows.jsonl.bz2",
            b"",
            "{path}: is a .bz2 file, which is not known. Save it as a .json, .jsonl, .csv, .parquet or .arrow file.",
        ),
        (
            "rows",
            LINES,
            "{path}: has no suffix that names its format. Save it as a .json, .jsonl, .csv, .parquet or .arrow file.",
        ),
    ],
)
def test_read_rows_of_a_file_in_another_form_says_what_it_is_and_what_to_do(tmp_path, name, content, line):
    path = tmp_path / name
    path.write_bytes(content)
    said = complaint(readers.read_rows, file_rows(path))
    assert said.startswith(line.format(path=path)), said


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("content", [b"", b" \n\n", codecs.BOM_UTF8])
def test_read_rows_of_an_empty_file_is_none(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert readers.read_rows(file_rows(tmp_path / name)) == []


def test_read_rows_of_a_missing_file_is_one_clear_line(tmp_path):
    path = tmp_path / "none.jsonl"
    line = (
        f"rows.path: {path} does not exist. Give a .json, .jsonl, .csv, .parquet or .arrow file, a directory or a glob."
    )
    assert complaint(readers.read_rows, file_rows(path)) == line
    assert complaint(readers.rows_content, file_rows(path)) == line


def test_rows_identity_of_a_file_moves_with_its_content_and_columns_and_not_with_its_place(tmp_path):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for path, text in zip(paths, ("same", "same", "other"), strict=True):
        path.write_text(text)
    same, moved, other = (rows_identity(path) for path in paths)
    assert same == moved
    assert same != other
    assert rows_identity(paths[0], fields={**FIELDS, "answer": "x"}) != same
    assert str(tmp_path) not in json.dumps(same)


def test_gym_rows_of_neighbouring_seeds_share_none():
    prompts = [
        {row.prompt for row in readers.read_rows(GymRows(gym="chain_sum", limit=40, seed=seed, options=HARD_SUMS))}
        for seed in (0, 1)
    ]
    assert [len(each) for each in prompts] == [40, 40]
    assert not prompts[0] & prompts[1]


def test_gym_rows_of_a_larger_limit_begin_with_those_of_a_smaller():
    few, many = (
        readers.read_rows(GymRows(gym="chain_sum", limit=limit, seed=3, options=HARD_SUMS)) for limit in (5, 12)
    )
    assert len(few) == 5
    assert many[:5] == few


def test_gym_rows_are_checkable_by_their_own_answer():
    for row in readers.read_rows(GymRows(gym="chain_sum", limit=5)):
        expression = row.prompt.partition(":")[2].strip(" =")
        assert int(row.answer) == eval(expression)  # a sum that reasoning-gym wrote
        assert row.reference == row.answer


def test_gym_rows_of_an_unknown_task_suggest_the_nearest():
    line = complaint(readers.read_rows, GymRows(gym="chain_sums", limit=2))
    assert line == "rows.gym: chain_sums is no task of reasoning-gym. Did you mean chain_sum?"


@pytest.mark.parametrize("options", [{"max_termz": 2}, {"min_terms": 5, "max_terms": 2}])
def test_gym_rows_with_options_that_the_task_refuses_are_one_clear_line(options):
    line = complaint(readers.read_rows, GymRows(gym="chain_sum", limit=2, options=options))
    assert line.startswith("rows.options: chain_sum refuses them (")


# --- models ---------------------------------------------------------------------------------------------------


def test_describe_directory_reads_architecture_and_blocks(model):
    assert directory.describe_directory(model) == directory.ModelFacts("llama", 6, context=2048, heads=2)


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
    assert complaint(directory.describe_directory, model) == line.format(path=model)


FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "chat_template.jinja")


@pytest.mark.parametrize("name", [*FILES, "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["directory", "link"])
def test_describe_directory_of_what_only_has_the_name_of_a_file_says_what_it_is(model, name, kind):
    (model / name).unlink(missing_ok=True)
    if kind == "directory":
        (model / name).mkdir()
    else:
        (model / name).symlink_to("blobs/1f3a")
    what = "a directory, not a file" if kind == "directory" else "a link to blobs/1f3a, which is not there"
    assert complaint(directory.describe_directory, model) == f"{model / name}: is {what}. Copy or download it again."


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"num_hidden_layers": "6"}, 'num_hidden_layers is "6", not a whole number above 0. Copy'),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, not a whole number above 0. Copy"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0, not a whole number above 0. Copy"),
        ({"model_type": "unheard", "tie_word_embeddings": None}, "is refused by transformers (The checkpoint you are"),
    ],
)
def test_describe_directory_of_a_config_with_a_wrong_value_names_it(model, fields, line):
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text()) | fields
    (model / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    assert complaint(directory.describe_directory, model).startswith(f"{model / 'config.json'}: {line}")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"eos_token_id": "2"}, '(eos_token_id is "2")'),
        ({"eos_token_id": [[2]]}, "(eos_token_id is [[2]])"),
        ({"eos_token_id": True}, "(eos_token_id is true)"),
        ({"cache_implementation": "odd"}, "(Invalid `cache_implementation` (odd)."),
    ],
)
def test_require_sound_of_a_generation_config_that_stops_no_model_says_why(model, settings, line):
    (model / "generation_config.json").write_text(json.dumps(settings))
    said = complaint(directory.require_sound, model)
    assert said.startswith(f"{model / 'generation_config.json'}: is refused by transformers {line}")


def test_require_sound_takes_weights_of_64_bits(model):
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor.double() for name, tensor in tensors.items()}, model / "model.safetensors")
    directory.require_sound(model)


def test_require_sound_of_a_config_that_transformers_explains_in_two_lines_has_both(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))
    assert "validate_architecture': ValueError: The hidden size (64)" in complaint(directory.require_sound, model)


def reshaped(tensors):
    tensors["model.layers.3.mlp.down_proj.weight"] = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "cannot be loaded (model.norm.weight is missing). Copy"),
        (lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"), "layers.3.mlp.up_proj.weight is missing)"),
        (reshaped, "layers.3.mlp.down_proj.weight is (3, 5) in the files, (64, 96) in the model)"),
        (lambda tensors: tensors.update({"other.weight": torch.zeros(2)}), "other.weight is not in the model)"),
        (
            lambda tensors: tensors.update({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}),
            "is of F8_E4M3 (expected one of float32, bfloat16, float16, float64). Give the model before it was",
        ),
    ],
    ids=["norm", "of a block", "shape", "more", "fp8"],
)
def test_require_sound_of_weights_that_are_not_those_of_the_config_names_one(model, change, line):
    directory.require_sound(model)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert line in complaint(directory.require_sound, model)


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (
            "{% for m in messages %}{{ m.content",
            "its chat template cannot write a conversation of a user",
        ),
        ("{{ raise_exception('no') }}", "(no). Correct its chat template."),
        ("hello", "its chat template does not write both messages."),
    ],
)
def test_require_template_that_writes_no_conversation_is_one_line(model, template, line):
    (model / "chat_template.jinja").write_text(template)
    assert line in complaint(tokens.require_fitting, model, 259)


@pytest.mark.parametrize(
    ("token", "settings", "line"),
    [
        ({"special": True}, {}, None),  # as Gemma 3's text models have one for images
        ({"special": False}, {}, "its tokenizer has the token '<x>' with id 259, and the model 259 embeddings. Remove"),
        ({"special": True}, {"pad_token": "<x>"}, "the token '<x>' with id 259"),
        ({"special": True}, {"eos_token": "<x>"}, "the token '<x>' with id 259"),
        ({"special": True}, {"chat_template": True}, "the token '<x>' with id 259"),
        (None, {"eos_token": "<never>"}, "the token '<never>' with id 259"),
        (None, {"tokenizer_class": 3}, "its tokenizer cannot be loaded ("),
    ],
    ids=["control", "text", "pad", "eos", "template", "eos of no vocabulary", "class"],
)
def test_require_fitting_of_a_token_that_has_no_embedding_names_it(model, token, settings, line):
    if token:
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": 259, "content": "<x>"} | flags | token)
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    if settings.pop("chat_template", None):
        template = (model / "chat_template.jinja").read_text()
        (model / "chat_template.jinja").write_text(template.replace("<|im_start|>", "<x>"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | settings))
    if line is None:
        tokens.require_fitting(model, 259)
    else:
        assert line in complaint(tokens.require_fitting, model, 259)


def test_require_fitting_of_a_tokenizer_without_a_vocabulary_says_so(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its tokenizer does not give QUESTION back" in complaint(tokens.require_fitting, model, 259)


def test_describe_directory_with_pickled_weights_gives_a_command_that_converts_them(model):
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    line = complaint(directory.describe_directory, model)
    assert line.startswith(f"{model}: has pickled weights only, and a pickle can run code (expected *.safetensors). ")
    command = line.partition("Convert it: python -c ")[2].removesuffix(".")
    subprocess.run([sys.executable, "-c", *shlex.split(command)], check=True, capture_output=True)
    assert directory.describe_directory(model).blocks == 6
    assert all(torch.equal(state[name], tensor) for name, tensor in load_file(model / "model.safetensors").items())


def test_code_that_a_model_brings_is_never_run(model, tmp_path):
    (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    config = json.loads((model / "config.json").read_text())
    del config["tie_word_embeddings"]  # so that the library is asked for the default
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "own.C"}}))
    directory.describe_directory(model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["own.C", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    what = "asks for a tokenizer that is code of the model's own, which is never run (auto_map). Save the"
    assert what in complaint(directory.describe_directory, model)
    assert not (tmp_path / "ran").exists()


def test_describe_directory_with_quantised_weights_says_so(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    assert complaint(directory.describe_directory, model) == (
        f"{model / 'config.json'}: its weights are quantised (mxfp4). Give the model as it was before, in bfloat16."
    )


def test_describe_directory_with_a_damaged_shard_names_it(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert complaint(directory.describe_directory, model).startswith(f"{path}: is damaged: its header describes ")


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
    assert complaint(directory.describe_directory, sharded) == (
        f"{path}: names {file} as the file of model.layers.9.up.weight, which it lacks. "
        "Copy or download the model again."
    )


def test_describe_directory_with_an_index_that_names_a_missing_file_says_which(sharded):
    path = sharded / "model.safetensors.index.json"
    file = sorted(set(json.loads(path.read_text())["weight_map"].values()))[1]
    (sharded / file).unlink()
    assert complaint(directory.describe_directory, sharded) == (
        f"{path}: names {file}, which is not beside it. Copy or download that file, too."
    )


def test_describe_directory_with_an_index_that_is_none_says_so(sharded):
    path = sharded / "model.safetensors.index.json"
    path.write_text("[]")
    assert complaint(directory.describe_directory, sharded) == f"{path}: is not an object. Copy or download it again."


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
    assert directory.describe_directory(model).blocks == 6
    head[-1, -1] += 1
    save_file(weights | {"lm_head.weight": head}, path)
    assert complaint(directory.describe_directory, model) == (
        f"{model / 'config.json'}: tie_word_embeddings is true, but lm_head.weight is not the embeddings. "
        "Set tie_word_embeddings to false."
    )


def test_describe_directory_of_an_untied_model_takes_any_head(model):
    path = model / "model.safetensors"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": torch.zeros_like(weights["model.embed_tokens.weight"])}, path)
    assert directory.describe_directory(model).blocks == 6


def test_describe_directory_takes_a_chat_template_inside_the_tokenizer_config(model):
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    assert directory.describe_directory(model).blocks == 6


NAMED = [{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}]


@pytest.mark.parametrize("inline", [None, "", " \n", [], {}, 3, {"default": None}], ids=repr)
def test_describe_directory_of_a_chat_template_that_is_none_says_so(model, inline):
    set_template(model, inline)
    assert complaint(directory.describe_directory, model) == (
        f"{model}: has no chat template. Give an instruction-tuned model."
    )


@pytest.mark.parametrize("inline", [NAMED, {"rag": "r", "tool_use": "t"}], ids=["list", "object"])
def test_describe_directory_of_named_chat_templates_wants_a_default_among_them(model, inline):
    set_template(model, inline)
    assert complaint(directory.describe_directory, model) == (
        f"{model}: has chat templates named rag, tool_use, and none named default. "
        "Save the one to use as chat_template.jinja."
    )
    default = {"default": "d"} if isinstance(inline, dict) else [{"name": "default", "template": "d"}]
    set_template(model, {**inline, **default} if isinstance(inline, dict) else [*inline, *default])
    assert directory.describe_directory(model).blocks == 6


def test_describe_directory_takes_chat_templates_of_files_before_the_inline_one(model):
    template = (model / "chat_template.jinja").read_text()
    set_template(model, template)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("r")
    assert "templates named rag, and none named default" in complaint(directory.describe_directory, model)
    (model / "chat_template.jinja").write_text(template)
    assert directory.describe_directory(model).blocks == 6


def test_describe_directory_of_a_template_for_processors_only_says_where_it_belongs(model):
    set_template(model, None)
    (model / "chat_template.json").write_text('{"chat_template": "c"}')
    assert "has no chat template. Save the text inside chat_template.json" in complaint(
        directory.describe_directory, model
    )


def set_template(model, inline):
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": inline}))


COMPANIONS = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
COMPANIONS += ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "model.safetensors"]


@pytest.mark.parametrize("name", COMPANIONS)
@pytest.mark.parametrize(
    ("content", "what"),
    [(POINTER, "is a Git LFS pointer, not the file itself. Do: git lfs pull."), (b"", "is empty. Copy or download it")],
    ids=["pointer", "empty"],
)
def test_describe_directory_of_a_file_that_only_stands_for_another_names_it(model, name, content, what):
    (model / name).write_bytes(content)
    assert complaint(directory.describe_directory, model).startswith(f"{model / name}: {what}")


@pytest.mark.parametrize("name", [name for name in COMPANIONS if name.endswith(".json")])
@pytest.mark.parametrize("spoil", [lambda text: text[: len(text) // 2], lambda _: "[]", lambda text: "\ufeff" + text])
def test_describe_directory_of_a_damaged_json_file_names_it(model, name, spoil):
    text = (model / name).read_text() if (model / name).exists() else '{"eos_token": "x"}'
    (model / name).write_text(spoil(text))
    assert complaint(directory.describe_directory, model).startswith(f"{model / name}:")


@pytest.mark.parametrize("settings", [{"temperature": 0.6, "top_p": 0.9}, {"eos_token_id": [1, 2]}, {}])
def test_describe_directory_takes_a_generation_config_that_transformers_would_not_save(model, settings):
    (model / "generation_config.json").write_text(json.dumps(settings))
    assert directory.describe_directory(model).blocks == 6


def test_describe_directory_of_an_empty_index_says_so(model):
    (model / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    line = f"{model / 'model.safetensors.index.json'}: has no weight_map. Copy or download it again."
    assert complaint(directory.describe_directory, model) == line


@pytest.mark.parametrize("content", [codecs.BOM_UTF8 + b"{{ messages }}", b"caf\xe9", POINTER])
@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_describe_directory_of_a_chat_template_that_would_not_be_read_as_it_stands_names_it(model, name, content):
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(content)
    assert complaint(directory.describe_directory, model).startswith(f"{model / name}: ")


@pytest.mark.parametrize("whole", [True, False], ids=["with-config", "alone"])
def test_describe_directory_of_an_adapter_names_its_base_and_the_merge(model, whole):
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "own/base"}))
    if not whole:
        (model / "config.json").unlink()
    assert complaint(directory.describe_directory, model) == (
        f"{model}: holds an adapter of own/base, not a model (adapter_config.json). "
        "Merge it into its base with peft's merge_and_unload."
    )


def test_describe_directory_of_gguf_files_says_to_give_one(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    line = f"{tmp_path}: is a folder of GGUF files. Give one of them: {tmp_path / 'a.gguf'}."
    assert complaint(directory.describe_directory, tmp_path) == line


def test_describe_directory_of_shards_without_an_index_names_the_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    line = complaint(directory.describe_directory, sharded)
    assert line.startswith(f"{sharded}: has shards of weights (model-00001-of-")
    assert line.endswith("without model.safetensors.index.json, which lists their tensors. Copy or download it, too.")


def test_describe_directory_of_weights_under_another_name_says_which_is_expected(model):
    (model / "model.safetensors").rename(model / "weights.safetensors")
    assert complaint(directory.describe_directory, model).startswith(
        f"{model}: has weights in weights.safetensors, which transformers does not look for (expected model.safeten"
    )


def test_describe_directory_of_two_layouts_says_who_reads_which(sharded, tiny_model):
    shutil.copy(tiny_model / "model.safetensors", sharded)
    line = complaint(directory.describe_directory, sharded)
    assert line.startswith(f"{sharded}: holds model.safetensors, which transformers reads, and model.safetensors.index")
    assert "names model-00001-of-" in line and line.endswith(
        "and which vLLM reads. Remove model.safetensors or model.safetensors.index.json."
    )
    for shard in sharded.glob("model-*-of-*.safetensors"):
        shard.unlink()
    index = {"weight_map": dict.fromkeys(load_file(sharded / "model.safetensors"), "model.safetensors")}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert directory.describe_directory(sharded).blocks == 6


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "original/consolidated.safetensors", "model.fp16.safetensors"]
)
def test_describe_directory_of_weights_that_only_vllm_would_read_names_them(model, name):
    (model / name).parent.mkdir(exist_ok=True)
    shutil.copy(model / "model.safetensors", model / name)
    assert complaint(directory.describe_directory, model) == (
        f"{model}: holds {name} beside model.safetensors, and vLLM would also read them. Remove {name}."
    )


def test_describe_directory_takes_old_shards_that_the_index_does_not_name(sharded):
    shutil.copy(next(sharded.glob("model-*-of-*.safetensors")), sharded / "model-00001-of-00099.safetensors")
    assert directory.describe_directory(sharded).blocks == 6


def test_describe_directory_of_a_tensor_in_two_files_names_both(sharded):
    first, second, *_ = sorted(sharded.glob("model-*-of-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    assert f"holds {name}, and so does " in complaint(directory.describe_directory, sharded)


def test_describe_directory_of_a_weight_file_without_tensors_says_so(model):
    save_file({}, model / "model.safetensors")
    line = f"{model / 'model.safetensors'}: holds no tensors. Copy or download it again."
    assert complaint(directory.describe_directory, model) == line


# --- GGUF -----------------------------------------------------------------------------------------------------


def test_describe_model_of_a_gguf_file_reads_architecture_blocks_and_context(tmp_path):
    path = make_tiny_gguf(tmp_path / "model.gguf")
    assert sources.describe_model(LocalModel(path=str(path))) == directory.ModelFacts("llama", 3, context=256, heads=2)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("m.gguf", {"without": ["blk.1.attn_q.weight"]}, "lacks blk.1.attn_q.weight. Download it again, whole."),
        (
            "m.gguf",
            {"without": [f"blk.2.{name}.weight" for name in BLOCK]},
            "lacks blk.2.attn_k.weight and 8 more tensors",
        ),
        (
            "m.gguf",
            {"without": ["token_embd.weight", "output_norm.weight"]},
            "lacks token_embd.weight and 1 more tensors",
        ),
        ("m.gguf", {"also": ["blk.3.attn_norm.weight"]}, "holds blk.3.attn_norm.weight, and its header has 3 blocks."),
        ("m.gguf", {"also": ["rope_freqs.weight"]}, "stretches its positions as Llama 3.1 does (rope_freqs.weight)"),
        (
            "m-00001-of-00003.gguf",
            {},
            "is one of 3 parts of a split GGUF file. Join them",
        ),
        (
            "m.gguf",
            {"fields": {"split.count": 2}},
            "is one of 2 parts of a split GGUF file. Join them",
        ),
        ("m.gguf", {"fields": {"general.type": "adapter"}}, "holds no model (general.type is adapter). Give the model"),
        (
            "m.gguf",
            {"fields": {"llama.rope.scaling.type": "yarn"}},
            "scales its positions (llama.rope.scaling.type is yarn)",
        ),
    ],
    ids=["tensor", "block", "both-ends", "more", "stretched", "part-by-name", "part-by-field", "adapter", "scaled"],
)
def test_describe_model_of_a_gguf_file_that_would_load_as_another_model_says_why(tmp_path, name, options, line):
    path = make_tiny_gguf(tmp_path / name, **options)
    assert complaint(sources.describe_model, LocalModel(path=str(path))).startswith(f"{path}: {line}")


def test_describe_model_of_a_gguf_file_cut_in_its_tensors_says_so(tmp_path):
    path = make_tiny_gguf(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    assert complaint(sources.describe_model, LocalModel(path=str(path))).startswith(f"{path}: cannot be read as GGUF (")


@pytest.mark.parametrize(
    ("content", "what"), [(POINTER, "is a Git LFS pointer, not the file itself. Do: git lfs pull."), (b"", "is empty.")]
)
def test_describe_model_of_a_gguf_file_that_only_stands_for_one_says_so(tmp_path, content, what):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert complaint(sources.describe_model, LocalModel(path=str(path))).startswith(f"{path}: {what}")


def test_describe_directory_with_a_broken_config_names_file_and_line(model):
    (model / "config.json").write_text('{"model_type": "llama",\n"x": }')
    assert complaint(directory.describe_directory, model).startswith(f"{model / 'config.json'}:2: is not JSON (")


def test_model_stage_of_a_directory_lies_where_it_is_and_moves_with_its_content(model, tmp_path):
    stage = model_stage(LocalModel(path=str(model)))
    assert stage.location == model
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    assert model_stage(LocalModel(path=str(copy))).id == stage.id
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert model_stage(LocalModel(path=str(copy))).id != stage.id


def test_model_stage_of_a_path_that_is_no_model_is_one_clear_line(tmp_path):
    missing, text = tmp_path / "none", tmp_path / "model.txt"
    text.write_text("hi")
    assert complaint(model_stage, LocalModel(path=str(missing))) == (
        f"model.path: {missing} does not exist. Give a model directory or a .gguf file."
    )
    assert complaint(model_stage, LocalModel(path=str(text))) == (
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
    assert complaint(model_stage, PackagedModel(package=package, file=file)).startswith(line)


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
    assert calibration.read_calibration(path, "text", 9) == ["one\ntwo", "three", "four"]
    assert calibration.read_calibration(path, "text", 2) == ["one\ntwo", "three"]


def test_read_calibration_without_the_column_suggests_the_nearest(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"texts": "a"}\n')
    assert complaint(calibration.read_calibration, path, "text", 2) == (
        f"prune.calibration.field: {path}:1 has no text. Did you mean texts?"
    )


@pytest.mark.parametrize("content", ["", " \n\n \n"])
def test_read_calibration_of_no_text_is_one_clear_line(tmp_path, content):
    path = tmp_path / "texts.txt"
    path.write_text(content)
    assert complaint(calibration.read_calibration, path, "text", 2) == (
        f"prune.calibration.text: {path} holds no text. Give a file with texts."
    )


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.json"])
def test_read_calibration_leaves_out_what_is_no_text(tmp_path, name):
    values = [None, math.nan, ["a", "b"], {"a": 1}, 3, True, "", "A real text."]
    rows = [json.dumps({"text": value}) for value in values]
    (tmp_path / name).write_text("\n".join(rows) if name.endswith("l") else f"[{', '.join(rows)}]")
    assert calibration.read_calibration(tmp_path / name, "text", 9) == ["A real text."]


def test_read_calibration_of_numbers_only_names_the_column(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"year": 1999}\n')
    line = f"prune.calibration.text: {path} holds no text in year. Give a file with texts."
    assert complaint(calibration.read_calibration, path, "year", 2) == line


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (codecs.BOM_UTF8 + b"First text.\n\nSecond text.\n", ["First text.", "Second text."]),
        (b"First\r\ntext.\r\n\r\nSecond text.\r\n", ["First\ntext.", "Second text."]),
        (b"First text.\r\rSecond text.", ["First text.", "Second text."]),
    ],
    ids=["mark", "crlf", "cr"],
)
def test_read_calibration_of_paragraphs_does_not_mind_marks_and_line_ends(tmp_path, content, texts):
    (tmp_path / "texts.txt").write_bytes(content)
    assert calibration.read_calibration(tmp_path / "texts.txt", "text", 9) == texts


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("texts.jsonl", b'{"text": "A text."}\n{"text": "half \\ud800 of one"}\n', ":2: holds half a character"),
        ("texts.txt", b"A text.\n\nAt the\ncaf\xe9.\n", ":4: is not UTF-8 text. Save the file as UTF-8."),
        (
            "texts.jsonl",
            b'{"text": "A text."}\n{"text": "caf\xe9"}\n',
            ":2: is not UTF-8 text. Save the file as UTF-8.",
        ),
        ("texts.txt", "A text.".encode("utf-16"), ": is UTF-16 text. Save it as UTF-8."),
        ("texts.txt", POINTER, ": is a Git LFS pointer, not the file itself. Do: git lfs pull."),
    ],
)
def test_read_calibration_of_what_cannot_be_read_names_file_and_line(tmp_path, name, content, what):
    path = tmp_path / name
    path.write_bytes(content)
    assert complaint(calibration.read_calibration, path, "text", 9).startswith(f"{path}{what}")


def test_read_calibration_reads_no_further_than_the_texts_that_are_asked_for(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'{"text": "One."}\n{"text": "Two."}\nnot JSON\n')
    assert calibration.read_calibration(path, "text", 2) == ["One.", "Two."]


@pytest.mark.parametrize("name", ["texts.pdf", "texts.gz", "texts"])
def test_calibration_file_of_another_kind_is_one_clear_line(tmp_path, name):
    (tmp_path / name).write_text("text")
    line = complaint(calibration.calibration_file, str(tmp_path / name))
    assert line.startswith(f"prune.calibration.text: {tmp_path / name} ")
    assert line.endswith(f"Give {calibration.TEXTS}.")


def test_offline_task_file_of_an_unknown_task_suggests_the_nearest():
    assert complaint(benchmarks.offline_task_file, "arc_eazy") == (
        "evaluate.tasks: no offline files for arc_eazy; only evaluate.preset: harness reads tasks of a hub. "
        "Did you mean arc_easy?"
    )


def test_model_is_known_by_what_moves_numbers_and_not_by_what_lies_beside_it(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    first = model_stage(LocalModel(path=str(directory))).id
    for name, text in {
        "generation_config.json": '{"temperature": 0.6}',
        "README.md": "A card",
        "LICENSE": "MIT",
    }.items():
        (directory / name).write_text(text)
        assert model_stage(LocalModel(path=str(directory))).id == first
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert model_stage(LocalModel(path=str(directory))).id != first
