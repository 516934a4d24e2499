"""A GGUF file holds the model: transformers reads its weights back, and llama.cpp writes the same text."""

import json
import re
import sys
import urllib.request
from pathlib import Path

import gguf as library
import numpy as np
import pytest
import torch
from architectures import generated_by, load, prune
from gguf import GGMLQuantizationType as Kind
from tiny import CHAT_TEMPLATE, make_tiny_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft_ray import cli
from sdft_ray.errors import StageFailed, UserError
from sdft_ray.models import exporting, gguf, quants
from sdft_ray.models.vocabulary import name_pre_tokenizer
from sdft_ray.progress import Progress

torch.set_num_threads(1)

STRETCHED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "llama": {},
    "llama, untied": {"tie_word_embeddings": False},
    "llama, stretched": {"rope_parameters": {**STRETCHED, "original_max_position_embeddings": 64}},
    "mistral": {"sliding_window": None},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "qwen2": {},
    "qwen3": {},
}


def make_model(folder: Path, variant: str, **overrides) -> Path:
    """Write a tiny model whose tokenizer has a merge, without which llama.cpp reads none."""
    vocabulary = {"vocab_size": len(tokenizer := make_tokenizer([("a", "t")])) + 2}  # two rows that stand for nothing
    settings = {**vocabulary, **VARIANTS.get(variant, {}), **overrides}
    model = make_tiny_model(folder / variant, variant.partition(",")[0], **settings)
    tokenizer.save_pretrained(model)
    return model


def write(model: Path, name: str = "f16") -> gguf.Written:
    return gguf.write_gguf(model, model.parent / f"{name}.gguf", name, "tiny", Progress("export"))


def fields(file: Path) -> dict:
    return {name: field.contents() for name, field in library.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_file_in_float16_is_read_back_by_transformers_as_the_rounded_weights(variant, tmp_path):
    cut = prune(make_model(tmp_path, variant), tmp_path / "cut", (1, 3))
    written = write(cut)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=written.file.name, dtype=torch.float32)
    assert back.config.num_hidden_layers == 4
    weights = back.state_dict()
    for name, weight in load(cut).state_dict().items():
        expected = weight if weight.dim() < 2 else weight.half().float()
        assert torch.equal(weights[name], expected), name


def test_file_in_8_bits_is_read_back_within_what_is_stated(tmp_path):
    model = make_model(tmp_path, "llama")
    written = write(model, "q8_0")
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=written.file.name, dtype=torch.float32).state_dict()
    largest = 0.0
    for name, weight in load(model).state_dict().items():
        off = (back[name] - weight).abs()
        if weight.dim() == 2:
            blocks = weight.abs().reshape(-1, 32).amax(1)
            assert (off.reshape(-1, 32).amax(1) <= 0.0045 * blocks + 4e-6).all(), name
            largest = max(largest, off.max().item())
        else:
            assert not off.any(), name
    assert written.largest_error == pytest.approx(largest)
    assert largest > 0


def test_file_holds_the_template_the_special_tokens_and_every_token(tmp_path):
    model = make_model(tmp_path, "qwen2")
    written, tokenizer = fields(write(model).file), AutoTokenizer.from_pretrained(model)
    assert written["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert written["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert written["tokenizer.ggml.add_bos_token"] is False
    tokens, kinds = written["tokenizer.ggml.tokens"], written["tokenizer.ggml.token_type"]
    assert tokenizer.convert_tokens_to_ids(tokens[:-2]) == [*range(len(tokens) - 2)]
    assert (kinds[:3], set(kinds[3:-2]), kinds[-2:]) == ([3, 3, 3], {1}, [5, 5])
    assert written["qwen2.block_count"] == 6 and written["general.file_type"] == library.LlamaFileType.MOSTLY_F16


@pytest.mark.parametrize(
    ("form", "weight", "kind"),
    [("f16", 1e5, "F16"), ("q8_0", 9e6, "Q8_0"), ("q4_k_m", 2e6, "Q5_0"), ("f16", float("nan"), "F16")],
)
def test_weights_beyond_a_form_are_refused_and_bfloat16_holds_them(form, weight, kind, tmp_path):
    model = make_model(tmp_path, "llama")
    large = load(model)
    large.model.layers[0].mlp.up_proj.weight.data[0, 0] = weight
    large.save_pretrained(model)
    what = rf"up_proj\.weight: holds weights up to {re.escape(f'{weight:.3g}')}, and {kind} ends at .*Write it as bf16"
    with pytest.raises(UserError, match=what):
        write(model, form)
    assert not [*tmp_path.glob("*.gguf*"), *tmp_path.glob(".*")]
    if np.isfinite(weight):
        assert write(model, "bf16").largest_error == 0


@pytest.mark.parametrize("kind", quants.LARGEST, ids=lambda kind: kind.name)
def test_largest_weight_of_a_kind_is_held_within_what_is_stated(kind):
    if kind in quants._LIBGGUF:
        pytest.importorskip("libgguf", reason="needs libgguf: pip install 'sdft-ray[q4]'")
    weights = np.zeros((1, 256), np.float32)
    weights[0, 0] = -quants.LARGEST[kind]
    assert quants.error_of(weights, quants.encode(weights, kind), kind) is not None


def test_tokens_behind_the_last_row_of_embeddings_are_left_out(tmp_path):
    model = make_model(tmp_path, "llama")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>", "<image>"]})
    tokenizer.save_pretrained(model)
    tokens = fields(write(model).file)["tokenizer.ggml.tokens"]
    assert tokens[-2:] == ["<a>", "<b>"] and len(tokens) == len(tokenizer) - 1


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}


@pytest.mark.parametrize(
    ("architecture", "overrides", "what"),
    [
        ("gemma2", {}, r"is a gemma2 model, which is not written as GGUF here \(known: granite, llama"),
        ("qwen2", WINDOWS, "has windows of attention, which the GGUF of a qwen2 model cannot say"),
        ("mistral", {"sliding_window": 4}, "has windows of attention, which the GGUF of a llama model cannot say"),
        ("llama", {"rope_parameters": LINEAR}, r"positions \(linear\)"),
    ],
)
def test_model_that_gguf_cannot_say_is_refused_by_name(architecture, overrides, what, tmp_path):
    with pytest.raises(UserError, match=what):
        write(make_model(tmp_path, architecture, **overrides))


def test_tokenizers_have_llama_cpps_names_and_others_are_refused(tmp_path):
    def name(pre: dict, **model) -> str:
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({"pre_tokenizer": pre, "model": {"type": "BPE", "merges": [["a", "t"]], **model}}))
        return name_pre_tokenizer(path)

    words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert name(words) == "gpt-2"
    assert name({"type": "Sequence", "pretokenizers": [digits, words]}) == "smollm"
    for wrong, what in (
        (lambda: name({"type": "Metaspace"}, byte_fallback=True), "holds a tokenizer SentencePiece's"),
        (lambda: name({"type": "Whitespace"}), r"in a way that has no name here \(Whitespace\)"),
        (lambda: name(words, merges=[]), "holds no merges"),
    ):
        with pytest.raises(UserError, match=what):
            wrong()


def test_formats_that_are_not_written_are_one_line_with_a_remedy(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path), "--format", "q5_k_m"]) == 2
    expected = "--format: q5_k_m is not written. Write f16, then do: llama-quantize FILE.gguf OUT.gguf Q5_K_M.\n"
    assert capsys.readouterr().err == expected
    assert cli.main(["export", str(tmp_path), "--format", "q8"]) == 2
    assert capsys.readouterr().err == "--format: q8 is not written. Did you mean q8_0?\n"


def test_four_bits_without_their_library_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "libgguf", raising=False)
    monkeypatch.setattr(sys, "path_importer_cache", {})
    assert cli.main(["export", str(tmp_path), "--format", "q4_k_m"]) == 2
    line = "q4_k_m needs libgguf, which is not installed. Do: pip install 'sdft-ray[q4]'."
    assert capsys.readouterr().err == f"--format: {line}\n"
    with pytest.raises(UserError, match=re.escape(f"export.formats: {line}")):
        exporting.require_library("q4_k_m")


def test_kinds_of_four_bits_are_those_of_llama_cpp():
    def six_bits(part: str) -> list[int]:
        names = [f"blk.{i}.{part}.weight" for i in range(32)]
        return [i for i, name in enumerate(names) if quants.kind_of(name, (512, 512), "q4_k_m", 32, False) == Kind.Q6_K]

    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]  # as in the published files of Llama 3.1 8B
    assert (six_bits("attn_v"), six_bits("ffn_down"), six_bits("attn_k")) == (more, more, [])

    def kind(name: str, width: int = 512, tied: bool = False) -> str:
        return quants.kind_of(name, (512, width), "q4_k_m", 32, tied).name

    assert (kind("output.weight"), kind("token_embd.weight"), kind("token_embd.weight", tied=True)) == (
        "Q6_K",
        "Q4_K",
        "Q6_K",
    )
    widths = (576, 100)  # no whole blocks of 256; nor of 32
    assert [kind("blk.4.attn_v.weight", width) for width in widths] == ["Q5_0", "F16"]
    assert [kind("blk.0.attn_v.weight", width) for width in widths] == ["Q8_0", "F16"]


@pytest.mark.parametrize("kind", quants._CODES, ids=lambda kind: kind.name)
def test_quantised_weights_are_told_from_others(kind):
    if kind in quants._LIBGGUF:
        pytest.importorskip("libgguf", reason="needs libgguf: pip install 'sdft-ray[q4]'")
    random = np.random.default_rng(0)
    weights = random.normal(size=(8, 512)).astype(np.float32)
    weights *= np.repeat(10.0 ** random.uniform(-4, 0, size=(8, 16)), 32, 1).astype(np.float32)  # groups differ in size
    stored = quants.encode(weights, kind)
    error = quants.error_of(weights, stored, kind)
    assert error == np.abs(library.quants.dequantize(stored, kind) - weights).max()
    bits = {Kind.Q4_K: 4, Kind.Q5_0: 5, Kind.Q6_K: 6, Kind.Q8_0: 8}[kind]
    assert 0 < error < 1.2 * np.abs(weights).max() / 2**bits * (2 if kind == Kind.Q4_K else 1)
    assert quants.error_of(weights[::-1].copy(), stored, kind) is None
    off = weights.copy()
    off[3, np.abs(weights[3]).argmax()] *= 0.5
    assert quants.error_of(off, stored, kind) is None


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9}  # whole blocks of 256


@pytest.mark.parametrize("overrides", [WIDE, WIDE | {"tie_word_embeddings": False}, {"num_hidden_layers": 9}])
def test_file_in_four_bits_has_the_bytes_that_llama_cpp_makes(overrides, tmp_path):
    pytest.importorskip("libgguf", reason="needs libgguf: pip install 'sdft-ray[q4]'")
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs its quantiser: pip install llama-cpp-python")
    model = make_model(tmp_path, "llama", **overrides)
    load(model).half().float().save_pretrained(model)  # what float16 holds: it quantises that file
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    theirs, source = tmp_path / "theirs.gguf", str(write(model).file).encode()
    assert llama_cpp.llama_model_quantize(source, str(theirs).encode(), settings) == 0
    ours = library.GGUFReader(write(model, "q4_k_m").file)
    expected = {tensor.name: tensor for tensor in library.GGUFReader(theirs).tensors}
    assert {tensor.name: tensor.tensor_type for tensor in ours.tensors} == {
        name: tensor.tensor_type for name, tensor in expected.items()
    }
    for tensor in ours.tensors:
        assert np.array_equal(tensor.data, expected[tensor.name].data), tensor.name
    assert ours.fields["general.file_type"].contents() == library.LlamaFileType.MOSTLY_Q4_K_M


@pytest.mark.parametrize("form", ["f16", "int8"])
def test_disk_that_is_too_small_is_one_line_and_leaves_nothing(form, small_disk, tmp_path):
    model = make_model(tmp_path, "llama", hidden_size=512, intermediate_size=1536)
    with pytest.raises(StageFailed, match=rf"^{small_disk}: has .* MB left, and the weights take .* MB\. Make space"):
        exporting.write(model, small_disk, form, "tiny", Progress("export"))
    assert not [*small_disk.iterdir()]


def test_export_writes_under_the_root_and_prints_how_to_serve(tmp_path, capsys):
    model, root = make_model(tmp_path, "llama"), tmp_path / "root"
    assert cli.main(["export", str(model), "--format", "q8_0", "--root", str(root)]) == 0
    file = root / "exports" / "llama-q8_0.gguf"
    first, *serve = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{file}: 0.2 MB, 56 tensors, read back and within 0.003")
    assert serve == [
        f"llama-server --model {file} --ctx-size 2048 --jinja",
        f"vllm serve {model}  # the directory itself",
    ]
    assert cli.main(["export", str(model), "--out", str(tmp_path / "own.gguf"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(tmp_path / "own.gguf")
    assert cli.main(["export", str(root), "--root", str(root)]) == 2
    assert "is no Hugging Face model directory" in capsys.readouterr().err


@pytest.fixture
def llama_cpp():
    """A function that starts llama.cpp on a file and returns how to ask it: ask(path, **body)."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")

    def start(file: Path):
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads, settings.warmup = 256, 1, 1, False
        server = xllamacpp.Server(settings)

        def ask(path: str, **body) -> dict:
            request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        return ask

    return start


@pytest.mark.heavy
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_writes_the_text_of_transformers(variant, llama_cpp, tmp_path):
    model = prune(make_model(tmp_path, variant), tmp_path / "cut", (0, 2, 5))
    ask = llama_cpp(write(model).file)
    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": "What is 12 + 3 at 4.5?\n\n\tIt's ünï 日本 🙂"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ask("/apply-template", messages=messages)["prompt"] == text
    ids = tokenizer(text).input_ids
    assert ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] == ids
    never_end = [[tokenizer.eos_token_id, False]]
    answer = ask("/completion", prompt=ids, n_predict=16, temperature=0, return_tokens=True, logit_bias=never_end)
    (expected,) = generated_by(load(model), torch.tensor([ids]), use_cache=True)
    assert answer["tokens"] == expected[len(ids) :]


@pytest.mark.heavy
def test_llama_cpp_computes_with_the_four_bits_that_are_read_back(llama_cpp, tmp_path):
    pytest.importorskip("libgguf", reason="needs libgguf: pip install 'sdft-ray[q4]'")
    model = make_model(tmp_path, "llama", **WIDE)
    exporting.write(model, tmp_path, "q4_k_m", "tiny", Progress("export"))
    ids = AutoTokenizer.from_pretrained(model)("What is 12 + 3?").input_ids
    ask = llama_cpp(tmp_path / "model-q4_k_m.gguf")
    (first,) = ask("/completion", prompt=ids, n_predict=1, n_probs=300)["completion_probabilities"]
    theirs = {token["id"]: token["logprob"] for token in first["top_logprobs"]}

    def divergence(other) -> float:
        with torch.inference_mode():
            odds = other(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        return sum(odds[i].exp().item() * (odds[i].item() - odds_there) for i, odds_there in theirs.items())

    # llama.cpp also rounds what goes into a matrix, which a model of random weights makes much of.
    assert divergence(exporting.load_exported(tmp_path, "float32")) < 0.1
    assert divergence(load(model)) > 1
