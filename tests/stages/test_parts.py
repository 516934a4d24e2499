"""The text decoder of a model that also sees is the same model without its eyes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import load, logits_of, prune, some_ids
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model, make_tokenizer

from sdft_ray.errors import UserError
from sdft_ray.models.parts import text_config
from sdft_ray.models.sources import describe_model
from sdft_ray.preflight.costs import shape_of
from sdft_ray.progress import Progress
from sdft_ray.spec import compute
from sdft_ray.spec.sources import LocalModel
from sdft_ray.stages import Work, model
from sdft_ray.store.storage import Storage

pytestmark = pytest.mark.heavy

torch.set_num_threads(1)

EYES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
EYES |= {"image_size": 28, "patch_size": 14}
# The wrapper, its text decoder, and its eyes.
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", EYES),
    "gemma4": ("gemma4_text", EYES | {"num_key_value_heads": 2, "head_dim": 16}),
    "llama4": ("llama4_text", EYES | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}),
    "mistral3": ("ministral3", EYES | {"head_dim": 16}),
    "qwen3_5": ("qwen3_5_text", {"hidden_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}),
}


def make_wrapped(directory: Path, architecture: str, **fields: Any) -> Path:
    """Write a tiny model with eyes, with a byte tokenizer."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, eyes = WRAPPERS[architecture]
    own = AutoConfig.from_pretrained(make_tiny_model(directory / "text", text, **fields)).to_dict()
    eyes = {"model_type": "pixtral"} | eyes if architecture == "mistral3" else eyes
    torch.manual_seed(0)
    tied = own["tie_word_embeddings"]
    config = AutoConfig.for_model(architecture, text_config=own, vision_config=eyes, tie_word_embeddings=tied)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def make_work(root: Path, whole: Path) -> Work:
    stage = model.stage(LocalModel(path=str(whole), part="text"))
    return Work(stage, Storage(str(root)), compute.Compute(), Progress("model", "parts"))


@pytest.mark.parametrize("architecture", WRAPPERS)
def test_text_part_computes_what_the_whole_does_and_is_pruned_as_any_model(architecture, tmp_path):
    from transformers import AutoModelForImageTextToText

    whole = make_wrapped(tmp_path / "whole", architecture)
    work, ids = make_work(tmp_path / "root", whole), some_ids()
    summary = model.build(work)
    assert (summary.architecture, summary.blocks) == (WRAPPERS[architecture][0], 6)
    expected = logits_of(AutoModelForImageTextToText.from_pretrained(whole).eval(), ids)
    torch.testing.assert_close(logits_of(load(work.directory), ids), expected, atol=1e-5, rtol=1e-5)
    cut = prune(work.directory, tmp_path / "cut", (0, 1))
    skipped = logits_of(load(work.directory), ids, skipped=(0, 1))
    torch.testing.assert_close(logits_of(load(cut), ids), skipped, atol=1e-5, rtol=1e-5)
    kept, held = (load_file(path / "model.safetensors") for path in (work.directory, whole))
    assert len(kept) < len(held)
    assert sum(t.numel() for t in kept.values()) == shape_of(LocalModel(path=str(whole), part="text")).parameters


def test_text_part_of_a_newer_file_and_of_shards_is_the_same(tmp_path):
    whole = make_wrapped(tmp_path / "whole", "gemma3", tie_word_embeddings=False)
    plain = make_work(tmp_path / "a", whole)
    model.build(plain)
    weights = load_file(whole / "model.safetensors")
    (whole / "model.safetensors").unlink()
    newer = {
        name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head.", "lm_head."): t
        for name, t in weights.items()
    }
    assert newer.keys() != weights.keys()
    files = {
        "model-00001-of-00002.safetensors": list(newer)[::2],
        "model-00002-of-00002.safetensors": list(newer)[1::2],
    }
    for file, names in files.items():
        save_file({name: newer[name] for name in names}, whole / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (whole / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = make_work(tmp_path / "b", whole)
    model.build(sharded)
    assert torch.equal(*(logits_of(load(work.directory), some_ids()) for work in (plain, sharded)))


def test_text_part_is_described_before_anything_is_built(tmp_path):
    whole = make_wrapped(tmp_path / "whole", "gemma3")
    facts = describe_model(LocalModel(path=str(whole), part="text"))
    assert facts is not None and (facts.architecture, facts.blocks, facts.context) == ("gemma3_text", 6, 2048)
    stage = model.stage(LocalModel(path=str(whole), part="text"))
    assert stage.location is None and stage.id != model.stage(LocalModel(path=str(whole))).id


def test_text_part_of_a_model_that_is_none_but_text_is_refused(tiny_model):
    with pytest.raises(UserError, match=f"{tiny_model}/config.json: has no text_config, which model.part: text takes"):
        text_config(tiny_model)


def test_text_part_that_is_no_model_of_its_own_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "text_config": {}}))
    with pytest.raises(
        UserError, match="its text_config is that of qwen2_5_vl_text, which is no text model of its own"
    ):
        text_config(tmp_path)


def test_part_of_a_gguf_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"^model\.part: .*model\.gguf is a \.gguf file"):
        model.stage(LocalModel(path=str(tmp_path / "model.gguf"), part="text"))
