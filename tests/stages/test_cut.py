"""The pruned model against an independent oracle: the base model, told by hooks to skip the same blocks."""

import json
import shutil

import pytest
import torch
import yaml
from architectures import BLOCKS, REMOVED, VARIANTS, blocks_of, generated_by, is_tied, load, logits_of, prune, some_ids
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

from sdft_ray.core.surgery import PER_BLOCK
from sdft_ray.errors import UserError
from sdft_ray.models.directory import require_loadable
from sdft_ray.models.sizes import sizes_of_directory
from sdft_ray.progress import Progress
from sdft_ray.report.lines import cut_line
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.pruning import Protect, Prune, Target
from sdft_ray.stages import Work
from sdft_ray.stages.cut import Parameters, build, model_card, remove_blocks, require_same_tensors, stage
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

pytestmark = pytest.mark.heavy

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: "-".join([v[0], *v[1]]))
def base(request, tmp_path_factory):
    architecture, overrides = request.param
    return make_tiny_model(tmp_path_factory.mktemp("base") / "model", architecture, **overrides)


@pytest.fixture(scope="module")
def base_model(base):
    return load(base)


@pytest.fixture(scope="module", params=REMOVED.values(), ids=REMOVED)
def removed(request):
    return request.param


@pytest.fixture(scope="module")
def cut(base, removed, tmp_path_factory):
    return prune(base, tmp_path_factory.mktemp("cut") / "model", removed)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("llama") / "model")


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def test_remove_blocks_computes_what_the_base_does_that_skips_the_blocks(base_model, cut, removed):
    ids = some_ids()
    expected = logits_of(base_model, ids, skipped=removed)
    assert (expected - logits_of(base_model, ids)).abs().max() > 1e-2, "the skipped blocks matter"
    torch.testing.assert_close(logits_of(load(cut), ids), expected, atol=1e-5, rtol=1e-5)


def test_remove_blocks_leaves_a_directory_that_loads_strictly_and_renumbers_blocks(cut, removed):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(cut, output_loading_info=True)
    assert not any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    blocks = blocks_of(model)
    assert len(blocks) == BLOCKS - len(removed)
    for number, block in enumerate(blocks):
        known = {getattr(module, "layer_idx", None) for module in block.modules()}  # hunyuan's MLP has none
        assert known - {None} <= {number}
    assert require_loadable(cut) == model.num_parameters()
    assert is_tied(model) == model.config.tie_word_embeddings


def test_remove_blocks_keeps_the_kind_of_each_block_that_stays(base_model, cut, removed):
    before, after = base_model.config.to_dict(), config_of(cut)
    assert after["num_hidden_layers"] == BLOCKS - len(removed)
    for key in set(PER_BLOCK) & before.keys():
        if before[key] is not None:
            assert after[key] == [entry for block, entry in enumerate(before[key]) if block not in removed]
    patterns = {key: value for key, value in after.items() if key.endswith(("_pattern", "_interval"))}
    assert set(patterns.values()) <= {1}, "no pattern by position stays"


def test_remove_blocks_generates_the_same_with_and_without_cache(base, tmp_path):
    model, ids = load(prune(base, tmp_path / "cut", (0, 2, 5))), some_ids()
    assert generated_by(model, ids, use_cache=True) == generated_by(model, ids, use_cache=False)


@pytest.mark.parametrize("removed", [[1], [0, 1, 2, 3, 4], [1, 2, 3, 4, 5]], ids=["one", "but-last", "but-first"])
def test_remove_blocks_of_one_or_of_all_but_one_is_right(llama, tmp_path, removed):
    expected = logits_of(load(llama), some_ids(), skipped=removed)
    found = logits_of(load(prune(llama, tmp_path / "cut", removed)), some_ids())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# What config.json of a model that is older than `layer_types` says in its place.
OLDER = {
    "cohere2": {"sliding_window_pattern": 3},
    "exaone4": {"sliding_window_pattern": 3},
    "gemma2": {},
    "gemma3_text": {"sliding_window_pattern": 3},
    "gpt_oss": {},
    "lfm2": {"full_attn_idxs": [1, 4]},
    "llama4_text": {"no_rope_layer_interval": 2},
    "olmo3": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_5_text": {"full_attention_interval": 2},
    "qwen3_next": {"full_attention_interval": 2},
    "smollm3": {"no_rope_layer_interval": 2},
}


@pytest.mark.parametrize("architecture", OLDER)
def test_remove_blocks_of_a_config_without_per_block_lists_writes_them_out(architecture, tmp_path):
    windowed = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
    overrides = windowed if architecture in ("qwen2", "qwen3") else {}
    base = make_tiny_model(tmp_path / "base", architecture, **overrides)
    whole = config_of(prune(base, tmp_path / "whole", (0, 2)))
    gone = (*PER_BLOCK, "_sliding_window_pattern", "moe_layers")
    config = {key: value for key, value in config_of(base).items() if key not in gone}
    (base / "config.json").write_text(json.dumps(config | OLDER[architecture]))
    older = prune(base, tmp_path / "older", (0, 2))
    assert config_of(older) == whole
    assert any(len(set(whole[key])) == 2 for key in PER_BLOCK if key in whole), "blocks of two kinds stay"
    expected = logits_of(load(base), some_ids(), skipped=(0, 2))
    torch.testing.assert_close(logits_of(load(older), some_ids()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "fields", "gone", "older"),
    [
        ("nemotron_h", {}, "layers_block_type", {"hybrid_override_pattern": "M*-E*M", "num_hidden_layers": 6}),
        ("olmo_hybrid", {"layer_types": None}, "layer_types", {}),
        ("glm4_moe", {"first_k_dense_replace": 1}, "first_k_dense_replace", {}),
        ("llama4_text", {}, "no_rope_layers", {"no_rope_layers": []}),
    ],
)
def test_remove_blocks_writes_out_what_published_configs_leave_to_their_class(
    architecture, fields, gone, older, tmp_path
):
    base = make_tiny_model(tmp_path / "base", architecture, **fields)
    config = config_of(base)
    config.pop(gone)
    (base / "config.json").write_text(json.dumps(config | older))
    cut = prune(base, tmp_path / "cut", (0, 2, 5))
    expected = logits_of(load(base), some_ids(), skipped=(0, 2, 5))
    torch.testing.assert_close(logits_of(load(cut), some_ids()), expected, atol=1e-5, rtol=1e-5)
    assert config_of(cut).get("hybrid_override_pattern") in (None, "*E*")


def test_remove_blocks_drops_heads_that_predict_further_tokens(tmp_path):
    base = make_tiny_model(tmp_path / "base", "glm4_moe", num_mtp_layers=1)
    weights = load_file(base / "model.safetensors")
    extra = {f"model.layers.{BLOCKS}.eh_proj.weight": torch.ones(64, 128), "mtp.fc.weight": torch.ones(64, 128)}
    save_file(weights | extra, base / "model.safetensors", metadata={"format": "pt"})
    cut = prune(base, tmp_path / "cut", (1, 4))
    assert not [name for name in load_file(cut / "model.safetensors") if "eh_proj" in name or "mtp" in name]
    assert config_of(cut)["num_nextn_predict_layers"] == 0
    expected = logits_of(load(base), some_ids(), skipped=(1, 4))
    torch.testing.assert_close(logits_of(load(cut), some_ids()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "removed", "line"),
    [
        ("qwen3_5_text", (1, 3, 5), "prune.blocks: the cut leaves no block of attention: the base has 1, 3, 5"),
        ("nemotron_h", (1, 4), "prune.blocks: the cut leaves no block of attention: the base has 1, 4"),
        ("gemma4_text", (3, 4, 5), "prune.blocks: the last block would be 2, of sliding_attention"),
    ],
)
def test_remove_blocks_that_a_hybrid_cannot_be_without_is_refused(architecture, removed, line, tmp_path):
    base = make_tiny_model(tmp_path / "base", architecture)
    with pytest.raises(UserError, match=line):
        prune(base, tmp_path / "cut", removed)
    assert not list((tmp_path / "cut").iterdir())


@pytest.mark.parametrize("fields", [{"hidden_size_per_layer_input": 8}, {"num_kv_shared_layers": 2}])
def test_remove_blocks_of_a_gemma4_whose_blocks_share_tensors_is_refused(fields, tmp_path):
    base = make_tiny_model(tmp_path / "base", "gemma4_text", **fields)
    with pytest.raises(UserError, match=f"its blocks share tensors, or keys and values .{next(iter(fields))} is"):
        prune(base, tmp_path / "cut", (1,))


def test_remove_blocks_keeps_tokenizer_template_and_generation_config(llama, tmp_path):
    from transformers import AutoTokenizer

    directory = prune(llama, tmp_path / "cut", [0])
    assert (directory / "generation_config.json").read_bytes() == (llama / "generation_config.json").read_bytes()
    messages = [{"role": "user", "content": "2 + 2?"}]
    before, after = (
        AutoTokenizer.from_pretrained(path).apply_chat_template(messages, return_dict=False)
        for path in (llama, directory)
    )
    assert before == after


def test_remove_blocks_does_not_touch_the_base(llama, tmp_path):
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    prune(llama, tmp_path / "cut", range(2, 5))
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before


@pytest.mark.parametrize("removed", [range(0, 2), range(3, 6), (1, 4)])
def test_remove_blocks_of_a_sharded_base_is_that_of_a_whole_one(llama, tmp_path, removed):
    sharded = tmp_path / "sharded"
    shutil.copytree(llama, sharded)
    (sharded / "model.safetensors").unlink()
    load(llama).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    directory = prune(sharded, tmp_path / "cut", removed)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    held = {path.name: load_file(path) for path in directory.glob("*.safetensors")}
    assert index["weight_map"] == {name: shard for shard, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in held.values() for t in tensors.values())
    assert require_loadable(directory) > 0
    whole = prune(llama, tmp_path / "whole", removed)
    assert torch.equal(logits_of(load(directory), some_ids()), logits_of(load(whole), some_ids()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_remove_blocks_copies_weights_bit_by_bit(llama, tmp_path, dtype):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    kept = load_file(prune(base, tmp_path / "cut", range(2)) / "model.safetensors")
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
    directory = prune(llama, tmp_path / "cut", [1])
    weights = load_file(directory / "model.safetensors")
    spoil(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=name):
        require_loadable(directory)


def test_remove_blocks_of_a_damaged_base_names_the_file_and_leaves_no_model(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"{path}: is damaged: its header describes"):
        prune(base, tmp_path / "cut", [1])
    assert not list((tmp_path / "cut").iterdir())


@pytest.mark.parametrize(("blocks", "line"), [(5, "have 6 blocks named"), (7, "have 6 blocks named")])
def test_remove_blocks_of_a_base_whose_weights_have_other_blocks_than_its_config_is_refused(
    llama, tmp_path, blocks, line
):
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config_of(base) | {"num_hidden_layers": blocks}))
    with pytest.raises(UserError, match=f"{line} model.layers.N, its config.json has {blocks}"):
        prune(base, tmp_path / "cut", [1])


@pytest.mark.parametrize("removed", [[6], [0, 7], [-1], [], range(6), [2, 1]])
def test_remove_blocks_that_are_not_there_is_refused(llama, tmp_path, removed):
    with pytest.raises(UserError):
        prune(llama, tmp_path / "cut", removed)
    assert not list((tmp_path / "cut").iterdir())


def test_remove_blocks_of_a_base_that_lacks_a_tensor_names_it(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    _drop(weights)
    save_file(weights, base / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        prune(base, tmp_path / "cut", [3])


def test_remove_blocks_counts_the_parameters_before_and_after(llama, tmp_path):
    (tmp_path / "cut").mkdir()
    counted = remove_blocks(llama, tmp_path / "cut", [1, 4])
    assert counted == (load(llama).num_parameters(), load(tmp_path / "cut").num_parameters())


def test_remove_blocks_of_an_old_checkpoint_leaves_its_rotary_buffers_and_head_copy_right(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16) for i in range(BLOCKS)}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors")
    found = logits_of(load(prune(base, tmp_path / "cut", [1, 2])), some_ids())
    torch.testing.assert_close(found, logits_of(load(llama), some_ids(), skipped=[1, 2]), atol=1e-5, rtol=1e-5)


def test_remove_blocks_of_an_old_checkpoint_of_gpt_neox_leaves_its_masks_out(tmp_path):
    base = make_tiny_model(tmp_path / "base", "gpt_neox")
    sizes, weights = sizes_of_directory(base), load_file(base / "model.safetensors")
    for block in range(BLOCKS):
        name = f"gpt_neox.layers.{block}.attention"
        weights |= {f"{name}.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool), f"{name}.masked_bias": torch.ones(())}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert sizes_of_directory(base) == sizes
    (tmp_path / "cut").mkdir()
    assert remove_blocks(base, tmp_path / "cut", [1, 2]).after == sizes.total - sum(sizes.blocks[1:3])


def _alter(weights):
    weights["model.layers.2.mlp.up_proj.weight"][-1, -1] += 1


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (_drop, "layers.1.mlp.up_proj.weight is missing"),
        (_add, "layers.7.mlp.up_proj.weight is surplus"),
        (_reshape, "model.norm.weight differs from the base's"),
        (_alter, "model.layers.2.mlp.up_proj.weight differs from the base's"),
    ],
)
def test_require_same_tensors_names_the_first_that_is_not_the_bases(llama, tmp_path, spoil, line):
    directory = prune(llama, tmp_path / "cut", [1, 4])
    require_same_tensors(llama, directory, [1, 4])
    weights = load_file(directory / "model.safetensors")
    spoil(weights)
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(RuntimeError, match=line):
        require_same_tensors(llama, directory, [1, 4])


def test_remove_blocks_copies_what_belongs_to_a_model_and_no_model_card(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    for name in ("README.md", "LICENSE.txt", "additional_chat_templates/tools.jinja", "pytorch_model.bin"):
        (base / name).write_text(name)
    directory = prune(base, tmp_path / "cut", [1])
    left = {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}
    kept = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert left - kept == {"README.md", "pytorch_model.bin"}


def test_remove_blocks_writes_a_tokenizer_and_stops_that_older_tools_read(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 0}')
    directory = prune(base, tmp_path / "cut", [1])
    generation, tokenizer = (
        json.loads((directory / name).read_text()) for name in ("generation_config.json", "tokenizer_config.json")
    )
    assert generation == {"temperature": 0.6, "eos_token_id": [0, 2]}
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def cut_of(prune, base, root):
    """Return the work of the cut stage that needs nothing but a base, and its summary."""
    made = stage(prune, Stage("model", "llama", 1, {}, location=base), None, None)
    work = Work(made, Storage(str(root)), Compute(), Progress("cut", "parts"))
    return work, build(work)


def test_cut_of_named_blocks_is_the_base_that_skips_them_and_says_who_named_them(llama, tmp_path):
    work, summary = cut_of(Prune(remove=(4, 1, 2)), llama, tmp_path)
    assert (summary.removed, summary.blocks, summary.cost) == ((1, 2, 4), 3, None)
    ids = some_ids()
    expected = logits_of(load(llama), ids, skipped=(1, 2, 4))
    torch.testing.assert_close(logits_of(load(work.directory), ids), expected, atol=1e-4, rtol=1e-4)
    assert "| named by | the recipe |" in (work.directory / "README.md").read_text()
    assert cut_line(summary) == "Cut: blocks 1, 2, 4, named by the recipe."


@pytest.mark.parametrize(
    ("prune", "removed"),
    [
        ({"blocks": 2}, (4, 5)),
        ({"blocks": 3, "protect": Protect(first=1, last=2)}, (1, 2, 3)),
        ({"target": Target(parameters=150_000)}, (4, 5)),
        ({"target": Target(parameters=150_000), "protect": Protect(last=1)}, (3, 4)),
    ],
)
def test_cut_by_tail_removes_the_last_blocks_before_the_protected_ones(llama, tmp_path, prune, removed, capsys):
    work, summary = cut_of(Prune(metric="tail", **prune), llama, tmp_path)
    assert (summary.removed, summary.metric, summary.cost) == (removed, "tail", None)
    assert summary.parameters == require_loadable(work.directory)
    assert "| metric | tail, the last ones |" in (work.directory / "README.md").read_text()
    said = f"cut: 2 of 6 blocks go, and {summary.parameters:,} parameters are left of 150,000"
    assert (said in capsys.readouterr().err) == ("target" in prune)
    assert ("150,000 parameters or less" in cut_line(summary)) == ("target" in prune)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "llama"])
def test_cut_to_a_size_is_the_shallowest_of_the_last_blocks_that_is_small_enough(architecture, tmp_path):
    base = make_tiny_model(tmp_path / "base", architecture)
    sizes = sizes_of_directory(base)
    for depth in range(1, 6):
        left = sizes.total - sum(sizes.blocks[6 - depth :])
        for spare in (0, 1, min(sizes.blocks) - 1):
            _, summary = cut_of(
                Prune(metric="tail", target=Target(parameters=left + spare)), base, tmp_path / f"{depth}-{spare}"
            )
            assert len(summary.removed) == depth
            assert summary.parameters == left


@pytest.mark.parametrize("removed", [(0, 6), range(6)])
def test_cut_of_named_blocks_that_are_not_there_is_refused(llama, tmp_path, removed):
    with pytest.raises(UserError, match=r"^prune\.remove: (6 is no|removes every) block of a 6-block model\. "):
        cut_of(Prune(remove=tuple(removed)), llama, tmp_path)


def test_model_card_says_what_was_removed_how_and_that_quality_is_not_restored():
    from huggingface_hub import ModelCard

    prune = {"blocks": 2, "metric": "angular", "protect": {"first": 1, "last": 0}}
    chosen = {"metric": "angular", "agreement": 0.93}
    text = model_card("SmolLM2", 30, [9, 10], Parameters(134_515_008, 127_435_392), chosen, prune, "org/SmolLM2")
    card = ModelCard(text)
    assert (card.data.base_model, card.data.library_name) == ("org/SmolLM2", "transformers")
    assert "# SmolLM2 without blocks [9, 11)" in card.text
    assert "| blocks | 30 | 28 |" in card.text and "| parameters | 134,515,008 | 127,435,392 |" in card.text
    assert "| agreement | 0.93 |" in card.text and "not restored" in card.text
    assert yaml.safe_load(card.text.split("```")[1].removeprefix("yaml")) == {"prune": prune}


def test_model_card_of_a_base_that_is_on_no_hub_names_none():
    text = model_card("mine", 6, [1, 4], Parameters(10, 8), {}, {"blocks": 2})
    assert "base_model" not in text and "without blocks 1, 4" in text
