"""What does not fit together is found before anything is built: numbers, rows, calibration texts, lengths."""

import functools
import json
import math
import shutil

import pytest
from tiny import CHAT_TEMPLATE, make_tiny_model
from tiny_gguf import make_tiny_gguf

from sdft_ray import cpu, pipeline
from sdft_ray.errors import UserError
from sdft_ray.preflight import limits
from sdft_ray.preflight.checks import check
from sdft_ray.spec.compute import Compute, load_compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.sources import FileRows, HubRows
from sdft_ray.spec.wording import validate

CONTEXT = 2048  # of the tiny model, whose tokens are bytes
GYM = {"gym": "chain_sum", "limit": 30, "held_out": 0, "validation": 2}
OPEN = {"max_tokens": 2048, "max_too_long_fraction": 1.0}  # training leaves out what is too long
SHORT = {"distill": {"max_new_tokens": 100}, "evaluate": {"max_new_tokens": 100}, "train": {"max_tokens": 2048}}


def row(number: int, prompt: int = 0, reference: int = 0) -> dict:
    """A row whose texts have so many bytes more than they need."""
    return {"q": f"{number}? {'p' * prompt}", "a": f"{'r' * reference} {number}"}


@pytest.mark.parametrize(("turns", "limit", "most"), [("last", 60, 4), ("each", 60, math.inf), ("each", 20, math.inf)])
def test_limit_of_conversations_bounds_the_rows_only_where_each_is_one(turns, limit, most):
    """A limit is of records: twenty conversations may have a thousand responses."""
    source = {"repo": "owner/name", "revision": "a" * 40, "fields": {"messages": "messages"}, "answer": "none"}
    rows = validate(HubRows, source | {"limit": limit, "held_out": 40, "validation": 16, "turns": turns})
    assert limits.read_splits(rows).most == most


def test_check_of_conversations_that_the_template_cannot_write_names_what_it_leaves_out(problems):
    turns = [{"role": "user", "content": "4 + 4?"}, {"role": "assistant", "content": "8"}]
    tools = [{"name": "add", "parameters": {}}]
    rows = {"fields": {"messages": "messages", "tools": "tools"}, "answer": "none"}
    lines = [{"messages": [{**turns[0], "content": f"{i} + 4?"}, turns[1]], "tools": []} for i in range(9)]
    settings = {"rows": rows, "evaluate": {"tasks": ["sciq"]}}
    assert problems(lines, **settings) == []
    lines[4]["tools"] = tools
    (line,) = problems(lines, **settings)
    assert "its chat template does not write the tool add" in line


def test_check_of_responses_whose_thoughts_the_template_takes_out_names_one(problems, tiny_model, tmp_path):
    lines = [*map(row, range(9)), {"q": "4 + 4?", "a": "<think>4 and 4</think>It is 8."}]
    assert problems(lines) == []
    template = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
    (shutil.copytree(tiny_model, tmp_path / "model") / "chat_template.jinja").write_text(template)
    (line,) = problems(lines, model={"path": str(tmp_path / "model")})
    assert line.startswith("model: its chat template changes the response '<think>4 and 4</think>It is 8.'")


@pytest.fixture
def problems(tiny_model, tmp_path):
    """Return what check finds wrong with a recipe of these rows and texts; the recipe is good but for what is given."""

    def find(lines: list | None = None, texts: str = "One text.\n\nTwo texts.\n\nThree.", compute=None, **settings):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines or map(row, range(9))))
        (tmp_path / "texts.txt").write_text(texts)
        source = {"path": str(tmp_path / "rows.jsonl"), "fields": {"prompt": "q", "response": "a"}}
        recipe = {
            "model": {"path": str(tiny_model)},
            "rows": {**source, "held_out": 2, "validation": 2},
            "prune": {"blocks": 2, "calibration": {"text": str(tmp_path / "texts.txt")}},
            "evaluate": {"tasks": ["held_out"]},
        }
        for key, value in settings.items():
            recipe[key] = recipe.get(key, {}) | value
        try:
            check(validate(Recipe, recipe), compute or load_compute())
        except UserError as error:
            return list(error.problems)
        return []

    return find


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"train": {"lora": {"targets": ["q_prj"]}}},
            "train.lora.targets: the model has no linear layer q_prj. Did",
        ),
        ({"train": {"lora": {"targets": ["lm_head"]}}}, "train.lora.targets: lm_head has the weights of "),
        (
            {"arms": {"sft": {"lora": {"targets": ["up_prj"]}}}, "train": {"scope": "beside_cut"}},
            "train.lora.targets: the model has no linear layer up_prj. Did you mean up_proj?",
        ),
        ({"prune": {"blocks": None, "remove": [0, 1], "patch": "linear"}}, "prune.patch: the cut begins at block 0"),
        (
            {"prune": {"blocks": 5, "protect": {"last": 1}, "metric": "tail", "patch": "linear"}},
            "prune.patch: the cut begins at block 0",
        ),
        (
            {"prune": {"blocks": 5, "finalists": {"count": 3, "rows": 5}}},
            "prune.finalists: 3 is more than the number of",
        ),
        ({"arms": {"logits": {"likeliest": 260}}}, "arms.logits.likeliest: 260 is more than the 259 tokens of"),
        (
            {"merge": {"linear": {}, "others": {"b": {"rows": GYM, "train": {"lora": {"targets": ["q_prj"]}}}}}},
            "train.lora.targets: the model has no linear layer q_prj",
        ),
        ({"merge": {"linear": {}, "others": {"b": {"path": "gone"}}}}, "merge.others.b.path: gone does not exist"),
    ],
)
def test_check_finds_adapters_and_patches_that_do_not_fit_the_model(problems, settings, line):
    (found,) = problems(**settings)
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("fields", "tensor"),
    [
        ({}, None),
        ({"hidden_size": 128}, "model.embed_tokens.weight of 259 x 128"),
        ({"intermediate_size": 64}, "model.layers.N.mlp.down_proj.weight of 64 x 64"),
        ({"tie_word_embeddings": False}, "lm_head.weight of 259 x 64"),
    ],
)
def test_check_finds_a_model_to_merge_that_is_of_another_base(problems, tmp_path, fields, tensor):
    other = make_tiny_model(tmp_path / "other", num_hidden_layers=4, **fields)
    found = problems(merge={"linear": {}, "others": {"b": {"path": str(other)}}})
    expected = (
        [f"merge.others.b.path: its tensor {tensor} is none of the model that is pruned here. "] if tensor else []
    )
    assert [line.removesuffix(line.do) for line in found] == expected


def test_check_finds_named_blocks_that_a_hybrid_cannot_be_without(problems, tmp_path):
    base = make_tiny_model(tmp_path / "hybrid", "qwen3_5_text")
    prune = {"blocks": None, "remove": [1, 3, 5]}
    (found,) = problems(model={"path": str(base)}, prune=prune)
    assert found.startswith("prune.blocks: the cut leaves no block of attention")


def test_check_of_what_fits_finds_nothing(problems):
    assert problems() == []
    assert problems(**SHORT) == []


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"train": {"max_tokens": 2049}}, ["train.max_tokens"]),
        ({"train": {"max_tokens": 2048}}, []),
        ({"prune": {"calibration": {"text": "boolq", "max_tokens": 2049}}}, ["prune.calibration.max_tokens"]),
        ({"distill": {"max_new_tokens": 2048}}, ["distill.max_new_tokens"]),
        ({"distill": {"max_new_tokens": 2048}, "arms": {"sft": {}}}, []),
        ({"evaluate": {"max_new_tokens": 2048}}, ["evaluate.max_new_tokens"]),
        ({"evaluate": {"max_new_tokens": 2048, "tasks": ["sciq"]}}, []),
        ({"draft": {"prompts": 2, "max_new_tokens": 2048}}, ["draft.max_new_tokens"]),
        ({"distill": {"samples": 3, "temperature": 0}}, ["distill.samples"]),
        ({"distill": {"samples": 3}}, []),
        ({"distill": {"samples": 1, "temperature": 0}}, []),
        (
            {
                "train": {"max_tokens": 9999},
                "distill": {"samples": 2, "temperature": 0},
                "evaluate": {"max_new_tokens": 9999},
            },
            ["distill.samples", "evaluate.max_new_tokens", "train.max_tokens"],
        ),
    ],
)
def test_check_of_numbers_finds_those_that_cannot_be(problems, settings, keys):
    assert sorted(line.where for line in problems(**settings)) == keys


def test_check_of_numbers_says_the_context_and_the_most_that_it_holds(problems):
    (train,), (new,) = problems(train={"max_tokens": 4096}), problems(distill={"max_new_tokens": 4096})
    what = "4096 is more than the model's context of 2048 holds"
    assert train == f"train.max_tokens: {what}. Lower train.max_tokens to 2048 or less."
    assert new == f"distill.max_new_tokens: {what}. Lower distill.max_new_tokens to 2047 or less."


@pytest.mark.parametrize(
    ("rows", "settings", "keys"),
    [
        ([row(i, prompt=1800) for i in range(9)], SHORT, []),
        ([row(i, prompt=1960) for i in range(9)], {**SHORT, "arms": {"sft": {}}}, ["evaluate.max_new_tokens"]),
        (
            [row(i, prompt=1960) for i in range(9)],
            {**SHORT, "evaluate": {"tasks": ["sciq"]}},
            ["distill.max_new_tokens"],
        ),
        (
            [row(i, reference=2100) for i in range(9)],
            {**SHORT, "arms": {"sft": {}}, "train": {"max_tokens": 2048, "max_too_long_fraction": 1.0}},
            ["rows"],
        ),
        ([row(i, prompt=600, reference=600) for i in range(9)], {"train": {"max_tokens": 1024}}, ["train.max_tokens"]),
        (
            [row(i, prompt=600, reference=600) for i in range(9)],
            {"train": {"max_tokens": 1024}, "arms": {"distilled": {}}},
            [],
        ),
        (
            [row(i, prompt=1100) for i in range(9)],
            {"train": {"max_tokens": 1024}, "arms": {"distilled": {}}},
            ["train.max_tokens"],
        ),
        (
            [row(i, prompt=1960) for i in range(9)],
            {
                **SHORT,
                "evaluate": {"max_new_tokens": 50},
                "arms": {"sft": {}},
                "draft": {"max_new_tokens": 80, "prompts": 2, "models": ["pruned"]},
            },
            ["draft.max_new_tokens"],
        ),
    ],
    ids=["fits", "held-out", "rewrites", "references", "training", "not-trained-on", "prompts", "drafts"],
)
def test_check_of_rows_finds_those_that_do_not_fit_the_context(problems, rows, settings, keys):
    assert sorted(line.where for line in problems(rows, **settings)) == keys


@pytest.mark.parametrize(("engine", "keys"), [("transformers", []), ("vllm", ["rows"])])
def test_check_of_a_reference_as_long_as_the_context_minds_the_token_that_vllm_makes(problems, engine, keys):
    rows = [row(i, reference=2046) for i in range(9)]  # 2048 tokens
    wanted = {"arms": {"sft": {}}, "evaluate": {"max_new_tokens": 100, "engine": engine}}
    settings = {**SHORT, **wanted, "train": {"max_tokens": 2048, "max_too_long_fraction": 1.0}}
    assert [line.where for line in problems(rows, **settings)] == keys


def test_check_of_long_rows_counts_them_and_shows_one(problems):
    (line,) = problems([row(i, prompt=1960) for i in range(9)], **{**SHORT, "arms": {"sft": {}}})
    assert line.startswith(
        "evaluate.max_new_tokens: 100 tokens of the model's context, which is 2048, leave 1948 to a prompt: "
        "2 of 2 are longer, such as '"
    )


@pytest.mark.parametrize(
    ("prompts", "settings", "line"),
    [
        ([1850] * 9, {"arms": {"distilled": {}}}, "Lower distill.max_new_tokens."),
        # No number of new tokens makes room for these.
        ([2100] * 9, {"arms": {"distilled": {}}, "train": OPEN}, "Remove these rows."),
        # One such row may fail.
        (
            [2100, *[1850] * 33],
            {"arms": {"distilled": {}}, "train": OPEN, "distill": {"max_new_tokens": 100, "max_failed_fraction": 0.1}},
            "Lower distill.max_new_tokens.",
        ),
        ([1960] * 9, {"arms": {"sft": {}}, "train": {"max_tokens": 1024}}, "Raise train.max_tokens."),
        ([2100] * 9, {"arms": {"sft": {}}, "train": {"max_tokens": 1024}}, "Remove these rows."),
    ],
)
def test_check_of_long_rows_names_a_remedy_that_helps(problems, prompts, settings, line):
    rows = [row(i, prompt=prompt) for i, prompt in enumerate(prompts)]
    (found,) = problems(rows, **{**SHORT, "evaluate": {"tasks": ["sciq"]}, **settings})
    assert found.endswith(f"…. {line}")


@pytest.mark.parametrize(("allowed", "keys"), [(0.1, ["distill.max_new_tokens"]), (0.3, [])])
def test_check_of_rewrites_allows_the_share_that_may_fail(problems, allowed, keys):
    long = [row(i, prompt=2100) for i in range(6)]
    settings = {**SHORT, "evaluate": {"tasks": ["sciq"]}, "arms": {"distilled": {}}, "train": OPEN}
    settings["distill"] = {"max_new_tokens": 100, "max_failed_fraction": allowed}
    assert [line.where for line in problems([*long, *map(row, range(6, 34))], **settings)] == keys


def test_check_of_retention_minds_rows_that_no_task_answers(problems):
    rows, long = {"rows": {"held_out": 2, "answer": "none"}}, [row(i, prompt=2100) for i in range(9)]
    settings = {**SHORT, **rows, "arms": {"sft": {}}, "train": {"max_tokens": 2048, "max_too_long_fraction": 1.0}}
    assert problems(long, **settings | {"evaluate": {"tasks": ["sciq"], "max_new_tokens": 100}}) == []
    kept = {"tasks": ["sciq"], "max_new_tokens": 100, "retention": {"texts": 0}}
    (line,) = problems(long, **settings | {"evaluate": kept})
    assert line.where == "evaluate.max_new_tokens"


def test_check_of_retention_reads_its_texts(problems, tmp_path):
    texts = {"text": str(tmp_path / "texts.txt")}
    (line,) = problems(evaluate={"retention": texts})
    assert line.where == "evaluate.retention.text" and "behind the 96" in line
    (line,) = problems(evaluate={"retention": {"text": str(tmp_path / "none.txt")}})
    assert line.where == "evaluate.retention.text" and "does not exist" in line
    (line,) = problems(evaluate={"retention": {"max_tokens": 4096}})
    assert line.where == "evaluate.retention.max_tokens"
    assert problems(evaluate={"retention": {"texts": 0}}) == []


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("distill", {"arms": {"distilled": {}}, "evaluate": {"tasks": ["sciq"]}}),
        ("evaluate", {"arms": {"sft": {}}, "evaluate": {"max_new_tokens": 100, "engine": "vllm"}}),
    ],
)
@pytest.mark.parametrize("most", [600, 80])
def test_check_of_prompts_minds_the_engines_own_limit(problems, section, settings, most):
    compute = Compute.model_validate({section: {"engine": {"max_model_len": most}}})
    rows, wanted = [row(i, prompt=510) for i in range(9)], {**SHORT, **settings}
    assert problems(rows, **wanted) == []
    (line,) = problems(rows, compute=compute, **wanted)
    assert line.where == f"{section}.max_new_tokens"
    assert line.do == f"Raise compute.{section}.engine.max_model_len."


@pytest.mark.parametrize(
    ("engine", "gpus", "found"),
    [
        ({"max_model_len": 2049}, 0, "max_model_len: 2049 is more than the model's context of 2048. Lower it to 2048"),
        ({"max_model_len": 2048}, 0, None),
        ({"max_num_batched_tokens": 2047}, 0, "max_num_batched_tokens: 2047 is less than the 2048 tokens of the long"),
        ({"max_num_batched_tokens": 2047, "max_model_len": 1900}, 0, None),
        ({"max_num_batched_tokens": 2047}, 1, None),
        ({"cpu_offload_gb": 4}, 0, "cpu_offload_gb: spares a GPU's memory, and compute."),
        ({"cpu_offload_gb": 4, "kv_offloading_size": 4}, 1, None),
        ({"kv_offloading_size": 4}, 0, "kv_offloading_size: spares a GPU's memory, and compute."),
        ({"max_num_batched_tokens": 127}, 1, "max_num_batched_tokens: 127 is less than the 128 sequences of max_num_s"),
    ],
)
@pytest.mark.parametrize("section", ["distill", "evaluate"])
def test_check_finds_numbers_of_tokens_that_vllm_refuses(problems, section, engine, gpus, found):
    compute = Compute.model_validate({section: {"engine": engine, "gpus": gpus}})
    settings = {"arms": {"sft": {}}} if section == "evaluate" else {}
    lines = problems(compute=compute, **{**SHORT, **settings, "evaluate": {"max_new_tokens": 100, "engine": "vllm"}})
    assert [line.startswith(f"compute.{section}.engine.{found}") for line in lines] == ([True] if found else [])


def test_check_of_passes_scheduled_ahead_minds_the_lookup(problems):
    compute = Compute.model_validate({"distill": {"engine": {"async_scheduling": True}}})
    assert problems(compute=compute, **SHORT) == []
    (line,) = problems(compute=compute, **{**SHORT, "distill": {"max_new_tokens": 100, "lookup": {}}})
    assert line.where == "compute.distill.engine.async_scheduling"


def test_check_of_rewrites_minds_the_context_of_another_teacher(problems, tmp_path):
    teacher = {"path": str(make_tiny_model(tmp_path / "short", max_position_embeddings=256))}
    assert problems(distill={"teacher": teacher, "max_new_tokens": 100}) == []
    (line,) = problems(distill={"teacher": teacher, "max_new_tokens": 256})
    assert line.where == "distill.max_new_tokens" and "256 is more than the teacher's context of 256 holds" in line
    (line,) = problems([row(i, prompt=180) for i in range(9)], distill={"teacher": teacher, "max_new_tokens": 100})
    assert line.where == "distill.max_new_tokens"
    assert "100 tokens of the teacher's context, which is 256, leave 156 to a prompt" in line
    compute = Compute.model_validate({"distill": {"engine": {"max_model_len": 257}}})
    (line,) = problems(compute=compute, distill={"teacher": teacher, "max_new_tokens": 100})
    assert line.where == "compute.distill.engine.max_model_len" and "257 is more than the teacher's context of" in line


@pytest.mark.parametrize(
    ("settings", "compute", "key"),
    [
        ({"export": {"formats": ["int8"]}, "evaluate": {"engine": "vllm"}}, {}, "export.formats"),
        ({"export": {"formats": ["int8"]}, "evaluate": {"engine": "vllm"}}, {"evaluate": {"gpus": 1}}, None),
        ({"export": {"formats": ["int8"]}, "evaluate": {"engine": "vllm"}}, {"ray": {"address": "auto"}}, None),
        ({"export": {"formats": ["int8"]}}, {}, None),
        ({"distill": {"teacher": "int8"}}, {}, "distill.teacher.path"),
        ({"distill": {"teacher": "int8"}, "arms": {"sft": {}}}, {}, None),
        ({"distill": {"teacher": "int8"}}, {"distill": {"gpus": 1}}, None),
    ],
)
@pytest.mark.parametrize("overflows", [True, False])
def test_check_finds_models_in_8_bits_whose_sums_overflow_here(
    problems, tmp_path, monkeypatch, settings, compute, key, overflows
):
    monkeypatch.setattr(cpu, "overflows_in_int8", lambda: overflows)
    if "distill" in settings:
        teacher = make_tiny_model(tmp_path / "int8")
        config = json.loads((teacher / "config.json").read_text())
        rounded = {"input_activations": {"num_bits": 8, "type": "int"}}
        config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {"0": rounded}}
        (teacher / "config.json").write_text(json.dumps(config))
        settings = settings | {"distill": {"teacher": {"path": str(teacher)}}}
    found = problems(compute=Compute.model_validate(compute), **settings)
    assert [line.where for line in found] == ([key] if key and overflows else [])


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"train": {"rows": 5}}, None),
        ({"train": {"rows": 6}}, "train.rows"),
        ({"rows": {"held_out": 8}}, "rows"),
        ({"rows": {"limit": 4}}, "rows"),
    ],
)
def test_check_of_too_few_rows_finds_it(problems, settings, key):
    assert [line.where for line in problems(**settings)] == ([key] if key else [])


def test_check_of_a_gym_with_too_few_rows_finds_it(tiny_model, tmp_path):
    recipe = {
        "model": {"path": str(tiny_model)},
        "rows": {"gym": "chain_sum", "limit": 60, "held_out": 40, "validation": 20},
        "prune": {"blocks": 2},
        "evaluate": {"tasks": ["held_out"]},
    }
    with pytest.raises(
        UserError, match=r"^rows\.limit: 60 leaves none to train on after 40 held-out and 20 validation"
    ):
        check(validate(Recipe, recipe), load_compute())
    with pytest.raises(UserError, match=r"^train\.rows: 9 is more than the 5 training rows\."):
        recipe["rows"]["limit"] = 65
        check(validate(Recipe, {**recipe, "train": {"rows": 9}}), load_compute())


@pytest.mark.parametrize(
    ("texts", "prune", "usable"),
    [
        ("One text.\n\nTwo texts.", {}, 2),
        ("One text.\n\nTwo texts.", {"metric": "angular", "candidates": 0}, None),
        ("\n\n".join("ABCDEFGHI"), {}, 0),
        ("\n\n".join("ABCDEFGHI"), {"metric": "angular", "candidates": 0}, 0),
        ("A\n\nBB\n\nC\n\nDD\n\nEE", {}, None),
        ("字\n\n字字\n\n詞", {}, None),
    ],
)
def test_check_of_calibration_texts_wants_some_that_a_loss_can_be_taken_on(problems, texts, prune, usable):
    found = problems(texts=texts, prune=prune)
    assert [line.where for line in found] == ([] if usable is None else ["prune.calibration.text"])
    assert all(f"texts.txt has {usable} texts of two tokens or more (expected " in line for line in found)


def test_check_reads_calibration_files_as_far_as_they_are_used(problems, tmp_path):
    lines = b"".join(b'{"text": "Text %d."}\n' % i for i in range(9))
    (tmp_path / "own.jsonl").write_bytes(lines + b'{"text": "half \\ud800 of one"}\n')
    corpus = {"text": str(tmp_path / "own.jsonl"), "limit": 6}
    (line,) = problems(prune={"calibration": [corpus]})
    assert line.startswith(f"{tmp_path / 'own.jsonl'}:10: holds half a character")
    assert problems(prune={"calibration": [corpus | {"held_back": 3}]}) == []


def test_check_reads_the_rows_that_calibration_takes(problems, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"q": ["a"], "a": "b"}\n')
    rows = {"path": str(tmp_path / "own.jsonl"), "fields": {"prompt": "q", "response": "a"}}
    (line,) = problems(prune={"calibration": [{"rows": rows}]})
    assert line.where == f"{tmp_path / 'own.jsonl'}:1"


def test_check_of_a_model_with_other_blocks_than_its_config_says_finds_it(problems, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    (line,) = problems(model={"path": str(model)})
    assert line.startswith(f"{model}: its weights have 6 blocks named model.layers.N, its config.json has 7.")


def test_check_of_a_gguf_model_knows_its_context_and_its_tokens(problems, tmp_path):
    model = {"path": str(make_tiny_gguf(tmp_path / "model.gguf"))}
    keys = {"train": {"max_tokens": 256}, "distill": {"max_new_tokens": 20}, "evaluate": {"max_new_tokens": 20}}
    calibration = {"text": "boolq", "max_tokens": 99}
    good = {"model": model, "prune": {"blocks": 1, "calibration": calibration}, "arms": {"sft": {}}, **keys}
    assert problems(**good) == []
    assert [line.where for line in problems(**good | {"train": {"max_tokens": 257}})] == ["train.max_tokens"]
    found = problems([row(i, prompt=240) for i in range(9)], **good)
    assert [line.where for line in found] == ["evaluate.max_new_tokens"]


def test_corpora_with_one_name_are_numbered(tiny_model, tmp_path):
    corpora = []
    for folder, name in (("a", "texts"), ("b", "texts"), ("c", "texts-2"), ("d", "texts")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.txt").write_text(f"Text {folder}.")
        corpora.append({"text": str(tmp_path / folder / f"{name}.txt")})
    recipe = {
        "model": {"path": str(tiny_model)},
        "rows": {"gym": "chain_sum", "limit": 100},
        "prune": {"blocks": 2, "calibration": corpora},
        "evaluate": {"tasks": ["sciq"]},
    }
    stage = pipeline.chain(validate(Recipe, recipe)).loss
    assert [corpus.name for corpus in stage.settings.calibration] == ["texts", "texts-2", "texts-2-2", "texts-3"]


def test_read_of_a_large_file_is_of_its_first_records_and_refuses_no_number_of_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(30)) + "{\n")
    source = FileRows.model_validate({"path": str(path), "fields": {"prompt": "q", "response": "a"}})
    first = functools.partial(limits.read_file, most=20)
    splits, is_all = first(source)
    assert not is_all and [len(rows) for rows in splits] == [0, 0, 20]
    assert limits.read_sources([source], 1000, first) == splits
    limited = source.model_copy(update={"limit": 30, "held_out": 4, "validation": 2})
    with pytest.raises(UserError, match="more than the 24 training rows"):
        limits.read_sources([limited], 25, first)
    assert limits.read_sources([limited], 24, first) == splits
    with pytest.raises(UserError, match=r"rows\.jsonl:31: is not JSON"):
        limits.read_file(source)


@pytest.mark.parametrize("count", [20, 21])
def test_read_of_a_file_with_as_many_records_as_are_read_is_of_all(tmp_path, count):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(count)))
    source = FileRows.model_validate({"path": str(path), "fields": {"prompt": "q", "response": "a"}, "held_out": 5})
    splits, is_all = limits.read_file(source.model_copy(update={"validation": 1}), 20)
    assert is_all == (count == 20) and len(splits.held_out) == (5 if is_all else 0)
