"""A GGUF file becomes the model that it holds, or none at all."""

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from tiny_gguf import make_tiny_gguf

from sdft_ray.errors import UserError
from sdft_ray.progress import Progress
from sdft_ray.spec import compute
from sdft_ray.spec.sources import LocalModel
from sdft_ray.stages import Work, model
from sdft_ray.store.storage import Storage


def make_work(root: Path, gguf: Path) -> Work:
    stage = model.stage(LocalModel(path=str(gguf)))
    return Work(stage, Storage(str(root)), compute.Compute(), Progress("model", "parts"))


def test_model_of_a_gguf_file_holds_its_tensors(tmp_path):
    gguf = make_tiny_gguf(tmp_path / "model.gguf")
    work = make_work(tmp_path, gguf)
    assert model.build(work).blocks == 3
    held, written = {t.name: t.data for t in GGUFReader(gguf).tensors}, load_file(work.directory / "model.safetensors")
    assert len(written) == len(held) == 29
    for ours, theirs in (("mlp.up_proj", "ffn_up"), ("self_attn.v_proj", "attn_v"), ("input_layernorm", "attn_norm")):
        for block in range(3):
            expected = torch.tensor(held[f"blk.{block}.{theirs}.weight"]).bfloat16()
            assert torch.equal(written[f"model.layers.{block}.{ours}.weight"], expected)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (
            {"without": ["blk.1.ffn_up.weight"]},
            r"has nothing for model\.layers\.1\.mlp\.up_proj\.weight \(1 tensors of",
        ),
        ({"without": ["output_norm.weight"]}, r"has nothing for model\.norm\.weight \(1 tensors"),
        ({"also": ["rope_freqs.weight"]}, r"holds rope_freqs\.weight, which transformers does not take \(1 such"),
        (
            {"also": ["blk.0.attn_q.bias", "x"]},
            r"holds blk\.0\.attn_q\.bias, which transformers does not take \(2 such",
        ),
    ],
    ids=["block", "norm", "rope", "bias"],
)
def test_model_of_a_gguf_file_that_does_not_match_is_refused_and_nothing_is_written(tmp_path, options, what):
    gguf = make_tiny_gguf(tmp_path / "model.gguf", **options)
    work = make_work(tmp_path, gguf)
    with pytest.raises(UserError, match=rf"^{gguf}: {what}"):
        model.build(work)
    assert not list(work.directory.glob("*.safetensors"))
