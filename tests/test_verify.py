"""`sdft verify`: what is right passes, and what is wrong is found and named, whatever wrote it."""

import json
import shutil

import pytest
import torch
from command import sdft as sdft_process
from recipes import write_recipe
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

from sdft_ray import cli, pipeline
from sdft_ray.spec.loading import load_recipe
from sdft_ray.stages.cut import remove_blocks
from sdft_ray.store.identity import Stage
from sdft_ray.store.manifest import write_manifest
from sdft_ray.store.storage import Storage
from sdft_ray.verify.agreement import NEAR_TIE, compare_tokens, compare_with_vllm
from sdft_ray.verify.checks import verify
from sdft_ray.verify.models import Model, find_models

pytestmark = pytest.mark.heavy

torch.set_num_threads(1)

REMOVED = (0, 2, 5)
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}


def prune(base, directory, removed=REMOVED):
    directory.mkdir(parents=True)
    remove_blocks(base, directory, removed)
    return directory


def verdicts(directory, base=None, **options):
    return {check.check: check for check in verify(Model("model", directory, base), **options)}


def failures(directory, base=None):
    return {name: check.says for name, check in verdicts(directory, base).items() if check.status == "FAILED"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base") / "model", "qwen3", **WINDOWED)


@pytest.fixture(scope="module")
def right(base, tmp_path_factory):
    return prune(base, tmp_path_factory.mktemp("right") / "model")


@pytest.fixture
def cut(right, tmp_path):
    """A right cut, to be spoiled."""
    shutil.copytree(right, tmp_path / "cut")
    return tmp_path / "cut"


@pytest.mark.parametrize("removed", [(1, 2), REMOVED], ids=["span", "scattered"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_moe"])
def test_verify_of_a_right_cut_is_ok_and_finds_out_which_blocks_are_gone(architecture, removed, tmp_path):
    base = make_tiny_model(tmp_path / "base", architecture)
    found = verdicts(prune(base, tmp_path / "cut", removed), base)
    skipped = {name: check.says for name, check in found.items() if check.status == "skipped"}
    assert skipped == {"hashes": "there is no manifest.json", "vllm": "not asked for: --vllm"}
    assert failures(tmp_path / "cut", base) == {}
    assert found["base tensors"].figures["removed"] == list(removed)
    assert found["base logits"].figures["max_abs_difference"] <= 1e-4
    assert found["cache"].figures["tokens"] == 8 * 16


def test_verify_calls_the_current_directory_by_its_name(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base)
    (model,) = find_models(".", None, Storage(str(tmp_path)))
    assert model.name == "model"


def test_verify_of_a_model_that_another_tool_cut_needs_no_metadata_of_ours(base, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in (0, 3, 4))
    for i, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = i
    model.config.num_hidden_layers, kinds = 3, model.config.layer_types
    model.config.layer_types = [kinds[i] for i in (0, 3, 4)]
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = verdicts(tmp_path, base)
    assert found["base tensors"].figures["removed"] == [1, 2, 5]
    assert failures(tmp_path, base) == {
        "config": "rope_theta is missing, rope_parameters has 10000.0: transformers 4 reads only the first"
    }


# --- sabotage -------------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj.weight"


def in_weights(change):
    def spoil(directory):
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    spoil.__name__ = change.__name__
    return spoil


def in_json(file, **fields):
    def spoil(directory):
        path = directory / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    spoil.__name__ = "_".join(["wrong", *fields])
    return spoil


@in_weights
def swap_blocks(weights):
    for name in [name for name in weights if name.startswith("model.layers.1.")]:
        other = name.replace(".1.", ".2.", 1)
        weights[name], weights[other] = weights[other], weights[name]


@in_weights
def alter_an_element(weights):
    weights[UP][3, 3] += 1e-6


@in_weights
def alter_the_norm(weights):
    weights["model.norm.weight"][0] += 1


@in_weights
def drop_a_tensor(weights):
    del weights[UP]


@in_weights
def add_a_tensor(weights):
    weights["model.layers.3.mlp.up_proj.weight"] = weights[UP].clone()


@in_weights
def add_another_head(weights):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1


@in_weights
def put_a_nan(weights):
    weights[UP][0, 0] = float("nan")


def enlarge_the_tokenizer(directory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(directory)


def add_a_control_token_that_is_never_written(directory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(directory)


def empty_the_vocabulary(directory):
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


def drop_the_template(directory):
    (directory / "chat_template.jinja").unlink()


def cut_a_file_short(directory):
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-100])


@pytest.mark.parametrize(
    ("spoil", "check", "says"),
    [
        (swap_blocks, "base tensors", "block 2 is the base's block 3, behind block 1, its block 4: out of order"),
        (alter_an_element, "base tensors", f"{UP} differs; block 1 is nearest to the base's block 3"),
        (alter_the_norm, "base tensors", "model.norm.weight differs from the base's"),
        (drop_a_tensor, "tensors", f"{UP} is missing"),
        (add_a_tensor, "tensors", "model.layers.3.mlp.up_proj.weight is not in the model"),
        (in_json("config.json", layer_types=["full_attention"] * 6), "config", "layer_types has 6 entries"),
        (in_json("config.json", layer_types=["sliding_attention"] * 3), "base config", "layer_types is ['sliding"),
        (in_json("config.json", sliding_window=5), "base config", "sliding_window is 5, expected 4"),
        (in_json("config.json", rope_theta=5e5), "config", "rope_theta is 500000.0, rope_parameters has 10000.0"),
        (add_another_head, "ties", "is true, but lm_head.weight differs from model.embed_tokens.weight"),
        (in_json("config.json", tie_word_embeddings=False), "ties", "is false, but there is no lm_head.weight"),
        (put_a_nan, "finite", f"{UP} has 1 values that are NaN or infinite"),
        (enlarge_the_tokenizer, "tokenizer", "token '<new>' has id 259, model.embed_tokens.weight has 259 rows"),
        (drop_the_template, "tokenizer", "there is no chat template"),
        (empty_the_vocabulary, "tokenizer", "the tokenizer does not give 'What is the capital of France?' back"),
        (in_json("generation_config.json", eos_token_id="2"), "tokenizer", 'by transformers (eos_token_id is "2")'),
        (in_json("generation_config.json", eos_token_id=[2, 999]), "tokenizer", "eos_token_id 999 is outside"),
        (cut_a_file_short, "tensors", "SafetensorError: "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_verify_of_a_spoiled_model_names_what_is_wrong(spoil, check, says, cut, base):
    assert failures(cut, base) == {}
    spoil(cut)
    assert says in failures(cut, base)[check]


def test_verify_takes_a_control_token_behind_the_embeddings_that_no_template_writes(cut, base):
    add_a_control_token_that_is_never_written(cut)
    assert failures(cut, base) == {}


def test_verify_of_an_index_that_lies_names_the_tensor(base, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, tmp_path / "base")
    cut = prune(tmp_path / "base", tmp_path / "cut")
    assert failures(cut, tmp_path / "base") == {}
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    index["weight_map"][UP] = next(name for name in index["weight_map"].values() if name != index["weight_map"][UP])
    (cut / "model.safetensors.index.json").write_text(json.dumps(index))
    assert failures(cut, tmp_path / "base")["tensors"].startswith(f"{UP} is in model-0")


def test_verify_against_a_base_that_it_is_not_of_says_that_nothing_matches(right, tmp_path):
    stranger = make_tiny_model(tmp_path / "stranger", "qwen3", **WINDOWED)
    weights = load_file(stranger / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, stranger / "model.safetensors", {"format": "pt"})
    says = failures(right, stranger)["base tensors"]
    assert says.startswith("no block equals any of the base's: block 0 differs in model.layers.0.")


def test_verify_of_a_nan_skips_what_would_compute_with_it(cut, base):
    put_a_nan(cut)
    found = verdicts(cut, base)
    assert (found["cache"].status, found["cache"].says) == ("skipped", "finite is not ok")
    assert (found["base logits"].status, found["base logits"].says) == ("skipped", "cache is not ok")


# --- bases with equal blocks ----------------------------------------------------------------------------------


def make_equal(base, directory, copies):
    """Write a base in which some blocks have the tensors of others."""
    shutil.copytree(base, directory)
    weights = load_file(directory / "model.safetensors")
    for to, source in copies.items():
        for name in [name for name in weights if name.startswith(f"model.layers.{source}.")]:
            weights[name.replace(f".{source}.", f".{to}.", 1)] = weights[name].clone()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


EQUAL = {"neighbours": {2: 1}, "distant": {4: 0}, "three": {2: 1, 3: 1}, "all": dict.fromkeys(range(1, 6), 0)}


@pytest.fixture(scope="module", params=EQUAL, ids=EQUAL)
def repetitive(request, tmp_path_factory):
    """A base without kinds of blocks, some of whose blocks are equal, bit by bit."""
    plain = make_tiny_model(tmp_path_factory.mktemp("plain") / "model")
    return make_equal(plain, tmp_path_factory.mktemp("equal") / "model", EQUAL[request.param])


@pytest.mark.parametrize("removed", [(2,), (0, 3), (1, 2), (2, 3, 4)], ids=str)
def test_right_cut_of_a_base_with_equal_blocks_is_ok_and_read_as_its_manifest_reads_it(removed, repetitive, tmp_path):
    cut = prune(repetitive, tmp_path / "cut", removed)
    assert failures(cut, repetitive) == {}
    write_manifest(cut, Stage("cut", "tiny", 1, {}), {"removed": list(removed)}, 0.0)
    found = verdicts(cut, repetitive)
    assert {check.says for check in found.values() if check.status == "FAILED"} == set()
    assert found["base tensors"].figures["removed"] == list(removed)


def test_cut_of_a_base_with_equal_blocks_says_that_it_can_be_read_in_several_ways(tmp_path):
    base = make_equal(make_tiny_model(tmp_path / "plain"), tmp_path / "base", {3: 2})
    found = verdicts(prune(base, tmp_path / "either", (2,)), base)["base tensors"]
    assert found.says.endswith("; blocks [3, 4) are removed, or equal ones")
    found = verdicts(prune(base, tmp_path / "both", (2, 3)), base)["base tensors"]
    assert found.says.endswith("; blocks [2, 4) are removed")


def test_manifest_that_the_bytes_do_not_allow_fails_on_a_base_with_equal_blocks(tmp_path):
    base = make_equal(make_tiny_model(tmp_path / "plain"), tmp_path / "base", {3: 2})
    cut = prune(base, tmp_path / "cut", (2,))
    for said in ([4], [2, 3], [], [2, 9]):
        write_manifest(cut, Stage("cut", "tiny", 1, {}), {"removed": said}, 0.0)
        assert failures(cut, base)["base tensors"].endswith(f" of the base are removed, the manifest has {said}")


def arrange(base, directory, order):
    """Write a model of the base's blocks in an order of one's own."""
    cut = prune(base, directory, range(len(order), 6))
    weights, whole = load_file(cut / "model.safetensors"), load_file(base / "model.safetensors")
    for name in [name for name in weights if name.startswith("model.layers.")]:
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        weights[name] = whole[f"model.layers.{order[int(number)]}.{rest}"].clone()
    save_file(weights, cut / "model.safetensors", metadata={"format": "pt"})
    return cut


@pytest.mark.parametrize(
    ("copies", "order", "says"),
    [
        ({2: 1}, (0, 2, 1, 4), None),  # equal blocks in each other's place are no other order
        ({4: 0}, (4, 1, 2), None),
        (dict.fromkeys(range(1, 6), 0), (5, 3, 3, 0, 1), None),
        ({2: 1}, (0, 1, 2, 4, 3), "block 4 is the base's block 3, behind block 3, its block 4: out of order"),
        ({4: 0}, (1, 0, 2, 3, 5), "block 2 is the base's block 2, behind block 1, its block 4: out of order"),
        ({2: 1}, (0, 1, 1, 1), "block 3 is the base's block 1 or 2, behind block 2, its block 2: out of order"),
        ({2: 1}, (1, 2, 0), "block 2 is the base's block 0, behind block 1, its block 2: out of order"),
    ],
    ids=str,
)
def test_order_of_blocks_is_judged_by_their_bytes_on_a_base_with_equal_blocks(copies, order, says, tmp_path):
    base = make_equal(make_tiny_model(tmp_path / "plain"), tmp_path / "base", copies)
    found = failures(arrange(base, tmp_path / "cut", order), base).get("base tensors")
    assert found is None if says is None else says in found


def test_altered_tensor_fails_on_a_base_with_equal_blocks(repetitive, tmp_path):
    cut = prune(repetitive, tmp_path / "cut", (3,))
    alter_an_element(cut)
    assert f"{UP} differs" in failures(cut, repetitive)["base tensors"]


@pytest.mark.parametrize("removed", [(2,), (3,)], ids=str)
def test_equal_blocks_of_different_kinds_are_told_apart_by_the_config(removed, base, tmp_path):
    whole = make_equal(base, tmp_path / "base", {3: 2})  # block 2 sees everything, block 3 a window
    cut = prune(whole, tmp_path / "cut", removed)
    found = verdicts(cut, whole)
    assert [check.says for check in found.values() if check.status == "FAILED"] == []
    assert found["base tensors"].figures["removed"] == list(removed)
    in_json("config.json", layer_types=["sliding_attention"] * 5)(cut)
    assert "layer_types is" in failures(cut, whole)["base config"]


# --- tokens of two engines ------------------------------------------------------------------------------------


def test_compare_tokens_tells_a_near_tie_from_a_difference():
    logits = torch.zeros(5, 9)  # after a prompt of 2 tokens, rows 1 to 3 choose 3 new ones
    logits[1, 4] = 1.0
    logits[2, 5], logits[2, 6] = 1.0, 1.0 - NEAR_TIE / 2
    logits[3, 7], logits[3, 8] = 1.0, 1.0 - NEAR_TIE * 2
    same = compare_tokens([[1, 2]], [[4, 5, 7]], [logits])
    assert (same.tokens, same.near_ties, same.differing) == (3, (), ())
    tie = compare_tokens([[1, 2]], [[4, 6, 7]], [logits])
    assert (len(tie.near_ties), tie.differing) == (1, ())
    assert tie.describe().startswith("2 of 3 greedy tokens the same, 1 at near-ties (token 1 of prompt 0 is 6, else 5")
    other = compare_tokens([[1, 2]], [[4, 5, 8]], [logits])
    assert (other.near_ties, len(other.differing)) == ((), 1)


def test_compare_with_vllm_of_a_right_cut_finds_no_difference(tiny_model, tmp_path):
    agreement = compare_with_vllm(prune(tiny_model, tmp_path / "cut", (1, 3)))
    assert agreement.tokens == 8 * 16
    assert agreement.differing == ()


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture
def root(base, tmp_path):
    """Artifacts as a run leaves them: a base and its cut."""
    whole = Stage("model", "tiny", 1, {"sha256": "a"})
    pruned = Stage("cut", "tiny-3", 1, {"blocks": 3}, {"model": whole})
    storage = Storage(str(tmp_path / "artifacts"))
    shutil.copytree(base, storage.place(whole))
    write_manifest(storage.place(whole), whole, {}, 0.0)
    write_manifest(prune(base, storage.place(pruned)), pruned, {"removed": list(REMOVED)}, 0.0)
    return storage, pruned


@pytest.fixture
def sdft(tmp_path, monkeypatch, capsys):
    """The command in this process, in the test's own directory; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return call


def results(out):
    return {check["check"]: check for check in json.loads(out)[0]["checks"]}


def test_command_verify_of_an_artifact_finds_its_base_and_checks_the_manifest(root, sdft, tmp_path):
    storage, pruned = root
    done = sdft_process("verify", pruned.id, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = results(done.stdout)
    assert {name for name, check in found.items() if check["status"] != "ok"} == {"vllm"}
    assert found["base tensors"]["figures"]["removed"] == list(REMOVED)
    config = storage.place(pruned) / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    code, out, error = sdft("verify", pruned.id)
    assert code == 1
    assert f"verify: failed: cut {pruned.id} (hashes)" in error
    assert "config.json" in out and "FAILED" in out


def test_command_verify_of_a_manifest_that_tells_of_other_blocks_fails(root, sdft):
    storage, pruned = root
    write_manifest(storage.place(pruned), pruned, {"removed": [0, 1, 2]}, 0.0)
    code, out, _ = sdft("verify", storage.place(pruned), "--json")
    assert code == 1
    says = results(out)["base tensors"]["says"]
    assert says == "blocks [0, 2, 5] of the base are removed, the manifest has [0, 1, 2]"


def test_command_verify_of_a_tuned_model_says_why_it_is_not_compared(right, base, sdft, tmp_path):
    shutil.copytree(right, tmp_path / "tuned")
    write_manifest(tmp_path / "tuned", Stage("train", "tiny", 1, {}), {}, 0.0)
    code, out, error = sdft("verify", "tuned", "--against", base, "--json")
    assert code == 0, error
    check = results(out)["base logits"]
    assert (check["status"], check["says"]) == ("skipped", "the weights of a `train` artifact are its own")


def test_command_verify_of_a_recipe_checks_the_models_that_are_built(base, sdft, tmp_path):
    write_recipe(tmp_path, base, prune={"blocks": 3})
    code, out, error = sdft("verify", "recipe.yaml")
    assert code == 2
    assert error.startswith("recipe.yaml: none of its models (pruned, sft, distilled) is built under ")
    pruned = pipeline.chain(load_recipe(tmp_path / "recipe.yaml")).models["pruned"]
    place = prune(base, Storage(str(tmp_path / "artifacts")).place(pruned))
    write_manifest(place, pruned, {"removed": list(REMOVED)}, 0.0)
    code, out, error = sdft("verify", "recipe.yaml", "--json")
    assert code == 0, error
    assert [(model["model"], model["base"]) for model in json.loads(out)] == [("pruned", str(base))]
    assert "sft: not built, so not verified" in error


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "nowhere: is no artifact under "),
        (["empty"], "empty/config.json: is no Hugging Face model directory. Check the path."),
        (["cut", "--against", "wide"], "wide: has hidden_size 128, expected 64. Give the model that cut was cut from."),
        (["cut", "--against", "llama"], "llama: has model_type llama, expected qwen3. Give the model that cut was"),
        (["cut", "--against", "short"], "short: has 2 blocks, expected 3 or more. Give the model that cut was cut"),
        (["recipe.yaml", "--against", "wide"], "--against: a recipe names its base itself. Leave --against out."),
        (["mamba"], "mamba: cannot prune a mamba model: "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_command_verify_of_what_cannot_be_verified_says_so_in_a_line(arguments, line, cut, sdft, tmp_path):
    (tmp_path / "empty").mkdir()
    config = json.loads((cut / "config.json").read_text())
    changes = {
        "wide": {"hidden_size": 128},
        "llama": {"model_type": "llama"},
        "short": {"num_hidden_layers": 2},
        "mamba": {"model_type": "mamba"},
    }
    for name, fields in changes.items():
        shutil.copytree(cut, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | fields))
    code, out, error = sdft("verify", *arguments)
    assert code == 2
    assert error.startswith(line)
    assert error.count("\n") == 1
    assert out == ""
