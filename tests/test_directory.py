"""What is written beside a model's weights: the base's own files, readable for older tools, and where engines stop."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import make_tiny_model

from sdft_ray.core.rows import TrainingRow
from sdft_ray.models.companions import spell_tokenizer_for_older, write_companions
from sdft_ray.stages.train.tuned import require_same_logits

END = 2  # <|im_end|> of the tiny tokenizer
COMPANIONS = (
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
    *("spiece.model", "LICENSE", "License.md", "NOTICE.txt", "USE_POLICY.md", "additional_chat_templates/tools.jinja"),
)
LEFT_BEHIND = (
    *("README.md", "manifest.json", "pytorch_model.bin", "consolidated.safetensors", "model-q4.gguf", ".gitattributes"),
    *(
        "trainer_state.json",
        "training_args.bin",
        "losses.json",
        "adapter/adapter_config.json",
        "checkpoint-9/vocab.json",
    ),
)


@pytest.fixture
def base(tiny_model, tmp_path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "base")


def write(base: Path, *names: str) -> None:
    for name in names:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}" if name.endswith(".json") else f"{name}\r\n", newline="")


def companions_of(base: Path) -> Path:
    """Return a directory of a model made of `base`: config and companions, without weights."""
    directory = base.parent / "written"
    directory.mkdir()
    shutil.copyfile(base / "config.json", directory / "config.json")
    write_companions(base, directory)
    return directory


def change(path: Path, **fields) -> None:
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({key: value for key, value in (old | fields).items() if value is not None}))


def generation_of(directory: Path) -> dict:
    return json.loads((directory / "generation_config.json").read_text())


def test_write_companions_copies_what_belongs_to_a_model_byte_for_byte_and_nothing_else(base):
    write(base, *COMPANIONS, *LEFT_BEHIND)
    directory = companions_of(base)
    for name in (*COMPANIONS, "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (directory / name).read_bytes() == (base / name).read_bytes(), name
    assert not [name for name in (*LEFT_BEHIND, "model.safetensors") if (directory / name).exists()]


def test_write_companions_of_a_read_only_base_can_be_written_again(base):
    for path in base.iterdir():
        path.chmod(0o444)
    directory = companions_of(base)
    assert all(path.stat().st_mode & 0o200 for path in directory.iterdir())


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_write_companions_keeps_the_class_that_the_tokenizer_says(base, name):
    change(base / "tokenizer_config.json", tokenizer_class=name, custom="kept")
    path = companions_of(base) / "tokenizer_config.json"
    assert path.read_bytes() == (base / "tokenizer_config.json").read_bytes()


def test_write_companions_spells_a_tokenizer_of_transformers_5_as_4_reads_it(base):
    from transformers import AutoTokenizer

    change(base / "tokenizer_config.json", tokenizer_class="TokenizersBackend", extra_special_tokens=["<x>", "<y>"])
    directory = companions_of(base)
    written = json.loads((directory / "tokenizer_config.json").read_text())
    # transformers 4: no class TokenizersBackend, and extra_special_tokens is a mapping ('list' object has no .keys).
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<x>", "<y>"] and "extra_special_tokens" not in written
    before, after = (AutoTokenizer.from_pretrained(path) for path in (base, directory))
    text = "a<x>b <|im_end|>"
    assert before(text) == after(text) and before.all_special_tokens == after.all_special_tokens
    assert before.get_vocab() == after.get_vocab() and before.chat_template == after.chat_template


def test_spell_tokenizer_for_older_of_a_directory_without_settings_writes_none(tmp_path):
    spell_tokenizer_for_older(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 0}, {}, [0, END]),
        ({"eos_token_id": [0, 5]}, {}, [0, 5, END]),
        ({"eos_token_id": [0, END]}, {}, [0, END]),
        ({"eos_token_id": END}, {}, END),
        ({"eos_token_id": None}, {"eos_token_id": 0}, [0, END]),
        ({"eos_token_id": None}, {"eos_token_id": END}, [END]),
        ({"eos_token_id": None}, {"eos_token_id": None}, [END]),
    ],
)
def test_write_companions_adds_the_end_of_turn_to_the_stops_of_the_base(base, generation, config, expected):
    change(base / "generation_config.json", **generation)
    change(base / "config.json", **config)
    assert generation_of(companions_of(base))["eos_token_id"] == expected


def test_write_companions_of_a_base_without_generation_config_writes_what_its_config_says(base):
    from transformers import GenerationConfig

    (base / "generation_config.json").unlink()
    change(base / "config.json", eos_token_id=0, temperature=0.6, do_sample=True)
    directory = companions_of(base)
    assert "_from_model_config" not in generation_of(directory)
    read = GenerationConfig.from_pretrained(directory)
    assert (read.eos_token_id, read.pad_token_id, read.bos_token_id, read.temperature) == ([0, END], 0, 1, 0.6)


def test_write_companions_keeps_generation_values_that_transformers_refuses_to_save(base):
    from transformers import GenerationConfig

    (base / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    directory = companions_of(base)
    assert generation_of(directory) == {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [END]}
    read = GenerationConfig.from_pretrained(directory)
    with pytest.raises(ValueError, match="do_sample"):
        read.save_pretrained(directory)


def test_write_companions_stops_where_the_template_ends_a_turn_and_not_at_the_tokenizers_eos(tmp_path):
    """As Llama 3 says <|end_of_text|> in config.json, and <|eot_id|> ends its turns."""
    base = make_tiny_model(tmp_path / "base", eos_token_id=0)
    change(base / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert generation_of(companions_of(base))["eos_token_id"] == [0, END]


ROWS = [TrainingRow(list(range(3, 40)), 33), TrainingRow([50, 60, 70], 1)]


def trained_logits(model: Path, dtype: str):
    """Return what a forward pass over whole rows says at the positions before those with loss."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    with torch.no_grad():
        whole = [network(input_ids=torch.tensor([row.ids])).logits[0].float() for row in ROWS]
    return torch.cat([whole[0][32:36], whole[1][0:2]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_require_same_logits_of_the_same_model_says_how_far_they_are(tiny_model, dtype):
    assert require_same_logits(tiny_model, ROWS, trained_logits(tiny_model, dtype), dtype) <= 1e-6


def test_require_same_logits_in_bfloat16_allows_for_its_rounding_alone(tiny_model):
    assert 1e-4 < require_same_logits(tiny_model, ROWS, trained_logits(tiny_model, "float32"), "bfloat16") < 0.1


@pytest.mark.parametrize("factor", [1.001, 0.0, float("nan")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.5.mlp.down_proj.weight", "lm_head.weight"])
def test_require_same_logits_of_a_written_tensor_that_is_wrong_fails(tmp_path, name, factor):
    from safetensors.torch import load_file, save_file

    base = make_tiny_model(tmp_path, tie_word_embeddings=False)
    trained = trained_logits(base, "float32")
    tensors = load_file(base / "model.safetensors")
    tensors[name] = tensors[name] * factor
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=f"{base}: its logits are not those of the trained weights"):
        require_same_logits(base, ROWS, trained, "float32")


def test_require_same_logits_of_a_head_that_lost_its_own_weights_fails(tmp_path):
    """As an adapter on a tied head left it."""
    base = make_tiny_model(tmp_path, tie_word_embeddings=False)
    trained = trained_logits(base, "float32")
    change(base / "config.json", tie_word_embeddings=True)
    weights = base / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="relative difference 1"):
        require_same_logits(base, ROWS, trained, "bfloat16")
