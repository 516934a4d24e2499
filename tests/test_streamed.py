"""A model of which one part at a time is in memory, against the one that transformers loads whole."""

from pathlib import Path

import pytest
import torch
from architectures import VARIANTS
from machine import anonymous_bytes
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from walks import measure_losses, measure_states

from sdft_ray.errors import UserError
from sdft_ray.models.streamed import open_walk
from sdft_ray.stages.score import on_disk

torch.set_num_threads(1)

TEXTS, FIRST = [list(range(10, 40)), [7, 7, 200]], [1, 1]
PROJECTED = {"word_embed_proj_dim": 32, "do_layer_norm_before": False}  # as opt-350m
SOME = [
    *(("llama", {"tie_word_embeddings": False}), ("opt", PROJECTED), ("qwen3_moe", {}), ("ernie4_5_moe", {})),
    *(("nemotron_h", {}), ("deepseek_v3", {})),
]


def same_tensors(directory: Path) -> None:
    """Compare every tensor in bfloat16, a part at a time, with those that transformers loads."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    walk = open_walk("AutoModelForCausalLM", directory, "bfloat16", "cpu", streamed=True)
    seen = {}
    for part in (walk.embeddings, walk.head, *walk.blocks):
        with walk.hold(part):
            seen |= {name: each for name, each in walk.model.named_parameters() if not each.is_meta}
    seen |= dict(walk.model.named_buffers())
    expected = dict(whole.named_parameters()) | dict(whole.named_buffers())
    assert seen.keys() == expected.keys()
    for name, tensor in expected.items():
        assert seen[name].dtype == tensor.dtype, name
        assert torch.equal(seen[name], tensor), name


@pytest.mark.parametrize(("architecture", "fields"), SOME, ids=lambda value: value if isinstance(value, str) else "")
def test_tensors_of_a_streamed_model_are_those_of_one_that_is_whole(tmp_path, architecture, fields):
    same_tensors(make_tiny_model(tmp_path, architecture, **fields))


@pytest.mark.full
def test_tensors_of_every_architecture_are_those_of_one_that_is_whole(tmp_path):
    for i, (architecture, fields) in enumerate(VARIANTS):
        same_tensors(make_tiny_model(tmp_path / str(i), architecture, **fields))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_of_a_streamed_model_are_those_of_one_that_is_whole(tmp_path, dtype):
    base = make_tiny_model(tmp_path, "opt", **PROJECTED)
    whole, streamed = (open_walk("AutoModelForCausalLM", base, dtype, "cpu", way) for way in (False, True))
    candidates = [[], [0], [5], [1, 3], [0, 1, 2, 3, 4]]
    found, expected = (measure_losses(walk, TEXTS, FIRST, candidates) for walk in (streamed, whole))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_a_streamed_model_holds_one_block_and_states(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 32, "head_dim": 32}
    sizes["num_hidden_layers"] = 3
    base = make_tiny_model(tmp_path, **sizes)
    model = load_file(base / "model.safetensors")
    save_file({name: each.bfloat16() for name, each in model.items()}, base / "model.safetensors", {"format": "pt"})
    block = sum(4 * each.numel() for name, each in model.items() if "layers.0." in name)
    del model
    before = anonymous_bytes()
    walk = open_walk("AutoModel", base, "float32", "cpu", streamed=True)
    held = []
    for each in walk.blocks:
        each.register_forward_hook(lambda *_: held.append(anonymous_bytes() - before))
    measure_states(walk, TEXTS, FIRST)
    assert len(held) == len(walk.blocks) and block > 50e6
    assert max(held) < block + 20e6


def test_a_model_without_one_of_its_tensors_is_refused_by_name(tmp_path):
    base = make_tiny_model(tmp_path)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    walk = open_walk("AutoModel", base, "float32", "cpu", streamed=True)
    with pytest.raises(
        UserError, match=rf"^{base}: has no layers\.3\.mlp\.up_proj\.weight\. Copy or download it again"
    ):
        measure_states(walk, TEXTS, FIRST)


def test_states_that_no_disk_holds_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(
        UserError, match=rf"^{tmp_path}: has no 4000000\.0 GB for the states .*\. Set TMPDIR to a larger"
    ):
        on_disk((10**6, 10**9), torch.float32)
    assert on_disk((3, 4), torch.bfloat16).zero_().shape == (3, 4) and not [*tmp_path.iterdir()]
