"""Rows of a packed sequence know nothing of each other, whatever the model's attention is made of."""

import pytest
import torch
from tiny import make_tiny_model, make_tokenizer

from sdft_ray.core.packing import pack_rows
from sdft_ray.core.rowwise import CurrentRows, RowDropout, drop_by_row, keep_within_rows
from sdft_ray.data.chat import encode_row
from sdft_ray.spec.training import Train
from sdft_ray.stages.nll import summed_loss
from sdft_ray.stages.train.adapters import load_model
from sdft_ray.stages.train.zero import with_loss

pytestmark = pytest.mark.heavy


def some_rows():
    tokenizer = make_tokenizer()
    return [encode_row(tokenizer, f"What is {i}?", "It is " + "so " * i + str(i)) for i in range(5)]


def losses(model, packed):
    with torch.no_grad():
        logits = model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            logits_to_keep=packed.keep,
            use_cache=False,
        ).logits[0]
    return torch.nn.functional.cross_entropy(logits, packed.targets, reduction="none")


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 24}),
        ("gemma2", {}),
        ("qwen3_moe", {}),
        ("gpt_oss", {}),  # has sinks, and its mask is not made from positions
        ("nemotron", {}),  # hands no arguments on to its attention
        *((name, {}) for name in ("apertus", "arcee", "deepseek_v3", "ernie4_5_moe", "gemma4_text", "glm4_moe")),
        *((name, {}) for name in ("gpt_neox", "hunyuan_v1_dense", "ministral3", "opt", "phi")),
    ],
)
def test_losses_of_packed_rows_equal_those_of_the_rows_alone(architecture, fields, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path, architecture, **fields)).eval()
    rows = some_rows()
    usual = torch.cat([losses(model, pack_rows([row])) for row in rows])
    current = keep_within_rows(model)
    packed = pack_rows(rows)
    current.starts = packed.starts
    assert torch.allclose(losses(model, packed), usual, atol=1e-5)
    current.starts = [0, packed.starts[-1]]  # as one row they do see each other: the test above can fail
    assert not torch.allclose(losses(model, packed), usual, atol=1e-3)


ALONE = (
    "falcon_h1",
    "granitemoehybrid",
    "lfm2",
    "llama4_text",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_text",
    "qwen3_next",
)


@pytest.mark.parametrize("architecture", ALONE)
def test_rows_of_a_model_that_carries_a_state_on_are_trained_and_measured_one_a_sequence(architecture, tmp_path):
    base = make_tiny_model(tmp_path, architecture)
    module = with_loss(load_model(str(base), Train()), Train()).eval()
    rows = some_rows()
    with torch.no_grad():
        alone = sum(float(losses(module.model, pack_rows([row])).sum()) for row in rows)
        found = sum(float(module(pack_rows([row]), [""]).sum()) for row in rows)
        assert found == pytest.approx(alone, rel=1e-5)
        assert summed_loss(module.model, rows) == pytest.approx(alone, rel=1e-5)
        assert float(losses(module.model, pack_rows(rows)).sum()) != pytest.approx(alone, rel=1e-4), "it does leak"
    with pytest.raises(AssertionError, match="one row a sequence"):
        module(pack_rows(rows), [""] * len(rows))


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("mixtral", {"router_jitter_noise": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
        ("phi", {"resid_pdrop": 0.5, "embd_pdrop": 0.5}),  # has modules of dropout
        ("seed_oss", {"attention_dropout": 0.5, "residual_dropout": 0.5}),
        ("starcoder2", {"embedding_dropout": 0.5, "residual_dropout": 0.5}),
    ],
)
def test_losses_in_training_draw_nothing_that_the_model_s_own_config_asks_for(architecture, fields, tmp_path):
    base = make_tiny_model(tmp_path, architecture, **fields)
    model = load_model(str(base), Train(method="full"))
    packed = pack_rows(some_rows()[:1])
    usual = losses(model.eval(), packed)
    assert not torch.allclose(losses(model.train(), packed), usual, atol=1e-3), "the config asks for something"
    assert torch.allclose(with_loss(model, Train(method="full")).train()(packed, ["0"]), usual, atol=1e-5)


def test_row_dropout_of_a_row_is_the_same_in_any_company():
    rows = CurrentRows()
    dropout, x = RowDropout(0.4, 3, rows), torch.ones(1, 9, 50)
    rows.starts, rows.keys = [0, 4, 9], ["0/7/a", "0/7/b"]
    both = dropout(x)
    rows.starts, rows.keys = [0, 5], ["0/7/b"]
    assert torch.equal(dropout(x[:, :5]), both[:, 4:])
    rows.keys = ["0/8/b"]
    assert not torch.equal(dropout(x[:, :5]), both[:, 4:]), "another step draws anew"
    assert (both == 0).float().mean() == pytest.approx(0.4, abs=0.1)
    assert both.max() == pytest.approx(1 / 0.6)
    dropout.eval()
    assert torch.equal(dropout(x), x)


def test_drop_by_row_replaces_the_dropout_of_every_adapter(tiny_model):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    drop_by_row(model, 0.5, CurrentRows())
    layers = [module.layer for module in model.modules() if isinstance(module, RowDropout)]
    assert layers == list(range(6 * 7)), "each layer draws its own"
    assert not [module for module in model.modules() if type(module) is torch.nn.Dropout]
