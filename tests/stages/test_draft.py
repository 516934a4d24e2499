"""Trying a model as the draft of another: the real engine, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from refusals import complaint
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft_ray import engine, pipeline
from sdft_ray.core.rows import Exchange
from sdft_ray.data.chat import render_prompts
from sdft_ray.errors import StageFailed, UserError
from sdft_ray.preflight import savings
from sdft_ray.report.lines import draft_line
from sdft_ray.report.table import draft_rows
from sdft_ray.results import Differing
from sdft_ray.spec.compute import EngineOptions, load_compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.wording import validate
from sdft_ray.stages import draft
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage
from sdft_ray.sweep.planning import Plan, load_sweep, name_draft, stages_of

torch.set_num_threads(1)

PROMPTS = [Exchange(text, "").given for text in ("What is 1 + 1?", "What is 2 + 2?")]
SETTINGS = draft.Settings(
    name="blurred",
    tokens=(1, 3),
    prompts=2,
    at_once=1,
    max_new_tokens=24,
    temperature=0.05,  # nearly greedy
    top_p=0.95,
    dtype="float32",
)


@pytest.fixture(scope="module")
def blurred(tiny_model, tmp_path_factory):
    """The tiny model with a little noise on its weights: it often says the same as the tiny model, not always."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for weights in network.parameters():
            weights += 0.05 * weights.std() * torch.randn_like(weights)
    path = tmp_path_factory.mktemp("models") / "blurred"
    network.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return path


@pytest.fixture
def recipe(tiny_model, tmp_path) -> dict:
    rows, texts = tmp_path / "rows.jsonl", tmp_path / "texts.txt"
    rows.write_text("".join(json.dumps({"q": f"What is {i} + {i}?", "a": f"{2 * i}"}) + "\n" for i in range(1, 13)))
    texts.write_text("Some text.\n\nMore text.\n\nA third text.")
    fields = {"prompt": "q", "response": "a"}
    return {
        "model": {"path": str(tiny_model)},
        "rows": {"path": str(rows), "fields": fields, "held_out": 4, "validation": 2},
        "prune": {"blocks": 2, "calibration": {"text": str(texts)}},
        "draft": {"prompts": 2, "tokens": [1, 3]},
        "evaluate": {"tasks": ["held_out"]},
    }


def drafts(recipe: dict) -> dict[str, Stage]:
    found = pipeline.chain(validate(Recipe, recipe)).drafts
    assert list(found) == [stage.settings.name for stage in found.values()]
    return dict(found)


def test_draft_tells_acceptance_and_speeds_and_leaves_greedy_text_as_it_was(
    ray_cluster, recipe, tiny_model, blurred, tmp_path
):
    chain = pipeline.chain(validate(Recipe, recipe))
    other = Stage("model", "blurred", 1, {"sha256": "b"}, location=blurred)
    stage = Stage("draft", "d", 1, SETTINGS, {"model": chain.base, "draft": other, "rows": chain.rows})
    storage = Storage(str(tmp_path / "root"))
    pipeline.build([chain.rows, stage], load_compute(), storage)
    found = draft.Summary.of(stage, storage)

    for way in (found.greedy, found.sampled):
        one, three = way.measured
        assert (one.tokens, three.tokens) == (1, 3) and [each.tokens for each in way.counted] == [1, 2, 3]
        assert 0 < three.acceptance < 1 and 1 < three.tokens_per_call < 4
        assert three.drafts >= three.accepted[0] >= three.accepted[1] >= three.accepted[2]
        assert three.speedup_min <= three.speedup <= three.speedup_max
        assert way.counted[2].tokens_per_call == three.tokens_per_call
    assert found.sampled.measured[1].acceptance == pytest.approx(found.greedy.measured[1].acceptance, abs=0.2)
    plain = json.loads((storage.place(stage) / "draft.json").read_text())
    assert plain == storage.manifest(stage).summary == found.plain()
    assert all(each["differing"] == [] for each in plain["greedy"]["measured"])
    assert not any("differing" in each for each in plain["sampled"]["measured"])
    config = json.loads((storage.place(stage) / "speculative_config.json").read_text())
    best = max(found.greedy.measured, key=lambda each: each.speedup)
    assert found.greedy.best == best
    assert config == {"method": "draft_model", "model": str(blurred), "num_speculative_tokens": best.tokens}
    assert "blurred as draft of the base: a token of it takes" in draft_line("blurred", found)
    assert [row[:2] for row in draft_rows(found)] == [[way, k] for way in ("greedy", "sampled") for k in "123"]


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_drafts_for_itself_is_always_accepted(ray_cluster, tiny_model, dtype):
    import ray

    options = EngineOptions()
    measure = ray.remote(max_calls=1)(draft.measure)
    settings = SETTINGS.model_copy(update={"dtype": dtype, "tokens": (2,), "at_once": 2})
    found = ray.get(measure.remote(lambda: tiny_model, lambda: tiny_model, PROMPTS, settings, options))
    for way in (found.greedy, found.sampled):
        exact = dtype == "float32" and way is found.greedy
        assert way.measured[0].acceptance == pytest.approx(1, abs=0 if exact else 0.1)


def test_values_of_requests_are_those_of_their_drafted_tokens():
    temperatures, ends = torch.tensor([0.7, 0.0, 0.3]), torch.tensor([2, 3, 5], dtype=torch.int32)
    expected = torch.tensor([0.7, 0.7, 1.0, 0.3, 0.3])
    assert torch.equal(engine.expand_to_tokens(temperatures, ends, 5, 0, 1), expected)
    assert engine.expand_to_tokens(torch.tensor([5, 7, 0], dtype=torch.int32), ends, 5).tolist() == [5, 5, 7, 0, 0]


def test_a_token_that_really_differs_fails_in_float32_and_is_told_in_half_precision(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = render_prompts(tokenizer, PROMPTS)
    alone, drafted = [[5, 6, 7], [8, 9]], [[5, 6, 7], [8, 10]]
    assert draft.compare_texts(tiny_model, "bfloat16", ids, alone, drafted) == [Differing(prompt=1, token=1)]
    assert draft.compare_texts(tiny_model, "float32", ids, alone, alone) == []
    with pytest.raises(StageFailed, match="token 1 of held-out prompt 1 is another, logits"):
        draft.compare_texts(tiny_model, "float32", ids, alone, drafted)
    with pytest.raises(StageFailed, match="token 2 of held-out prompt 0 is another, logits inf apart"):
        draft.compare_texts(tiny_model, "float32", ids, alone, [[5, 6], [8, 9]])


def test_a_draft_with_another_tokenizer_is_refused(tiny_model, tmp_path):
    other = make_tiny_model(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens("<more>")
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match=r"draft\.models: .* has another tokenizer"):
        draft.render_alike(tiny_model, other, PROMPTS)


def test_an_answer_longer_than_the_context_is_refused_before_an_engine_starts(tiny_model):
    settings = SETTINGS.model_copy(update={"max_new_tokens": 100_000})
    with pytest.raises(
        UserError, match=r"draft\.max_new_tokens: .* and the model's context is \d+\. Lower it by \d+\."
    ):
        draft.measure(lambda: tiny_model, lambda: tiny_model, PROMPTS, settings, EngineOptions())


def test_every_arm_and_the_pruned_model_are_tried_unless_named(recipe):
    assert list(drafts(recipe)) == ["pruned", "sft", "distilled"]
    assert list(drafts(recipe | {"arms": {"sft": {}}})) == ["pruned", "sft"]
    assert list(drafts(recipe | {"draft": {"models": ["distilled"], "prompts": 2}})) == ["distilled"]


def test_every_setting_of_a_draft_moves_its_id_and_no_evaluation(recipe):
    def ids(**changed):
        chain = pipeline.chain(validate(Recipe, recipe | {"draft": recipe["draft"] | changed}))
        return [stage.id for stage in chain.drafts.values()], [stage.id for stage in chain.evaluations.values()]

    before, evaluations = ids()
    for changed in [{"tokens": [1, 4]}, {"prompts": 3}, {"at_once": 2}, {"max_new_tokens": 8}, {"temperature": 1.0},
                    {"top_p": 1.0}, {"dtype": "float32"}]:  # fmt: skip
        after, evaluations_after = ids(**changed)
        assert not {*before} & {*after} and evaluations == evaluations_after, changed
    assert ids(tokens=[3, 1])[0] == before


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prompts": 5}, "draft.prompts: 5 is more than the 4 held-out rows with prompts. Lower draft.prompts"),
        (
            {"models": ["distiled"], "prompts": 2},
            "draft.models: this recipe makes no distiled. Did you mean distilled?",
        ),
        ({"models": ["base"], "prompts": 2}, "draft.models: this recipe makes no base"),
        ({"tokens": [2, 2], "prompts": 2}, "draft.tokens: has a value twice"),
        ({"token": [2], "prompts": 2}, "draft.token: unknown key. Did you mean tokens?"),
    ],
)
def test_mistakes_in_a_draft_are_said_in_one_line(recipe, settings, says):
    assert says in complaint(drafts, recipe | {"draft": settings})


def sweep_of(recipe: dict, folder: Path, axes: list[dict]) -> Plan:
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "sweep.yaml").write_text(json.dumps({"recipe": "recipe.yaml", "axes": axes}))
    return load_sweep(folder / "sweep.yaml")


def test_sweep_tries_each_pruned_model_once_and_each_trained_one_after_all_else(recipe, tmp_path):
    recipe |= {"arms": {"sft": {}, "distilled": {}}}
    plan = sweep_of(recipe, tmp_path, [{"prune.blocks": [1, 2], "arms.sft.lr": [1e-4, 2e-4]}])
    assert [name_draft(stage, plan) for stage in plan.drafts] == [
        "draft pruned, blocks 1", "draft sft, blocks 1, lr 0.0001", "draft distilled, blocks 1",
        "draft sft, blocks 1, lr 0.0002", "draft pruned, blocks 2", "draft sft, blocks 2, lr 0.0001",
        "draft distilled, blocks 2", "draft sft, blocks 2, lr 0.0002",
    ]  # fmt: skip
    assert stages_of(plan)[-8:] == plan.drafts
    counts = {kind.stage: kind for kind in savings.measure(plan, Storage(str(tmp_path / "root"))).stages}
    assert (counts["draft"].alone, counts["draft"].sweep, counts["draft"].missing) == (4 * 3, 8, 8)
    alone = pipeline.chain(plan.cells[0].recipe).drafts
    assert list(alone.values()) == list(plan.drafts[:3]), "the same artifacts"
    named = recipe | {"draft": {"models": ["distilled"], "prompts": 2}}
    assert len(sweep_of(named, tmp_path, [{"prune.blocks": [1, 2]}]).drafts) == 2


@pytest.mark.parametrize(
    ("settings", "axis", "says"),
    [
        ({"models": ["sfd"]}, "prune.blocks", "draft.models: this recipe makes no sfd. Did you mean sft?"),
        ({}, "draft.prompts", "axes.draft.prompts: every draft is tried in the same way. Set it in the recipe."),
    ],
)
def test_mistakes_in_the_drafts_of_a_sweep_are_said_in_one_line(recipe, tmp_path, settings, axis, says):
    assert complaint(sweep_of, recipe | {"draft": recipe["draft"] | settings}, tmp_path, [{axis: [1, 2]}]) == says
