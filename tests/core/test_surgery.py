from pathlib import Path

import pytest

from sdft_ray.core.surgery import (
    ARCHITECTURES,
    prune_config,
    rename_tensor,
    require_blocks,
    require_removable,
    require_supported,
)
from sdft_ray.errors import UserError

CONFIG = {"num_hidden_layers": 4, "eos_token_id": [1, 2, 3, 4], "tie_word_embeddings": True}


def test_rename_tensor_renumbers_what_follows_and_leaves_the_rest():
    names = [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    assert [rename_tensor(name, [1, 2]) for name in names] == names
    assert rename_tensor("model.layers.12.mlp.up_proj.weight", [1, 2]) == "model.layers.10.mlp.up_proj.weight"
    assert rename_tensor("model.layers.1.mlp.up_proj.weight", [1, 2]) is None


def test_rename_tensor_counts_the_removed_blocks_before_each():
    names = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(6)]
    kept = [rename_tensor(name, [0, 3, 4]) for name in names]
    assert kept == [None, names[0], names[1], None, None, names[2]]


def test_prune_config_slices_every_per_block_list_and_nothing_else():
    config = CONFIG | {"layer_types": ["a", "b", "c", "d"], "no_rope_layers": [1, 0, 1, 0], "max_window_layers": 4}
    pruned = prune_config(config, [1, 2])
    assert pruned["num_hidden_layers"] == 2
    assert pruned["layer_types"] == ["a", "d"]
    assert pruned["no_rope_layers"] == [1, 0]
    assert pruned["eos_token_id"] == [1, 2, 3, 4]
    assert pruned["max_window_layers"] == 2
    assert config["layer_types"] == ["a", "b", "c", "d"], "the given config is left as it was"


def test_prune_config_drops_the_pattern_that_a_list_was_computed_from():
    pruned = prune_config(CONFIG | {"layer_types": ["a", "a", "b", "a"], "sliding_window_pattern": 3}, [0])
    assert "sliding_window_pattern" not in pruned
    assert pruned["layer_types"] == ["a", "b", "a"]


def test_prune_config_refuses_a_pattern_by_position_alone():
    with pytest.raises(UserError, match="no_rope_layer_interval depends on a block's number"):
        prune_config(CONFIG | {"no_rope_layer_interval": 2}, [0])


@pytest.mark.parametrize(
    ("removed", "dense"),
    [([0], [0, 1]), ([1], [0, 1]), ([3], [0, 1, 2]), ([0, 3], [0, 1])],
)
def test_prune_config_keeps_each_block_dense_or_with_experts(removed, dense):
    pruned = prune_config(CONFIG | {"mlp_only_layers": [1], "decoder_sparse_step": 4}, removed)
    assert (pruned["mlp_only_layers"], pruned["decoder_sparse_step"]) == (dense, 1)


def test_prune_config_counts_the_blocks_before_the_first_window():
    assert prune_config(CONFIG | {"max_window_layers": 2}, [0, 3])["max_window_layers"] == 1
    assert prune_config(CONFIG | {"max_window_layers": 28}, [0, 3])["max_window_layers"] == 2


@pytest.mark.parametrize(("removed", "range_"), [([0], (0, 1)), ([1, 2], (2, 2)), ([3], (1, 2))])
def test_prune_config_keeps_the_range_of_blocks_with_experts(removed, range_):
    experts = {"moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1}
    pruned = prune_config(CONFIG | experts, removed)
    assert (pruned["moe_layer_start_index"], pruned["moe_layer_end_index"]) == range_


@pytest.mark.parametrize(
    ("removed", "range_"), [([0, 1], (1, 3, 2)), ([2, 3, 4, 5], (1, 1, 1)), ([0, 2, 4], (0, 2, 1))]
)
def test_prune_config_keeps_experts_in_every_second_block(removed, range_):
    experts = {"moe_layer_start_index": 0, "moe_layer_end_index": 5, "moe_layer_interval": 2}
    pruned = prune_config({"num_hidden_layers": 6} | experts, removed)
    assert tuple(pruned[f"moe_layer_{key}"] for key in ("start_index", "end_index", "interval")) == range_


def test_prune_config_refuses_experts_in_blocks_that_are_no_range():
    experts = {"moe_layer_start_index": 0, "moe_layer_end_index": 3, "moe_layer_interval": 2}
    with pytest.raises(UserError, match=r"blocks with experts would be \[0, 2\]"):
        prune_config(CONFIG | experts, [0])


@pytest.mark.parametrize(("removed", "step"), [([0, 1], 2), ([0], 0), ([0, 2], 1), ([1, 3], 3)])
def test_prune_config_says_which_blocks_have_experts_as_vllm_reads_it_where_it_can(removed, step):
    pruned = prune_config(CONFIG | {"moe_layers": [1, 3], "interleave_moe_layer_step": 2}, removed)
    assert pruned["interleave_moe_layer_step"] == step


def test_prune_config_counts_dense_blocks_and_drops_further_heads():
    pruned = prune_config(CONFIG | {"first_k_dense_replace": 3, "num_nextn_predict_layers": 1}, [0, 3])
    assert (pruned["first_k_dense_replace"], pruned["num_nextn_predict_layers"]) == (2, 0)


def test_prune_config_spells_scaled_rope_as_older_readers_do():
    rope = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    pruned = prune_config(CONFIG | {"rope_parameters": rope, "rope_scaling": None}, [0])
    assert pruned["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert pruned["rope_parameters"] == rope


def test_prune_config_spells_rope_by_kind_of_block_as_older_readers_do():
    rope = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    pruned = prune_config(CONFIG | {"rope_parameters": rope}, [0])
    assert (pruned["rope_theta"], pruned["rope_local_base_freq"]) == (1e6, 1e4)


def test_prune_config_writes_both_rope_spellings():
    pruned = prune_config(CONFIG | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, [0])
    assert pruned["rope_theta"] == pruned["rope_parameters"]["rope_theta"] == 5e5


def test_prune_config_refuses_a_per_block_list_it_does_not_know():
    with pytest.raises(UserError, match="heads_per_layer has one entry a block"):
        prune_config(CONFIG | {"heads_per_layer": [1, 2, 3, 4]}, [0])
    with pytest.raises(UserError, match="heads_per_layer has one entry a block"):  # before anything is measured
        names = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(4)]
        require_blocks(Path("base"), names, CONFIG | {"heads_per_layer": [1, 2, 3, 4]})


@pytest.mark.parametrize("removed", [[], [0, 1, 2, 3], [-1], [4], [2, 1], [1, 1]])
def test_require_removable_of_anything_but_some_distinct_blocks_in_order_is_refused(removed):
    with pytest.raises(UserError):
        require_removable(removed, 4)


@pytest.mark.parametrize("removed", [[0], [1, 3], range(1, 4)])
def test_require_removable_takes_any_set_that_leaves_a_block(removed):
    require_removable(removed, 4)


def test_require_supported_refuses_the_unproven_by_name():
    for architecture in ARCHITECTURES:
        require_supported(architecture, "model")
    with pytest.raises(UserError, match="model: cannot prune a gptj model: not proven to be right"):
        require_supported("gptj", "model")


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("gemma3n", "its blocks share keys and values"),
        ("jamba", "in a pattern that depends on position"),
        ("mamba", "without attention"),
        ("gemma3", "which model.part: text takes out"),
        ("qwen2_5_vl", "its language model is a part of a larger one"),
    ],
)
def test_require_supported_says_why_a_known_one_is_refused(architecture, reason):
    with pytest.raises(UserError, match=f"cannot prune a {architecture} model: .*{reason}"):
        require_supported(architecture, "model")
