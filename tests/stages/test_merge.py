"""Merging tiny models: the files, what may be merged, and the place in a plan."""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from refusals import complaint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft_ray import pipeline
from sdft_ray.core.recovery import Estimate
from sdft_ray.errors import UserError
from sdft_ray.preflight.checks import check
from sdft_ray.report.entries import MergeEntry
from sdft_ray.report.lines import merge_line
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.wording import validate
from sdft_ray.stages.cut import remove_blocks
from sdft_ray.stages.merge import LinearSettings, SlerpSettings, Summary, _t_of, merge_models, require_same_kind
from sdft_ray.store.files import hash_file, hash_once
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage
from sdft_ray.sweep.planning import load_sweep
from sdft_ray.verify.checks import verify
from sdft_ray.verify.models import Model

HALFWAY = SlerpSettings(t=0.5)


@pytest.fixture(scope="module")
def tuned(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """Two models that grew out of the tiny one, in several shards: blocks alone are changed."""
    folder, models = tmp_path_factory.mktemp("tuned"), {}
    for seed, name in enumerate(("sums", "chats")):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "layers" in key:
                # From the fifth block on they are turned so far that SLERP and the mean differ.
                noise = torch.randn_like(parameter) * parameter.std(correction=0)
                parameter.data += (0.2 if int(key.split(".")[2]) >= 4 else 0.001) * noise
        models[name] = folder / name
        shutil.copytree(tiny_model, models[name], ignore=shutil.ignore_patterns("*.safetensors"))
        model.save_pretrained(models[name], max_shard_size="400KB")
    return models


def changed(model: Path, to: Path, **tensors) -> Path:
    """Return a copy of a model in one file with some tensors replaced."""
    shutil.copytree(model, to, ignore=shutil.ignore_patterns("*.safetensors*"))
    held = {}
    for shard in model.glob("*.safetensors"):
        held |= load_file(shard)
    save_file(held | {key.replace("__", "."): value for key, value in tensors.items()}, to / "model.safetensors")
    return to


def held_by(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(model.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def test_merge_of_two_models_is_a_whole_model_and_says_what_slerp_did(tuned, tmp_path):
    facts = merge_models(tuned, tmp_path, HALFWAY)
    one, other, merged = (held_by(model) for model in (*tuned.values(), tmp_path))
    assert merged.keys() == one.keys() and facts.tensors == len(merged)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(list(tuned["sums"].glob("*.safetensors"))) > 1
    same = [name for name in one if torch.equal(one[name], other[name])]
    assert facts.identical == len(same) > 0 and all(torch.equal(merged[name], one[name]) for name in same)
    turned = 0
    for name in one.keys() - set(same):
        a, b = one[name].double().flatten(), other[name].double().flatten()
        cos = float(a @ b / (a.norm() * b.norm()))
        assert facts.cosines[name] == pytest.approx([cos], abs=1e-6)
        if cos > 0.9995:
            expected = (a + b) / 2
        else:
            turned += 1
            expected = (a + b) / (2 * (torch.arccos(torch.tensor(cos, dtype=torch.double)) / 2).cos())
        assert torch.allclose(merged[name].double().flatten(), expected, atol=1e-6), name
    assert 0 < turned == facts.tensors - facts.identical - facts.fell_back_to_linear < facts.tensors
    assert facts.cosines[facts.least_alike] == (facts.least_cosine,)
    assert {check.check for check in verify(Model("merged", tmp_path)) if check.status == "ok"} >= {"tensors", "cache"}


def test_merge_is_the_same_to_the_bit_whatever_the_number_of_cores(tuned, tmp_path):
    threads, written = torch.get_num_threads(), []
    for count in (1, 2):
        (out := tmp_path / str(count)).mkdir()
        torch.set_num_threads(count)
        try:
            merge_models(tuned, out, SlerpSettings(t=0.3))
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
        written.append({path.name: hash_file(path) for path in out.glob("*.safetensors")})
        assert written[-1] == {name: hash_once(out / name) for name in written[-1]}
    assert written[0] == written[1]


def test_merge_writes_the_companions_of_the_first_parent(tuned, tmp_path):
    first = shutil.copytree(tuned["sums"], tmp_path / "sums")
    (first / "LICENSE").write_text("as you like")
    (first / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 0}')
    (out := tmp_path / "out").mkdir()
    merge_models({"sums": first, "chats": tuned["chats"]}, out, HALFWAY)
    for name in ("LICENSE", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (first / name).read_bytes()
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.6, "eos_token_id": [0, 2]}
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_merge_with_a_number_for_each_block_goes_from_one_parent_to_the_other(tuned, tmp_path):
    merge_models(tuned, tmp_path, SlerpSettings(t=(0.0, 0.0, 0.0, 0.0, 1.0, 1.0)))
    one, other, merged = (held_by(model) for model in (*tuned.values(), tmp_path))
    for block, parent in ((0, one), (3, one), (4, other), (5, other)):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        assert torch.allclose(merged[name], parent[name], atol=1e-6)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.decoder.embed_positions.weight"])
def test_merge_with_a_number_for_each_block_takes_the_first_in_front_of_them(name):
    assert _t_of(name, (0.1, 0.2, 0.3)) == 0.1
    assert _t_of("lm_head.weight", (0.1, 0.2, 0.3)) == _t_of("model.decoder.project_out.weight", (0.1, 0.3)) == 0.3


def test_merge_of_bfloat16_models_is_rounded_once(tuned, tmp_path):
    halves = {}
    for name, model in tuned.items():
        kept = {key.replace(".", "__"): value.bfloat16() for key, value in held_by(model).items()}
        halves[name] = changed(model, tmp_path / name, **kept)
    out = tmp_path / "out"
    out.mkdir()
    merge_models(halves, out, LinearSettings(weights=(1, 3)))
    one, other, merged = (held_by(model) for model in (*halves.values(), out))
    name = "model.layers.5.mlp.up_proj.weight"
    assert merged[name].dtype == torch.bfloat16
    assert torch.equal(merged[name], (one[name].float() * 0.25 + other[name].float() * 0.75).bfloat16())


def test_merge_takes_a_model_whose_config_was_written_by_a_trainer(tuned, tmp_path):
    """It spells out defaults, knows RoPE by another name, and has the padding of a tokenizer."""
    cut, own = tmp_path / "cut", tmp_path / "own"
    cut.mkdir()
    remove_blocks(tuned["sums"], cut, (1, 3))
    fields = json.loads((cut / "config.json").read_text())
    shorter = {key: value for key, value in fields.items() if key not in ("head_dim", "mlp_bias", "attention_bias")}
    (cut / "config.json").write_text(json.dumps(shorter))
    model = AutoModelForCausalLM.from_pretrained(cut)
    model.config.pad_token_id = 3
    model.save_pretrained(own)
    AutoTokenizer.from_pretrained(cut).save_pretrained(own)
    require_same_kind({"distilled": cut, "own": own})
    (own / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 0.5}))
    assert "config.json: rms_norm_eps is" in complaint(require_same_kind, {"distilled": cut, "own": own})


def test_merge_refuses_models_that_differ_and_names_the_field(tuned, tmp_path):
    sums, name = tuned["sums"], "model__layers__1__mlp__up_proj__weight"
    held = held_by(sums)

    def refusal(other: Path) -> str:
        (out := tmp_path / f"out{len(list(tmp_path.iterdir()))}").mkdir()
        return complaint(merge_models, {"sums": sums, "other": other}, out, HALFWAY)

    config = changed(sums, tmp_path / "config")
    fields = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 5}))
    assert "config.json: num_hidden_layers is 6, in other 5" in refusal(config)

    tokens = changed(sums, tmp_path / "tokens")
    path = tokens / "tokenizer.json"
    path.write_text(path.read_text().replace('"!":', '"swap":').replace('"#":', '"!":').replace('"swap":', '"#":'))
    assert "the tokenizer: the id of '!' is" in refusal(tokens)

    template = changed(sums, tmp_path / "template")
    path = template / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "model"))
    assert "the tokenizer: chat_template is another one in other. Merge" in refusal(template)

    shape = changed(sums, tmp_path / "shape", **{name: torch.zeros(90, 64)})
    assert "model.layers.1.mlp.up_proj.weight is F32 [96, 64], in other F32 [90, 64]" in refusal(shape)

    for other in (name, "model__norm__weight"):
        for value in (math.nan, math.inf):
            broken = held[other.replace("__", ".")].clone()
            broken.view(-1)[3] = value
            found = refusal(changed(sums, tmp_path / f"{other}-{value}", **{other: broken}))
            assert f"{other.replace('__', '.')} of sums or other holds values that are no numbers" in found

    # Another span of the same base: every shape agrees, and the first block is another one.
    moved = {
        f"model__layers__{i}__{rest}": held[f"model.layers.{i + 1}.{rest.replace('__', '.')}"]
        for i, rest in itertools.product(
            range(5), [k.split(".", 3)[3].replace(".", "__") for k in held if ".layers.0." in k]
        )
    }
    span = changed(sums, tmp_path / "span", **moved)
    found = refusal(span)
    assert "model.layers.0." in found and "other blocks were removed, or the bases differ" in found


# --- in a recipe ----------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tiny_model, tmp_path) -> dict:
    for name in ("sums", "chats"):
        rows = [{"q": f"{name} {i}?", "a": f"{i}"} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.txt").write_text("Some text.\n\nMore text.\n\nA third text.")
    rows = {"fields": {"prompt": "q", "response": "a"}, "held_out": 2, "validation": 2}
    return {
        "model": {"path": str(tiny_model)},
        "rows": {"path": str(tmp_path / "sums.jsonl"), **rows},
        "prune": {"blocks": 2, "calibration": {"text": str(tmp_path / "texts.txt")}},
        "arms": {"distilled": {}},
        "merge": {
            "others": {"chats": {"rows": {"path": str(tmp_path / "chats.jsonl"), **rows, "answer": "none"}}},
            "slerp": {},
            "linear": {},
            "together": True,
        },
        "evaluate": {"tasks": ["held_out"]},
    }


def test_plan_of_a_merge_trains_each_parent_as_its_own_recipe_would(recipe):
    chain = pipeline.chain(validate(Recipe, recipe))
    plan, models = chain.in_order, chain.models
    assert list(models) == ["base", "pruned", "distilled", "chats", "together", "slerp", "linear"]
    alone = {key: value for key, value in recipe.items() if key != "merge"}
    own = pipeline.chain(validate(Recipe, alone)).models["distilled"]
    assert (models["distilled"].id, models["distilled"].slug) == (own.id, own.slug)
    alone |= {"rows": recipe["merge"]["others"]["chats"]["rows"], "evaluate": {"tasks": ["sciq"]}}
    own = pipeline.chain(validate(Recipe, alone)).models["distilled"]
    assert (models["chats"].id, models["chats"].slug) == (own.id, own.slug)
    assert len({stage.id for stage in models.values()}) == len(models)
    for i, stage in enumerate(plan):
        assert all(need in plan[:i] for need in stage.inputs.values()), stage.name
    examined = [stage.inputs["model"].id for stage in plan if stage.name == "evaluate"]
    assert examined == [stage.id for stage in models.values()]


def test_every_leaf_of_a_merge_moves_the_id_of_a_merged_model(recipe):
    def ids(**merge) -> set[str]:
        wanted = recipe | {"merge": recipe["merge"] | merge}
        return {stage.id for stage in pipeline.chain(validate(Recipe, wanted)).merged.values()}

    original = ids()
    assert len(ids(slerp={"t": 0.4}) - original) == 1 and len(ids(linear={"weights": [2, 1]}) - original) == 1
    assert ids(slerp={"t": [0.1, 0.2, 0.3, 0.4]}) != original
    chats = recipe["merge"]["others"]["chats"]
    assert not ids(others={"chats": chats | {"train": {"lr": 3e-4}}}) & original
    assert ids(others={"talk": chats}) == original, "a name bears no identity"
    assert ids(together=False) == original


@pytest.mark.parametrize(
    ("merge", "says"),
    [
        ({"arm": "sft"}, "merge.arm: sft is not among the arms. Add arms.sft"),
        ({"slerp": None, "linear": None}, "merge: names no method. Give at least one of slerp, linear"),
        ({"linear": {"weights": [1.0]}}, "merge.linear: has 1 weights for 2 models. Give one for each"),
        ({"others": {"sft": {"path": "x"}}}, "merge.others: 'sft' cannot name a model"),
        ({"others": {"talk": {}}}, "merge.others.talk: has neither or both of rows and path. Give exactly one of them"),
        ({"slerp": {"tt": 0.5}}, "merge.slerp.tt: unknown key. Did you mean t?"),
        ({"slerp": {"t": [0.5, 0.5]}}, "merge.slerp.t: has 2 numbers for the 4 blocks of the pruned model"),
    ],
)
def test_mistakes_in_a_merge_are_said_in_one_line(recipe, merge, says):
    wrong = recipe | {"merge": recipe["merge"] | merge}
    assert says in complaint(lambda: check(validate(Recipe, wrong), load_compute()))


def test_merge_with_a_model_from_elsewhere_asks_for_its_number_of_blocks(recipe, tiny_model):
    recipe["merge"] = {"others": {"theirs": {"path": str(tiny_model)}}, "slerp": {}}
    with pytest.raises(
        UserError, match=r"merge\.others\.theirs\.path: blocks is 6; the model that is pruned here has 4"
    ):
        check(validate(Recipe, recipe), load_compute())
    models = pipeline.chain(validate(Recipe, recipe)).models
    assert models["theirs"].location == tiny_model and models["slerp"].inputs["model_1"] is models["theirs"]


def test_merge_is_built_from_a_plan_and_kept_as_an_artifact(recipe, tuned, tmp_path):
    first, other = (Stage("model", name, 1, {"sha256": name}, location=path) for name, path in tuned.items())
    halfway = HALFWAY.model_copy(update={"parents": tuple(tuned)})
    stage = Stage("merge", "m", 1, halfway, {"model_0": first, "model_1": other})
    storage = Storage(str(tmp_path / "root"))
    pipeline.build([stage], load_compute(), storage)
    assert storage.status(stage) == "done" and Summary.of(stage, storage).tensors > 0


def test_sweep_of_a_recipe_that_merges_is_refused(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "sweep.yaml").write_text('{"recipe": "recipe.yaml", "axes": {"prune.blocks": [1, 2]}}')
    with pytest.raises(UserError, match=r"recipe: recipe\.yaml has merge, and trials do not"):
        load_sweep(tmp_path / "sweep.yaml")


def test_report_line_of_a_merge_says_what_it_gained_over_each_parent():
    gained = {"sums": Estimate(0.02, 0.005, 0.04, 9), "together": Estimate(0.0, -0.01, 0.01, 9)}
    merged = Summary(
        parameters=9,
        tensors=3,
        identical=1,
        fell_back_to_linear=0,
        least_cosine=0.9,
        least_alike="x",
        cosines={"x": (0.9,)},
    )
    line = merge_line("slerp", MergeEntry(models=("sums", "chats"), against=gained, merged=merged))
    assert "merged from sums and chats; 1 of 3 tensors were identical" in line
    assert line.endswith("intervals: sums +2.0 [+0.5, +4.0], together +0.0 [-1.0, +1.0].")


def test_merge_with_a_model_in_another_precision_is_refused_before_anything_is_trained(recipe, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    other.model.layers, other.config.num_hidden_layers = other.model.layers[:4], 4
    other.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "theirs")
    recipe["merge"] = {"others": {"theirs": {"path": str(tmp_path / "theirs")}}, "slerp": {}}
    says = "merge.others.theirs.path: its weights are bfloat16, and those that are trained here float32. Save it in"
    assert says in complaint(lambda: check(validate(Recipe, recipe), load_compute()))
    check(validate(Recipe, recipe | {"train": {"dtype": "bfloat16"}}), load_compute())
