"""The loss with blocks skipped, against the whole model whose blocks are made to give back their input by hooks."""

import pytest
import torch
from architectures import logits_of
from tiny import make_tiny_model, make_tiny_rows

from sdft_ray.core.surgery import ARCHITECTURES
from sdft_ray.data.calibration import CorpusSettings
from sdft_ray.errors import UserError
from sdft_ray.progress import Progress
from sdft_ray.spec import compute
from sdft_ray.spec.recipe import Protect
from sdft_ray.stages import Work, cut, loss, score
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

torch.set_num_threads(1)

TEXTS = [list(range(10, 40)), [7, 7, 200], [100, 3, 50, 60, 61, 62, 63, 9], list(range(250, 200, -2))]
FIRST = [0, 1, 5, 20]
CANDIDATES = [[], [0, 1], [2, 3], [4, 5], [1], [0, 2, 5]]


def loss_alone(model, ids: list[int], first: int, removed: list[int]) -> torch.Tensor:
    logits, start = logits_of(model, torch.tensor([ids]), removed)[0], max(1, first)
    return torch.nn.functional.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_skipped_losses_equal_those_of_the_base_that_skips_by_hooks(architecture, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model", architecture)).eval()
    found = loss.skipped_losses(model, TEXTS, FIRST, CANDIDATES)
    assert found.shape == (len(TEXTS), len(CANDIDATES))
    for column, removed in enumerate(CANDIDATES):
        expected = torch.stack([loss_alone(model, *text, removed) for text in zip(TEXTS, FIRST, strict=True)])
        torch.testing.assert_close(found[:, column], expected, atol=1e-4, rtol=1e-4)
    assert (found[:, 0] - found[:, 1]).abs().max() > 1e-3, "skipped blocks matter"
    # The model is whole again.
    torch.testing.assert_close(loss.skipped_losses(model, TEXTS, FIRST, [[]])[:, 0], found[:, 0], atol=0, rtol=0)


CORPUS = CorpusSettings(name="sums", field="text", limit=10, held_back=5, max_tokens=40, positions="last")
SETTINGS = loss.Settings(
    dtype="float32", calibration=(CORPUS,), depth=2, contiguous=True, protect=Protect(), candidates=2
)


@pytest.fixture
def work(ray_cluster, tiny_model, tmp_path):
    """Return the loss stage's work on chat rows, its score being there already."""

    def make(**changes):
        storage = Storage(str(tmp_path))
        plan = compute.Compute(score=compute.Score(cpus=1, batch_size=4))
        inputs = {"model": Stage("model", "tiny", 1, {}, location=tiny_model), "rows_0": make_tiny_rows(storage)}
        settings = SETTINGS.model_copy(update=changes)
        measured = score.Settings(dtype=settings.dtype, calibration=settings.calibration)
        scored = Stage("score", "tiny", 1, measured, inputs)
        if storage.status(scored) != "done":
            summary = score.build(Work(scored, storage, plan, Progress("score", "texts")))
            storage.commit(scored, summary.plain(), 0.0)
        stage = Stage("loss", "tiny", 1, settings, inputs | {"score": scored})
        return Work(stage, storage, plan, Progress("loss", "texts"))

    return make


def test_loss_ranks_candidates_by_loss_beside_distance_and_influence(work):
    summary = loss.build(work())
    found = summary.candidates
    assert [c.loss for c in found] == sorted(c.loss for c in found)
    assert {1, 2} <= {c.distance_rank for c in found}, "the best two by distance"
    assert {1, 2} <= {c.influence_rank for c in found}, "and the best two by influence"
    assert summary.choice.blocks == found[0].blocks
    assert summary.choice.value == pytest.approx(found[0].loss)
    assert summary.base_loss > 0


def test_loss_of_two_corpora_keeps_the_losses_of_both(work, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"A text of its own, number {i}." for i in range(9)) + "\n\nX\n\nY")
    second = CORPUS.model_copy(update={"name": "sums-2", "path": str(texts)})
    found = loss.build(work(calibration=(CORPUS, second)))
    assert found.texts == {"sums": 5, "sums-2": 3}
    for candidate in found.candidates:
        assert candidate.loss == pytest.approx(sum(candidate.losses.values()) / 2)
        assert candidate.losses["sums"] != candidate.losses["sums-2"]


def test_loss_of_every_span_is_measured_where_more_candidates_are_asked_for_than_there_are(work):
    assert len(loss.build(work(candidates=99)).candidates) == 5
    protected = loss.build(work(candidates=99, protect=Protect(first=1, last=2))).candidates
    assert sorted(c.blocks[0] for c in protected) == [1, 2]


def test_loss_tries_what_influence_would_take_out_of_line(work):
    found = [c.blocks for c in loss.build(work(contiguous=False, depth=3)).candidates]
    measured = work(contiguous=False, depth=3)
    chosen = cut_choice(measured, metric="influence", contiguous=False, depth=3)
    assert chosen.blocks in found


def cut_choice(measured: Work, metric: str, **changes):
    """What the cut stage would remove after a loss stage."""
    common = {name: getattr(SETTINGS, name) for name in ("depth", "contiguous", "protect")}
    settings = cut.Settings(metric=metric, **common | changes)
    stage = Stage("cut", "tiny", 1, settings, {**measured.stage.inputs, "loss": measured.stage})
    return cut.choose_removed(Work(stage, measured.storage, measured.compute, measured.progress))


def test_cut_by_loss_removes_the_candidate_of_lowest_loss(work):
    measured = work()
    summary = loss.build(measured)
    measured.storage.commit(measured.stage, summary.plain(), 0.0)
    choice = cut_choice(measured, metric="loss")
    assert list(choice.blocks) == summary.plain()["choice"]["blocks"]
    by_distance = cut_choice(measured, metric="angular")
    assert by_distance.blocks == tuple(next(c.blocks for c in summary.candidates if c.distance_rank == 1))


def test_cut_of_more_blocks_than_protection_leaves_is_refused(work):
    with pytest.raises(
        UserError, match=r"^prune\.protect: leaves 3 of 6 blocks to remove 4 from\. Lower prune\.protect"
    ):
        cut_choice(work(), metric="angular", depth=4, protect=Protect(first=1, last=2))
