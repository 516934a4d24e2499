"""What else is done with a model of any supported architecture: it is planned, counted, given adapters and verified."""

import pytest
import torch
from architectures import prune
from tiny import make_tiny_model

from sdft_ray.core.surgery import ARCHITECTURES, BUFFERS
from sdft_ray.models.directory import describe_directory, stored_tensors
from sdft_ray.preflight.costs import shape_of_directory
from sdft_ray.report.collect import count_cost
from sdft_ray.spec.training import Train
from sdft_ray.stages.train.adapters import count_parameters, load_model, outline_model
from sdft_ray.verify.checks import verify
from sdft_ray.verify.models import Model

pytestmark = pytest.mark.heavy

torch.set_num_threads(1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_of_any_architecture_is_planned_counted_and_given_adapters(architecture, tmp_path):
    base = make_tiny_model(tmp_path / "base", architecture)
    assert describe_directory(base).architecture == architecture and describe_directory(base).blocks == 6
    stored = sum(
        tensor.elements
        for tensors in stored_tensors(base).values()
        for name, tensor in tensors.items()
        if not name.endswith(BUFFERS)
    )
    shape = shape_of_directory(base)
    assert (shape.blocks, shape.parameters, shape.width) == (6, stored, 64)
    assert count_cost(base, tokens=16).flops_per_token > 0
    trained, frozen = count_parameters(outline_model(base, Train()))
    assert 0 < trained < frozen
    model = load_model(str(base), Train())
    ids = torch.arange(3, 20)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    adapters = [
        parameter for name, parameter in model.named_parameters() if "lora_B" in name and parameter.requires_grad
    ]
    assert any(adapter.grad is not None and adapter.grad.abs().max() > 0 for adapter in adapters)


@pytest.mark.parametrize(
    "architecture", ["deepseek_v3", "falcon_h1", "gpt_neox", "lfm2", "nemotron_h", "opt", "qwen3_5_text"]
)
def test_cut_of_another_layout_or_kind_is_verified(architecture, tmp_path):
    base = make_tiny_model(tmp_path / "base", architecture)
    cut = prune(base, tmp_path / "cut", (0, 2, 5))
    found = {check.check: (check.status, check.says) for check in verify(Model("cut", cut, base))}
    assert {name for name, (status, _) in found.items() if status == "skipped"} == {"hashes", "vllm"}
    assert not [says for says in found.values() if says[0] == "FAILED"]
