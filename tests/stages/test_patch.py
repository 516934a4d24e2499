"""The patch stage on tiny models: what it fits is what hooks see, and what it writes computes that."""

import pytest
import torch
from architectures import BLOCKS, VARIANTS, blocks_of, load, prune, some_ids
from tiny import make_tiny_model

from sdft_ray import pipeline
from sdft_ray.core.patch import Sums, require_foldable
from sdft_ray.data.calibration import Corpus, Text
from sdft_ray.errors import UserError
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.wording import validate
from sdft_ray.stages.patch import Summary, _fit, fit_patches, write_patched
from sdft_ray.store.storage import Storage
from sdft_ray.verify.checks import verify
from sdft_ray.verify.models import Model

pytestmark = pytest.mark.heavy

torch.set_num_threads(1)


def foldable(architecture: str) -> bool:
    try:
        require_foldable(architecture, 0)
    except UserError:
        return False
    return True


FOLDABLE = [variant for variant in VARIANTS if foldable(variant[0])]
REMOVED = (2, 3)


def states_of(directory, ids, block):
    """Return the residual stream behind a block (T, D)."""
    model, seen = load(directory), []

    def keep(_module, _args, output):
        seen.append((output[0] if isinstance(output, tuple) else output).reshape(-1, model.config.hidden_size))

    handle = blocks_of(model)[block].register_forward_hook(keep)
    with torch.inference_mode():
        model(input_ids=ids)
    handle.remove()
    return seen[0].double()


def make_corpus(seeds=range(12), name="made"):
    texts = [Text(some_ids(1, 24)[0].roll(seed).tolist()) for seed in seeds]
    return Corpus(name, "all", texts[:8], texts[8:], 0)


@pytest.mark.parametrize("variant", FOLDABLE, ids=lambda v: "-".join([v[0], *v[1]]))
def test_patched_model_adds_the_map_of_what_its_block_added(variant, tmp_path):
    architecture, overrides = variant
    base = make_tiny_model(tmp_path / "base", architecture, **overrides)
    require_added(base, architecture, REMOVED, tmp_path)


@pytest.mark.parametrize("latent", [None, 24])
def test_patch_behind_experts_is_their_last_projection_to_the_stream(latent, tmp_path):
    base = make_tiny_model(tmp_path / "base", "nemotron_h", moe_latent_size=latent)
    assert load(base).config.layers_block_type[3] == "moe"
    changed = require_added(base, "nemotron_h", (4,), tmp_path)
    assert any("fc2_latent_proj" in name for name in changed) == (latent is not None)
    assert any(".experts." in name for name in changed) == (latent is None)


def require_added(base, architecture, removed, tmp_path):
    """Compare what a patched block adds with the map of what it added, and return the names of changed tensors."""
    before = removed[0] - 1
    cut = prune(base, tmp_path / "cut", removed)
    source = torch.Generator().manual_seed(0)
    width = load(base).config.hidden_size
    patch = torch.randn(width, width, generator=source, dtype=torch.float64)
    (tmp_path / "patched").mkdir()
    changed = write_patched(cut, tmp_path / "patched", removed, {before: patch}, architecture)
    assert changed and all(f".layers.{before}." in name for name in changed)
    ids = some_ids(1, 24)
    model, added = load(cut), []
    layer = blocks_of(model)[before]
    # The last modules that add to the stream, by their names in transformers.
    names = ("shared_mlp", "block_sparse_moe", "mlp", "feed_forward", "mixer")
    mlps = [part for name in names if (part := getattr(layer, name, None)) is not None]
    scale = getattr(model.config, "residual_multiplier", 1.0)

    def keep(_module, _args, output):
        added.append(scale * (output[0] if isinstance(output, tuple) else output).reshape(-1, width).double())

    for mlp in mlps:
        mlp.register_forward_hook(keep)
    with torch.inference_mode():
        model(input_ids=ids)
    expected = states_of(cut, ids, before) - sum(added) + sum(added) @ patch
    torch.testing.assert_close(states_of(tmp_path / "patched", ids, before), expected, atol=2e-3, rtol=2e-3)
    return changed


def test_fit_brings_the_stream_nearer_to_what_was_removed(tmp_path):
    base = make_tiny_model(tmp_path / "base")
    cut = prune(base, tmp_path / "cut", REMOVED)
    corpus = make_corpus()
    *shares, (patches, maps) = fit_patches(lambda: base, "float32", "cpu", False, REMOVED, [corpus])
    assert len(shares) >= 12 and shares == sorted(shares)
    (patch,) = patches
    assert (patch.block, patch.tokens, patch.held_back_tokens) == (1, 8 * 24, 4 * 24)
    assert patch.error < patch.error_without
    assert patch.corpora["made"].model_dump() == pytest.approx({"patched": patch.error, "without": patch.error_without})
    (tmp_path / "patched").mkdir()
    changed = write_patched(cut, tmp_path / "patched", REMOVED, maps, "llama")
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    ids = torch.tensor([corpus.loss_texts[0].ids])
    wanted = states_of(base, ids, 3)
    gone, patched = (states_of(tmp_path / name, ids, 1) for name in ("cut", "patched"))
    assert (patched - wanted).square().sum() < (gone - wanted).square().sum()


@pytest.mark.parametrize(("names", "weight"), [(("one",), 0.01), (("one", "other"), 1e-6)])
def test_fit_of_one_corpus_keeps_a_pull_that_other_texts_bear(names, weight):
    source = torch.Generator().manual_seed(0)
    made, exact = (torch.randn(*shape, generator=source) for shape in ((64, 8), (8, 8)))
    sums = Sums.none(8)
    sums.add(made, made @ exact)  # held-back texts of the same kind want no pull at all
    patched, _ = _fit(1, names, [sums] * len(names), [sums] * len(names))
    assert patched.weight == weight


def test_fit_of_scattered_blocks_patches_each_gap(tmp_path):
    base = make_tiny_model(tmp_path / "base")
    removed = (1, BLOCKS - 2)
    *_, (patches, maps) = fit_patches(lambda: base, "float32", "cpu", False, removed, [make_corpus()])
    assert [patch.block for patch in patches] == [0, BLOCKS - 3] == sorted(maps)
    cut = prune(base, tmp_path / "cut", removed)
    (tmp_path / "patched").mkdir()
    changed = write_patched(cut, tmp_path / "patched", removed, maps, "llama")
    assert changed == [f"model.layers.{block}.mlp.down_proj.weight" for block in (0, BLOCKS - 4)]


@pytest.mark.parametrize("architecture", ["granitemoehybrid", "llama", "nemotron_h"])
def test_fit_of_a_streamed_base_is_that_of_one_that_is_whole(tmp_path, architecture):
    base = make_tiny_model(tmp_path / "base", architecture)
    corpora = [make_corpus(), make_corpus(range(20, 32), "other")]
    fits = [[*fit_patches(lambda: base, "float32", "cpu", way, (1, 3, 4), corpora)][-1] for way in (False, True)]
    (patches, maps), (others, streamed) = fits
    assert patches == others and all([*patch.corpora] == ["made", "other"] for patch in patches)
    for block in (0, 2):
        torch.testing.assert_close(streamed[block], maps[block], atol=1e-6, rtol=0)


def test_recipe_with_a_patch_trains_from_the_patched_model_and_verify_names_the_changed_tensor(ray_cluster, tmp_path):
    base = make_tiny_model(tmp_path / "base")
    (tmp_path / "texts.txt").write_text("\n\n".join(f"Some text about {i} and {i + 1}." for i in range(12)))
    recipe = validate(
        Recipe,
        {
            "model": {"path": str(base)},
            "rows": {"gym": "products", "limit": 90},
            "prune": {"blocks": 2, "protect": {"first": 1}, "patch": "linear"}
            | {"calibration": {"text": str(tmp_path / "texts.txt"), "limit": 8, "held_back": 4}},
            "evaluate": {"tasks": ["held_out"]},
        },
    )
    chain, storage = pipeline.chain(recipe), Storage(str(tmp_path / "root"))
    assert {chain.models[arm].inputs["model"].id for arm in ("sft", "distilled")} == {chain.models["patched"].id}
    made = [stage for stage in chain.in_order if stage.name in ("score", "loss", "cut", "patch")]
    pipeline.build(made, load_compute({"score": {"weights": "streamed"}}), storage)
    summary = Summary.of(chain.patched, storage)
    (patch,) = summary.patches
    assert patch.block == summary.removed[0] - 1 and patch.error <= patch.error_without
    assert summary.changed == (f"model.layers.{patch.block}.mlp.down_proj.weight",)
    directory = storage.fetch(chain.patched)
    checks = {check.check: check for check in verify(Model("patched", directory, base))}
    assert checks["base tensors"].status == "ok" and summary.changed[0] in checks["base tensors"].says
    assert (checks["base logits"].status, checks["base logits"].says) == (
        "skipped",
        "a patched model computes other logits",
    )
    assert {check.status for check in checks.values()} == {"ok", "skipped"}
