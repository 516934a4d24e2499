"""A teacher that is not the base: what it moves, what it may be, and where it is named."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from command import Command, sdft
from recipes import chain_of
from refusals import complaint
from served import NAME, completion, failure, fake_server
from tiny import make_tiny_model

from sdft_ray.endpoint import Client
from sdft_ray.errors import UserError
from sdft_ray.preflight.checks import check
from sdft_ray.preflight.teachers import require_endpoints
from sdft_ray.report.lines import selection_line
from sdft_ray.spec.compute import Compute, Distill, Evaluate, load_compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.sources import KEY_VARIABLE
from sdft_ray.spec.wording import validate
from sdft_ray.stages import distill, model
from sdft_ray.stages.distill.draws import instruction_template
from sdft_ray.submit import job

SERVED = {"endpoint": "http://127.0.0.1:1/v1", "model": NAME}


@pytest.fixture
def recipe(tiny_model, tmp_path) -> dict:
    rows = [{"q": f"What is {i} + {i}?", "a": f"It is {2 * i}."} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.txt").write_text("One text.\n\nAnother text.\n\nA third text.")
    return {
        "model": {"path": str(tiny_model)},
        "rows": {
            "path": str(tmp_path / "rows.jsonl"),
            "fields": {"prompt": "q", "response": "a"},
            "held_out": 2,
            "validation": 2,
            "answer": "none",
        },
        "prune": {
            "blocks": 2,
            "metric": "angular",
            "candidates": 0,
            "calibration": {"text": str(tmp_path / "texts.txt")},
        },
        "distill": {"shift_rows": 0, "max_new_tokens": 16},
        "evaluate": {"tasks": ["arc_easy"]},
    }


def with_teacher(recipe: dict, teacher: dict | None, **more) -> dict:
    return {**recipe, "distill": {**recipe["distill"], **({"teacher": teacher} if teacher else {}), **more}}


def ids_of(recipe: dict) -> dict[str, str]:
    return {stage.slug + stage.name: stage.id for stage in chain_of(recipe).in_order}


def ledger_of(recipe: dict) -> str:
    stage = chain_of(recipe).distilled
    return distill.ledger_id(stage, instruction_template(stage.settings))


def test_teacher_moves_what_is_trained_on_it_and_nothing_before(recipe, tmp_path):
    other = make_tiny_model(tmp_path / "other", hidden_size=128)
    before = {stage.name: stage.id for stage in chain_of(recipe).in_order}
    for teacher in ({"path": str(other)}, SERVED, {"repo": "a/b", "revision": "0" * 40}):
        after = chain_of(with_teacher(recipe, teacher))
        same = {stage.name for stage in after.in_order if before.get(stage.name) == stage.id}
        assert same >= {"score", "cut", "rows"} and not same & {"distill"}
        assert ledger_of(with_teacher(recipe, teacher)) != ledger_of(recipe)
        assert after.models["sft"].id == chain_of(recipe).models["sft"].id
        assert after.models["distilled"].id != chain_of(recipe).models["distilled"].id


def test_teacher_that_is_the_base_moves_nothing_and_is_not_named(recipe, tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    for path in (tiny_model, copy):
        same = with_teacher(recipe, {"path": str(path)})
        assert ids_of(same) == ids_of(recipe)
        assert distill.teacher_name(chain_of(same).distilled) is None
    hub = {"repo": "a/b", "revision": "0" * 40}
    assert ids_of(with_teacher({**recipe, "model": hub}, hub)) == ids_of({**recipe, "model": hub})


def test_teacher_is_known_by_its_content_and_an_endpoint_by_the_name_of_its_model(recipe, tmp_path):
    other = make_tiny_model(tmp_path / "other", hidden_size=128)
    moved = shutil.copytree(other, tmp_path / "moved")
    paths = [with_teacher(recipe, {"path": str(path)}) for path in (other, moved)]
    assert len({ledger_of(one) for one in paths}) == len({chain_of(one).distilled.id for one in paths}) == 1
    assert distill.teacher_name(chain_of(paths[0]).distilled) == "other"

    served = [with_teacher(recipe, {**SERVED, "endpoint": url}) for url in ("http://a:1/v1", "https://b/v1/")]
    assert len({ledger_of(one) for one in served}) == len({chain_of(one).distilled.id for one in served}) == 1
    assert distill.teacher_name(chain_of(served[0]).distilled) == NAME
    changed = [{"model": "another"}, {"api": "openai"}, {"tokenizer": str(other)}]
    assert len({ledger_of(with_teacher(recipe, {**SERVED, **change})) for change in [{}, *changed]}) == 4
    tokenizers = [with_teacher(recipe, {**SERVED, "tokenizer": str(path)}) for path in (other, moved)]
    (moved / "model.safetensors").unlink()  # only its tokenizer is read
    assert len({ledger_of(one) for one in tokenizers}) == 1


def test_teacher_and_seeds_as_before_are_in_no_id(recipe):
    plain = chain_of(recipe).distilled
    assert not {"teacher", "seeds"} & {*plain.identity["settings"]}
    written = {**recipe, "distill": {**recipe["distill"], "teacher": None, "seeds": "row"}}
    assert ids_of(written) == ids_of(recipe) and ledger_of(written) == ledger_of(recipe)
    engine = {**recipe, "distill": {**recipe["distill"], "seeds": "engine"}}
    assert chain_of(engine).distilled.id != plain.id and ledger_of(engine) != ledger_of(recipe)


@pytest.mark.parametrize(
    ("teacher", "line"),
    [
        ({"endpoint": "http://me:PLANTED@host/v1", "model": "a"}, "endpoint: the address holds credentials or opt"),
        ({"endpoint": "http://host/v1?key=PLANTED", "model": "a"}, "endpoint: the address holds credentials or opt"),
        ({"endpoint": "host:8000", "model": "a"}, "endpoint: host:8000 is no address. Write http://HOST:PORT/v1."),
        ({"endpoint": "http://host:port/v1", "model": "a"}, "endpoint: is no address. Write http://HOST:PORT/v1."),
        (
            {"endpoint": "http://host:99999/v1", "model": "a"},
            "endpoint: is no address. Write http://HOST:PORT/v1.",
        ),
        ({"endpoint": "http://[::1/v1", "model": "a"}, "endpoint: is no address. Write http://HOST:PORT/v1."),
        ({"endpoint": "http://host/v1"}, "model: is missing. Add it."),
        ({"endpoint": "http://host/v1", "model": "a", "api": "chat"}, 'api: got "chat"; expected'),
        ({"repo": "a/b", "revision": "main"}, "revision: 'main' moves."),
    ],
)
def test_teacher_with_a_mistake_is_one_line_without_what_may_be_secret(recipe, teacher, line):
    with pytest.raises(UserError) as error:
        validate(Recipe, with_teacher(recipe, teacher))
    (problem,) = error.value.problems
    assert problem.startswith(f"distill.teacher.{line}") and "PLANTED" not in problem


def test_teacher_as_text_is_one_line_without_what_may_be_secret(recipe):
    line = "distill.teacher: got an address; expected a section with one of path, repo, endpoint. Change this value."
    assert complaint(validate, Recipe, with_teacher(recipe, "http://me:PLANTED@host/v1")) == line


def test_teacher_that_names_none_or_several_sources_is_one_line(recipe):
    with pytest.raises(UserError, match=r"^distill.teacher: has none or several of path, repo, endpoint"):
        validate(Recipe, with_teacher(recipe, {**SERVED, "path": "/a"}))


def test_teacher_may_be_quantised_or_of_an_unknown_architecture_where_a_base_may_not(recipe, tmp_path):
    other = make_tiny_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    changed = config | {"model_type": "brand_new", "quantization_config": {"quant_method": "awq"}}
    (other / "config.json").write_text(json.dumps(changed))
    check(validate(Recipe, with_teacher(recipe, {"path": str(other)})), load_compute())
    with pytest.raises(UserError, match=r"its weights are quantised \(awq\)"):
        check(validate(Recipe, {**recipe, "model": {"path": str(other)}}), load_compute())
    (other / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        check(validate(Recipe, with_teacher(recipe, {"path": str(other)})), load_compute())
    with pytest.raises(UserError, match=r"^distill.teacher.path: \S+ does not exist"):
        check(validate(Recipe, with_teacher(recipe, {"path": str(tmp_path / "gone")})), load_compute())


@pytest.mark.parametrize(
    ("architecture", "line"),
    [
        ("gpt_oss", r"compute\.distill\.gpus: vLLM's CPU build generates other text"),
        ("lfm2", r"compute\.distill\.gpus: vLLM's CPU build generates other text than lfm2"),
        (
            "qwen3_5_text",
            r"distill: vLLM reads qwen3_5_text with torchvision, .*\. Do: pip install --no-deps torchvision==",
        ),
    ],
)
def test_model_that_vllm_does_not_run_on_a_cpu_is_refused_there(recipe, tmp_path, monkeypatch, architecture, line):
    monkeypatch.setattr("sdft_ray.preflight.engines.find_spec", lambda name: None)
    other = validate(Recipe, with_teacher(recipe, {"path": str(make_tiny_model(tmp_path / "other", architecture))}))
    with pytest.raises(UserError, match=line):
        check(other, load_compute())
    check(other, load_compute({"distill": {"gpus": 1, "cpus": 1}, "ray": {"address": "auto"}}))


def test_model_that_vllm_runs_in_bfloat16_alone_on_a_cpu_is_refused_in_another_precision(recipe, tmp_path):
    teacher = {"path": str(make_tiny_model(tmp_path / "other", "qwen3_next"))}
    other = validate(Recipe, with_teacher(recipe, teacher, dtype="float32"))
    with pytest.raises(UserError, match=r"distill\.dtype: float32: .* Set distill\.dtype: bfloat16"):
        check(other, load_compute())
    check(other, load_compute({"distill": {"gpus": 1, "cpus": 1}, "ray": {"address": "auto"}}))
    check(validate(Recipe, with_teacher(recipe, teacher, dtype="bfloat16")), load_compute())


def test_teacher_of_the_hub_is_downloaded_though_it_could_not_be_cut(tmp_path):
    stage = model.stage(validate(Recipe, BARE | {"model": HUB}).model, teaches=True)
    assert stage.identity["settings"]["teaches"] is True
    assert "teaches" not in model.stage(validate(Recipe, BARE | {"model": HUB}).model).identity["settings"]


def test_check_of_an_endpoint_asks_once_for_the_longest_answers_of_all_recipes(recipe, monkeypatch):
    asked = []
    monkeypatch.setattr(Client, "require_model", lambda self, tokens: asked.append(tokens))
    chains = [chain_of(with_teacher(recipe, SERVED, max_new_tokens=most)) for most in (4, 16, 8)]
    require_endpoints(stage for chain in chains for stage in chain.in_order)
    assert asked == [16]


HUB = {"repo": "a/b", "revision": "0" * 40}
BARE = {
    "rows": {"gym": "chain_sum", "limit": 99},
    "prune": {"blocks": 2},
    "evaluate": {"tasks": ["arc_easy"]},
}


def spread(**sizes) -> Compute:
    compute, nodes = load_compute(), sizes.pop("nodes", 1)
    gpus = math.prod(sizes.values()) // nodes
    return compute.model_copy(update={"distill": Distill(cpus=1, gpus=gpus, nodes=nodes, **sizes)})


def test_layers_over_nodes_are_reported_blocks_over_nodes_are_not_and_drafts_are_refused(recipe, capsys):
    taught = validate(Recipe, recipe)  # 2 heads, 6 blocks
    check(taught, spread(nodes=2, tensor_parallel_size=1, pipeline_parallel_size=2))
    check(taught, spread(nodes=2, tensor_parallel_size=2, pipeline_parallel_size=2))
    assert not capsys.readouterr().err
    across = spread(nodes=2, tensor_parallel_size=2, pipeline_parallel_size=1)
    check(taught, across)
    assert capsys.readouterr().err == (
        "compute.distill.tensor_parallel_size: 2 GPUs share each layer and a node has 1, so each layer waits for the "
        "network between nodes. Set it to 1, and pipeline_parallel_size: 2.\n"
    )
    check(validate(Recipe, with_teacher(recipe, SERVED)), across)
    assert not capsys.readouterr().err
    line = r"^compute\.distill\.nodes: 2 nodes hold one engine, and a draft is measured beside .*\. Remove draft, or"
    with pytest.raises(UserError, match=line):
        check(validate(Recipe, recipe | {"draft": {"tokens": [1], "prompts": 1}}), across)


def test_parallel_sizes_must_divide_the_heads_and_leave_each_group_a_block(recipe, tmp_path, capsys):
    other = make_tiny_model(tmp_path / "other", num_attention_heads=4, num_hidden_layers=5)
    short = validate(Recipe, recipe)  # 2 heads, 6 blocks
    check(short, spread(tensor_parallel_size=2, pipeline_parallel_size=3))
    assert not capsys.readouterr().err
    line = r"^compute.distill.tensor_parallel_size: 4 does not divide the 2 attention heads .* Give one of 1, 2\.$"
    with pytest.raises(UserError, match=line):
        check(short, spread(tensor_parallel_size=4))
    evaluating = load_compute().model_copy(update={"evaluate": Evaluate(gpus=4)})
    assert not capsys.readouterr().err
    check(short, evaluating)
    line = "compute.evaluate.gpus: transformers computes on one GPU, so 3 of 4 are idle. Set it to 1, or set evaluate"
    assert capsys.readouterr().err.startswith(line)
    by_engine = validate(Recipe, recipe | {"evaluate": recipe["evaluate"] | {"engine": "vllm"}})
    with pytest.raises(UserError, match=r"^compute.evaluate.gpus: 4 does not divide the 2 attention heads"):
        check(by_engine, evaluating)
    taught = validate(Recipe, with_teacher(recipe, {"path": str(other)}))
    check(taught, spread(tensor_parallel_size=4))
    with pytest.raises(UserError, match=r"^compute.distill.pipeline_parallel_size: 6 is more than the 5 blocks"):
        check(taught, spread(pipeline_parallel_size=6))
    check(taught, spread(pipeline_parallel_size=2))
    assert "pipeline_parallel_size: 2 does not divide the 5 blocks" in capsys.readouterr().err


def test_reports_name_a_teacher_that_is_not_the_base():
    counts = {"rows": 2, "kept": 2, "acceptance": 1.0, "reasons": {"kept": 2}}
    counts |= {"generations": 2, "generated_tokens": 4, "mean_generated_tokens": 2.0}
    own, others = distill.Summary(**counts), distill.Summary(**counts, teacher="big")
    assert selection_line(own) == "Rewrites: 2 of 2 rows kept."
    assert selection_line(others) == "Rewrites by big, which is not the base: 2 of 2 rows kept."


def test_submitted_recipe_takes_a_teachers_tokenizer_along_and_keeps_its_address(tiny_model, tmp_path):
    shipped: dict[Path, str] = {}
    teacher = job.with_shipped({**SERVED, "tokenizer": str(tiny_model)}, "teacher", str(tmp_path / "root"), shipped)
    assert teacher == {**SERVED, "tokenizer": "files/0/tiny"} and shipped == {tiny_model: "files/0/tiny"}


def write(folder: Path, recipe: dict) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_check_and_run_ask_the_endpoint_before_anything_is_built(recipe, tmp_path):
    with fake_server() as server:
        teacher = {"endpoint": server.url, "model": NAME}
        write(tmp_path, with_teacher(recipe, teacher))
        done = sdft("check", "recipe.yaml", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        write(tmp_path, with_teacher(recipe, {**teacher, "model": "some/teach"}))
        line = f"distill.teacher.model: some/teach is not served at {server.url}. Did you mean some/teacher?\n"
        for command in ("check", "run"):
            done = sdft(command, "recipe.yaml", cwd=tmp_path)
            assert (done.returncode, done.stdout) == (2, "") and done.stderr.endswith(line)
            assert not list((tmp_path / "artifacts").glob("*/*"))


SCRIPT = """
import sys
from sdft_ray import cli, endpoint
endpoint._FIRST_PAUSE, endpoint._LONGEST_PAUSE = 0.05, 0.2
sys.exit(cli.main(sys.argv[1:]))
"""


def run(folder: Path, monkeypatch) -> subprocess.CompletedProcess:
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    (folder / "script.py").write_text(SCRIPT)
    words = ("run", "recipe.yaml", "--until", "distill", "--compute", "compute.yaml")
    return Command(*words, cwd=folder, script=folder / "script.py").end()


def test_endpoint_in_a_chain_is_resumed_after_it_refused_and_is_named_and_its_key_is_nowhere(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.setenv(KEY_VARIABLE, "PLANTED-key")
    compute = {"cpus": 1, "piece_rows": 2, "piece_seconds": 0, "endpoint": {"requests": 2, "patience_seconds": 5}}
    (tmp_path / "compute.yaml").write_text(yaml.safe_dump({"distill": compute}))
    with fake_server() as server:
        write(tmp_path, with_teacher(recipe, {"endpoint": server.url, "model": NAME}))
        ways = iter([failure(429, retry_after="0"), failure(500), None])
        server.answer = lambda body: failure(401) if len(server.asked) > 12 else next(ways, completion(body))
        first = run(tmp_path, monkeypatch)
        refused = f"distill.teacher.endpoint: {server.url} refuses the key in {KEY_VARIABLE}. Set a valid one.\n"
        assert (first.returncode, first.stderr.endswith(refused)) == (2, True), first.stderr
        served = {body["seed"] for body in server.asked[3:12]}
        server.asked.clear()
        server.answer = completion
        again = run(tmp_path, monkeypatch)
        assert again.returncode == 0, again.stderr
        assert not {body["seed"] for body in server.asked} & served, "what was served was kept"
        assert {*server.keys} == {"Bearer PLANTED-key"}
    (made,) = (tmp_path / "artifacts" / "distill").iterdir()
    summary = json.loads((made / "manifest.json").read_text())["summary"]
    assert (summary["rows"], summary["reasons"]["error"], summary["teacher"]) == (16, 0, NAME)
    card = (made / "README.md").read_text()
    assert f"rewritten by {NAME}" in card and "this is no self-distillation" in card
    assert "self-data-distillation" not in card and "Self-Data" not in card
    written = [path for path in tmp_path.rglob("*") if path.is_file() and b"PLANTED" in path.read_bytes()]
    assert not written and "PLANTED" not in first.stderr + again.stderr + first.stdout + again.stdout
