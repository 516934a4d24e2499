"""The text decoder of a model that also sees is the same model without its eyes."""

import json
import re
from pathlib import Path

import pytest
import torch
from architectures import load, logits_of, prune, some_ids
from safetensors.torch import load_file, save_file
from seeing import BOUNDS, DTYPES, make_whole, noise, read_question, read_texts, run_in_vllm, white
from tiny import WRAPPERS, make_wrapped

from sdft_ray.core.surgery import BUFFERS
from sdft_ray.engine import engine_arguments, named_ends
from sdft_ray.errors import UserError
from sdft_ray.models.parts import text_config, text_name, write_whole
from sdft_ray.models.sources import describe_model
from sdft_ray.preflight.shapes import shape_of
from sdft_ray.progress import Progress
from sdft_ray.spec import compute
from sdft_ray.spec.sources import HubModel, LocalModel
from sdft_ray.stages import Work, model
from sdft_ray.store.storage import Storage

pytestmark = pytest.mark.heavy

torch.set_num_threads(1)


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
    counted = sum(tensor.numel() for name, tensor in kept.items() if not name.endswith(BUFFERS))
    assert counted == shape_of(LocalModel(path=str(whole), part="text")).parameters


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


@pytest.mark.parametrize("architecture", WRAPPERS)
def test_decoder_that_is_put_back_changes_nothing_but_itself(architecture, tmp_path):
    from transformers import AutoModelForImageTextToText

    base = make_wrapped(tmp_path / "whole", architecture)
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "Any"}')
    work = make_work(tmp_path / "root", base)
    model.build(work)
    cut = prune(work.directory, tmp_path / "cut", (1, 4))
    (tmp_path / "out").mkdir()
    parameters, kept = write_whole(cut, base, tmp_path / "out")
    whole, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and parameters == whole.num_parameters()
    assert whole.config.text_config.num_hidden_layers == 4
    torch.testing.assert_close(logits_of(whole.eval(), some_ids()), logits_of(load(cut), some_ids()))
    was, now = bytes_of(base), bytes_of(tmp_path / "out")
    rest = {name for name in was if text_name(name) is None}
    assert len(rest) == kept and {name for name in now if text_name(name) is None} == rest
    assert all(now[name] == was[name] for name in rest)
    assert {text_name(name): content for name, content in now.items() if name not in rest} == bytes_of(cut)
    assert {re.sub(r"\d+", "N", name) for name in now} <= {re.sub(r"\d+", "N", name) for name in was}
    assert (tmp_path / "out/preprocessor_config.json").read_text() == '{"image_processor_type": "Any"}'
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {
        name: tensor.numpy().tobytes()
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("architecture", WRAPPERS)
def test_model_that_also_sees_rewrites_as_its_decoder_says(architecture, tmp_path):
    from transformers import AutoConfig

    whole = make_wrapped(tmp_path / "whole", architecture)
    config = AutoConfig.from_pretrained(whole)
    assert named_ends(config) == named_ends(AutoConfig.from_pretrained(whole / "text")) == 2
    config.eos_token_id = [1, 2]
    assert named_ends(config) == [1, 2]
    shares = engine_arguments(str(whole), "float32", compute.EngineOptions(), alone=False)["enable_prefix_caching"]
    assert shares is (architecture not in ("llama4", "qwen3_5")), "beginnings of prompts that carry a state on"


ENDS = pytest.mark.xfail(
    reason="vLLM's CPU build ends: free(): invalid size (docs/architectures.md)", raises=RuntimeError
)


@pytest.mark.full
@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=ENDS) if name == "llama4" else name for name in WRAPPERS]
)
def test_decoder_that_is_put_back_reads_texts_and_images_in_vllm_as_in_transformers(architecture, tmp_path):
    pytest.importorskip("torchvision", reason="vLLM reads models that see with torchvision: docs/footguns.md")
    whole, dtype = make_whole(tmp_path, architecture), DTYPES.get(architecture, "float32")
    found = run_in_vllm(whole, dtype, architecture)
    assert max(read_texts(whole, found["texts"])) < BOUNDS[dtype]
    asked, behind = read_question(whole, architecture, noise(), found["seen"])
    assert found["asked"] == asked and max(behind) < BOUNDS[dtype]
    if architecture == "mistral3":  # the random eyes of others are too faint to move a token
        assert max(read_question(whole, architecture, white(), found["seen"])[1]) > 1, "what it sees moves what it says"


def test_whole_model_of_shards_and_heads_of_the_uncut_one_loses_the_heads(tmp_path):
    base = make_wrapped(tmp_path / "whole", "qwen3_5", tie_word_embeddings=False)
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(weights)
    more = {"mtp.fc.weight": torch.ones(2, 2)}
    for i, part in enumerate((names[::2], names[1::2])):
        tensors = {name: weights[name] for name in part} | (more if i else {})
        save_file(tensors, base / f"model-0000{i + 1}-of-00002.safetensors", metadata={"format": "pt"})
    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    files["mtp.fc.weight"] = "model-00002-of-00002.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    work = make_work(tmp_path / "root", base)
    model.build(work)
    (tmp_path / "out").mkdir()
    write_whole(work.directory, base, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


def test_whole_models_move_no_id_of_the_text_models(tmp_path):
    whole = str(make_wrapped(tmp_path / "whole", "gemma3"))
    assert model.stage(LocalModel(path=whole, part="all")).id == model.stage(LocalModel(path=whole, part="text")).id
    around = model.whole_stage(LocalModel(path=whole, part="all"))
    assert around is not None and around.location == Path(whole)
    assert model.whole_stage(LocalModel(path=whole, part="text")) is None
    repo = HubModel(repo="owner/name", revision="0" * 40, part="all")
    assert model.stage(repo).settings.part == "text"
    assert model.whole_stage(repo).settings.part is None, "downloaded as it is"
