"""The pruned model against an independent oracle: the base model, told by hooks to skip the same blocks."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

from sdft_ray.core.surgery import ARCHITECTURES
from sdft_ray.stages.cut import remove_blocks, require_loadable

torch.set_num_threads(1)

BLOCKS = 6
SPANS = [(0, 2), (2, 4), (4, 6), (1, 2), (0, 5)]
# Blocks that differ in kind, so that a wrong order of layer_types changes the result.
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
VARIANTS = [
    *((architecture, {}) for architecture in ARCHITECTURES),
    ("mistral", {"sliding_window": 4}),
    ("qwen2", WINDOWED),
    ("qwen3", WINDOWED),
    ("llama", {"tie_word_embeddings": False, "rope_theta": 5e5}),
]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: "-".join([v[0], *v[1]]))
def base(request, tmp_path_factory):
    architecture, overrides = request.param
    return make_tiny_model(tmp_path_factory.mktemp("base") / "model", architecture, **overrides)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("llama") / "model")


def load(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


def prune(base, directory, start, stop):
    directory.mkdir()
    remove_blocks(base, directory, range(start, stop))
    return directory


def some_ids(rows: int = 2, tokens: int = 24) -> torch.Tensor:
    return torch.randint(3, 250, (rows, tokens), generator=torch.Generator().manual_seed(1))


def logits_of(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@contextmanager
def skipping(model, start, stop):
    """Make blocks [start, stop) return their input."""

    def give_back_input(_module, args, kwargs, _output):
        return args[0] if args else kwargs["hidden_states"]

    hooks = [block.register_forward_hook(give_back_input, with_kwargs=True) for block in model.model.layers[start:stop]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(("start", "stop"), SPANS)
def test_remove_blocks_computes_what_the_base_does_that_skips_the_blocks(base, tmp_path, start, stop):
    model, ids = load(base), some_ids()
    whole = logits_of(model, ids)
    with skipping(model, start, stop):
        expected = logits_of(model, ids)
    assert (expected - whole).abs().max() > 1e-2, "the skipped blocks matter"
    found = logits_of(load(prune(base, tmp_path / "cut", start, stop)), ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_remove_blocks_generates_the_same_with_and_without_cache(base, tmp_path):
    model, ids = load(prune(base, tmp_path / "cut", 1, 4)), some_ids()
    with torch.inference_mode():
        made = [
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16,
                do_sample=False, use_cache=use_cache
            )
            for use_cache in (True, False)
        ]  # fmt: skip
    assert made[0].shape == (2, 40)
    assert made[0].tolist() == made[1].tolist()


def test_remove_blocks_leaves_a_directory_that_loads_strictly_and_renumbers_blocks(base, tmp_path):
    from transformers import AutoModelForCausalLM

    directory = prune(base, tmp_path / "cut", 1, 3)
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert [block.self_attn.layer_idx for block in model.model.layers] == list(range(BLOCKS - 2))
    assert require_loadable(directory) == model.num_parameters()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("start", "stop"), SPANS)
def test_remove_blocks_keeps_the_kind_of_each_block_that_stays(architecture, start, stop, tmp_path):
    base = make_tiny_model(tmp_path / "base", architecture, **WINDOWED)
    kinds = json.loads((base / "config.json").read_text())["layer_types"]
    assert len(set(kinds)) == 2, "the base has blocks of two kinds"
    config = json.loads((prune(base, tmp_path / "cut", start, stop) / "config.json").read_text())
    assert config["layer_types"] == kinds[:start] + kinds[stop:]
    assert config["num_hidden_layers"] == len(config["layer_types"])
    assert config["max_window_layers"] <= config["num_hidden_layers"]


def test_remove_blocks_keeps_tokenizer_template_and_generation_config(llama, tmp_path):
    from transformers import AutoTokenizer

    directory = prune(llama, tmp_path / "cut", 0, 1)
    assert (directory / "generation_config.json").read_bytes() == (llama / "generation_config.json").read_bytes()
    messages = [{"role": "user", "content": "2 + 2?"}]
    before, after = (
        AutoTokenizer.from_pretrained(path).apply_chat_template(messages, return_dict=False)
        for path in (llama, directory)
    )
    assert before == after


def test_remove_blocks_does_not_touch_the_base(llama, tmp_path):
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    prune(llama, tmp_path / "cut", 2, 5)
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (3, 6)])
def test_remove_blocks_of_a_sharded_base_is_that_of_a_whole_one(llama, tmp_path, start, stop):
    sharded = tmp_path / "sharded"
    shutil.copytree(llama, sharded)
    (sharded / "model.safetensors").unlink()
    load(llama).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    directory = prune(sharded, tmp_path / "cut", start, stop)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    held = {path.name: load_file(path) for path in directory.glob("*.safetensors")}
    assert index["weight_map"] == {name: shard for shard, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in held.values() for t in tensors.values())
    assert require_loadable(directory) > 0
    whole = prune(llama, tmp_path / "whole", start, stop)
    assert torch.equal(logits_of(load(directory), some_ids()), logits_of(load(whole), some_ids()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_remove_blocks_copies_weights_bit_by_bit(llama, tmp_path, dtype):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    kept = load_file(prune(base, tmp_path / "cut", 0, 2) / "model.safetensors")
    name = "model.layers.{}.mlp.up_proj.weight"
    for block in range(BLOCKS - 2):
        assert torch.equal(kept[name.format(block)], weights[name.format(block + 2)])
    assert {tensor.dtype for tensor in kept.values()} == {dtype}


def _drop(weights):
    weights.pop("model.layers.1.mlp.up_proj.weight")


def _add(weights):
    weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)


def _reshape(weights):
    weights["model.norm.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [(_drop, "layers.1.mlp.up_proj"), (_add, "layers.7.mlp.up_proj"), (_reshape, "model.norm")],
    ids=["missing", "surplus", "misshapen"],
)
def test_require_loadable_with_other_tensors_than_the_config_asks_for_names_one(llama, tmp_path, spoil, name):
    directory = prune(llama, tmp_path / "cut", 1, 2)
    weights = load_file(directory / "model.safetensors")
    spoil(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=name):
        require_loadable(directory)
