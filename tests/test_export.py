"""Models in the forms that other programs serve: what is loaded to be evaluated is what was written."""

import json

import pytest
import torch
from architectures import load
from safetensors.torch import load_file
from test_gguf import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft_ray import cpu
from sdft_ray.errors import UserError
from sdft_ray.models import compressed, exporting
from sdft_ray.progress import Progress
from sdft_ray.spec.compute import EngineOptions
from sdft_ray.stages.evaluate.harness import load_model

torch.set_num_threads(1)
IDS = torch.arange(3, 35).reshape(1, -1)


def export(model, folder, form):
    if form == "q4_k_m":
        pytest.importorskip("libgguf", reason="needs libgguf: pip install 'sdft-ray[q4]'")
    folder.mkdir()
    return exporting.write(model, folder, form, "tiny", Progress("export"))


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits


@pytest.mark.heavy
@pytest.mark.parametrize("variant", ["llama", "llama, untied", "llama, stretched", "qwen2", "granite"])
@pytest.mark.parametrize("form", ["f16", "q8_0", "q4_k_m"])
def test_exported_gguf_is_evaluated_with_the_weights_of_the_file(variant, form, tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 512} if form == "q4_k_m" else {}  # which has blocks of 256
    model = make_model(tmp_path, variant, **wide)
    export(model, tmp_path / "out", form)
    loaded = exporting.load_exported(tmp_path / "out", "float32")
    assert not torch.equal(logits(loaded), logits(load(model)))
    if form == "f16":
        rounded = load(model)
        for weight in rounded.parameters():
            weight.data = weight.data.half().float() if weight.dim() > 1 else weight.data
        assert torch.equal(logits(loaded), logits(rounded))
    elif variant == "llama":  # transformers reads no stretched positions of a GGUF, and no granite
        file = f"model-{form}.gguf"
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=file, dtype=torch.float32)
        assert torch.equal(logits(loaded), logits(back))


def test_model_beside_a_gguf_file_and_without_quantisation_is_evaluated_as_it_is(tmp_path):
    model = make_model(tmp_path, "llama")
    (model / "another.gguf").write_bytes(b"GGUF")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert exporting.load_exported(model, "float32") is None
    assert torch.equal(logits(exporting.load_causal(model, "float32")), logits(load(model)))


@pytest.mark.parametrize("form", ["q8_0", "q4_k_m", "int8"])
def test_harness_gets_the_exported_weights_and_the_models_tokenizer(form, tmp_path):
    model = make_model(tmp_path, "llama")
    export(model, tmp_path / "out", form)
    lm = load_model(str(tmp_path / "out"), "float32", 4, "cpu").lm
    assert (lm.model.get_input_embeddings().weight.dtype, lm.model.device.type) == (torch.float32, "cpu")
    assert not torch.equal(logits(lm.model), logits(load(model)))
    tokens = AutoTokenizer.from_pretrained(model)("What is 12 + 3? ünï 日本").input_ids
    assert lm.tok_encode("What is 12 + 3? ünï 日本") == tokens
    scores = lm._loglikelihood_tokens([(("", ""), tokens[:4], tokens[4:])], disable_tqdm=True)
    with torch.inference_mode():
        odds = lm.model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    expected = sum(odds[i - 1, tokens[i]].item() for i in range(4, len(tokens)))
    assert scores[0][0] == pytest.approx(expected, abs=1e-3)


def test_likelihoods_of_int8_beside_an_engine_are_those_without_one(tmp_path):
    from sdft_ray.stages.evaluate.by_engine import load_engine

    export(make_model(tmp_path, "llama"), tmp_path / "out", "int8")
    given, requests = str(tmp_path / "out"), [([5, 6, 7], [8, 9]), ([5, 6], [9, 8, 7])]
    beside = load_engine(given, "float32", 4, "cpu", EngineOptions())  # which is not started for these
    assert beside.score(requests) == load_model(given, "float32", 4, "cpu").score(requests)


def test_exported_int8_is_loaded_by_transformers_as_rounded_matrices(tmp_path):
    model = make_model(tmp_path, "llama")
    written = export(model, tmp_path / "out", "int8")
    loaded, original = exporting.load_exported(tmp_path / "out", "float32"), load(model)
    body = loaded.get_decoder()(input_ids=IDS).last_hidden_state  # as `retention` asks for it, before anything else
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded.lm_head(body), logits(by_transformers))
    assert 0 < (logits(loaded) - logits(original)).abs().max() < 0.2 * logits(original).abs().max()
    assert 0 < written.largest_error < 0.01
    assert written.bytes < sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2


def test_int8_rounds_what_goes_into_a_matrix_too(tmp_path):
    export(make_model(tmp_path, "llama"), tmp_path / "out", "int8")
    layer = exporting.load_exported(tmp_path / "out", "float32").model.layers[0].mlp.up_proj
    given = torch.linspace(-1, 1, layer.in_features).reshape(1, 1, -1)
    with torch.inference_mode():
        scale = given.abs().max() / 127.5
        rounded = (given / scale).round().clamp(-128, 127) * scale
        torch.testing.assert_close(layer(given), rounded @ layer.weight.T)
        assert not torch.allclose(layer(given), given @ layer.weight.T, atol=1e-5)


@pytest.mark.heavy
def test_product_of_int8_in_vllm_is_that_of_the_scheme(tmp_path):
    pytest.importorskip("vllm")
    import vllm._custom_ops as ops
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("of its kernels for a CPU")
    if cpu.overflows_in_int8():
        pytest.skip("int8 overflows on this CPU, where its models are refused")
    current_platform.import_kernels()
    export(make_model(tmp_path, "llama"), tmp_path / "out", "int8")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    weight, scale = (stored[f"model.layers.0.mlp.up_proj.{name}"] for name in ("weight", "weight_scale"))
    given = torch.randn(7, weight.shape[1]) * torch.logspace(-2, 2, 7)[:, None]
    product = ops.create_onednn_scaled_mm(weight.T, scale, torch.float32, True, False, 32)
    out = torch.empty(7, weight.shape[0])
    rounded, steps, _ = ops.onednn_scaled_int8_quant(given, None, None, True)
    ops.onednn_scaled_mm(product, rounded, out, steps, None, None, None)
    step = given.abs().amax(1, keepdim=True) / 127
    expected = (given / step).round().double() * step.double() @ (weight.double() * scale.double()).T
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_export_of_a_mixture_in_8_bits_is_one_line(tmp_path):
    model = make_model(tmp_path, "mixtral")
    with pytest.raises(UserError, match=r"experts\..*, and int8 is written of dense decoders alone\. Leave int8 out"):
        compressed.require_dense(model)
