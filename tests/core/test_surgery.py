import pytest

from sdft_ray.core.surgery import (
    ARCHITECTURES,
    prune_config,
    rename_tensor,
    require_removable,
    require_span,
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


def test_prune_config_writes_both_rope_spellings():
    pruned = prune_config(CONFIG | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, [0])
    assert pruned["rope_theta"] == pruned["rope_parameters"]["rope_theta"] == 5e5


def test_prune_config_refuses_a_per_block_list_it_does_not_know():
    with pytest.raises(UserError, match="heads_per_layer has one entry a block"):
        prune_config(CONFIG | {"heads_per_layer": [1, 2, 3, 4]}, [0])


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (-1, 1), (2, 2), (3, 5)])
def test_require_span_outside_the_model_is_refused(start, stop):
    with pytest.raises(UserError):
        require_span(start, stop, 4)


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
    with pytest.raises(UserError, match="model: cannot prune a gpt_neox model"):
        require_supported("gpt_neox", "model")
