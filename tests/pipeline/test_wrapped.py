"""The whole chain on a model that also sees: its decoder is cut and tuned as a text model, and put back."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from architectures import load, logits_of, some_ids
from command import sdft
from safetensors.torch import load_file
from tiny import make_wrapped

from sdft_ray.models.parts import text_name


def write_recipe(folder: Path, architecture: str, address: str) -> None:
    make_wrapped(folder / "sees", architecture)
    sums = [{"q": f"What is {i} + {i}?", "a": f"{i} + {i} = {2 * i}"} for i in range(24)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (folder / "texts.txt").write_text("\n\n".join(f"Text number {i} about nothing much." for i in range(6)))
    rows = {"path": "sums.jsonl", "fields": {"prompt": "q", "response": "a"}, "answer": "number"}
    recipe = {
        "model": {"path": "sees", "part": "all"},
        "rows": rows | {"held_out": 4, "validation": 4},
        "prune": {"blocks": 2, "calibration": {"text": "texts.txt", "limit": 6, "max_tokens": 32}},
        "distill": {"max_new_tokens": 16, "dtype": "float32"},
        "train": {"global_batch_size": 8, "lr": 1e-3},
        "arms": {"distilled": {}},
        "evaluate": {"tasks": ["held_out"], "limit": 4, "max_new_tokens": 8, "dtype": "float32"},
    }
    compute = {
        "ray": {"address": address},
        "score": {"cpus": 1},
        "distill": {"cpus": 1, "engine": {"kv_cache_gib": 0.25, "max_num_seqs": 16}},
        "train": {"workers": 2, "cpus": 1, "micro_batch": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "compute.yaml").write_text(yaml.safe_dump(compute))


@pytest.mark.parametrize("architecture", ["gemma3", pytest.param("mistral3", marks=pytest.mark.full)])
def test_chain_of_a_model_that_also_sees_ends_in_one_that_does(architecture, ray_cluster, tmp_path):
    from transformers import AutoModelForImageTextToText

    write_recipe(tmp_path, architecture, ray_cluster)
    done = sdft("run", "recipe.yaml", "--compute", "compute.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [model["model"] for model in report["models"]] == ["base", "pruned", "distilled"]
    artifacts = tmp_path / "artifacts"
    (tuned,), (whole,), (pruned,) = (list((artifacts / stage).iterdir()) for stage in ("train", "whole", "cut"))
    seeing, info = AutoModelForImageTextToText.from_pretrained(whole, output_loading_info=True)
    assert not any(info.values())
    logits = [logits_of(model, some_ids()) for model in (seeing.eval(), load(tuned), load(pruned))]
    torch.testing.assert_close(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2], atol=1e-4), "tuned"
    was = load_file(tmp_path / "sees/model.safetensors")
    now = {name: tensor for file in whole.glob("*.safetensors") for name, tensor in load_file(file).items()}
    rest = {name for name in was if text_name(name) is None}
    assert rest and all(torch.equal(now[name], was[name]) for name in rest)
    verified = sdft("verify", "recipe.yaml", cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
