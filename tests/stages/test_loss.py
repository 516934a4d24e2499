"""The loss with blocks skipped, against the whole model whose blocks are made to give back their input by hooks."""

import pytest
import torch
from architectures import each_architecture, logits_of
from tiny import make_tiny_model, make_tiny_rows
from walks import measure_losses, result_of

from sdft_ray.core import skipping
from sdft_ray.core.passes import count_passes
from sdft_ray.core.skipping import skipped_losses
from sdft_ray.core.walking import Walk
from sdft_ray.data.calibration import CorpusSettings
from sdft_ray.errors import UserError
from sdft_ray.models.streamed import open_walk
from sdft_ray.progress import Progress
from sdft_ray.spec import compute
from sdft_ray.spec.pruning import Protect, Prune
from sdft_ray.stages import Work, cut, loss, score
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage
from sdft_ray.text_pool import read_texts

torch.set_num_threads(1)

TEXTS = [list(range(10, 40)), [7, 7, 200], [100, 3, 50, 60, 61, 62, 63, 9], list(range(250, 200, -2))]
FIRST = [0, 1, 5, 20]
CANDIDATES = [[], [0, 1], [2, 3], [4, 5], [1], [0, 2, 5]]


def loss_alone(model, ids: list[int], first: int, removed: list[int]) -> torch.Tensor:
    logits, start = logits_of(model, torch.tensor([ids]), removed)[0], max(1, first)
    return torch.nn.functional.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]))


@pytest.mark.heavy
@pytest.mark.parametrize("architecture", each_architecture())
def test_skipped_losses_equal_those_of_the_base_that_skips_by_hooks(architecture, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model", architecture)).eval()
    walk = Walk(model)
    found = measure_losses(walk, TEXTS, FIRST, CANDIDATES)
    assert found.shape == (len(TEXTS), len(CANDIDATES))
    for column, removed in enumerate(CANDIDATES):
        expected = torch.stack([loss_alone(model, *text, removed) for text in zip(TEXTS, FIRST, strict=True)])
        torch.testing.assert_close(found[:, column], expected, atol=1e-4, rtol=1e-4)
    assert (found[:, 0] - found[:, 1]).abs().max() > 1e-3, "skipped blocks matter"
    without = measure_losses(walk, TEXTS, FIRST, [[4], [], [0]], [1, 3])
    for column, removed in enumerate([[1, 3, 4], [1, 3], [0, 1, 3]]):
        expected = torch.stack([loss_alone(model, *text, removed) for text in zip(TEXTS, FIRST, strict=True)])
        torch.testing.assert_close(without[:, column], expected, atol=1e-4, rtol=1e-4)
    # Block by block from disk, in two batches.
    streamed = open_walk("AutoModelForCausalLM", tmp_path / "model", "float32", "cpu", streamed=True)
    texts = [*zip(TEXTS, FIRST, strict=True)]
    parts = result_of(skipped_losses(streamed, [texts[:2], texts[2:]], [[4], [], [0]], [1, 3]))
    torch.testing.assert_close(torch.cat(parts), without, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("texts", "expected"), [(1, [1, 1, 1, 1]), (3, [3, 1]), (9, [4])])
def test_losses_of_a_batch_hold_the_logits_of_some_texts_at_a_time(tmp_path, monkeypatch, texts, expected):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path)).eval()
    walk, made = Walk(model), []
    logits = walk.logits
    monkeypatch.setattr(walk, "logits", lambda *given: made.append(logits(*given)) or made[-1])
    monkeypatch.setattr(skipping, "_LOGITS", texts * len(TEXTS[0]) * model.config.vocab_size)
    found = measure_losses(walk, TEXTS, FIRST, [[1, 2]])
    alone = [loss_alone(model, *text, [1, 2]) for text in zip(TEXTS, FIRST, strict=True)]
    torch.testing.assert_close(found[:, 0], torch.stack(alone), atol=1e-4, rtol=1e-4)
    assert [each.shape for each in made] == [(count, len(TEXTS[0]), model.config.vocab_size) for count in expected]


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 2)])
def test_removing_one_after_the_other_runs_as_many_blocks_as_are_counted(tmp_path, first, last):
    from transformers import AutoModelForCausalLM

    walk = Walk(AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model")).eval())
    ran = []
    for number, block in enumerate(walk.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    gone: list[int] = []
    for taken in (3, 1):
        free = [[block] for block in range(first, 6 - last) if block not in gone]
        measure_losses(walk, TEXTS, FIRST, [[], *free], gone)
        gone.append(taken)
    assert len(ran) / 6 == pytest.approx(count_passes(6, 2, first, last).passes)


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


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """Let the stage measure in this process instead of on Ray; returns how many candidates each measurement had."""
    counts: list[int] = []

    def measure(actor, corpora, _section, _progress, streamed, **arguments):
        meter = actor(device="cpu", streamed=streamed, **arguments)
        counts.append(len(arguments["candidates"]) - 1)
        found = [[*meter([[text] for text in corpus])][-1] for corpus in corpora]
        return [{"loss": [each["loss"][0] for each in losses]} for losses in found]

    monkeypatch.setattr("sdft_ray.losses.measure", measure)
    return counts


@pytest.fixture
def greedy(tiny_model, tmp_path, measured):
    """Return the work of removing blocks one after the other on chat rows and on plain texts."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"A text of its own, number {i}." for i in range(9)))
    corpora = (CORPUS, CORPUS.model_copy(update={"name": "sums-2", "path": str(texts)}))

    def make(**prune):
        storage = Storage(str(tmp_path / "root"))
        base = Stage("model", "tiny", 1, {}, location=tiny_model)
        chosen = Prune(metric="loss", contiguous=False, **prune)
        stage = loss.stage(chosen, corpora, base, None, {"rows_0": make_tiny_rows(storage)})
        plan = compute.Compute(score=compute.Score(cpus=1, batch_size=4))
        return Work(stage, storage, plan, Progress("loss", "texts"))

    return make


def brute_force(work: Work, depth: int, free: range) -> tuple[list[int], list[float]]:
    """Return the blocks in the order of their removal and the loss after each, from whole passes of the base."""
    from transformers import AutoModelForCausalLM

    base = work.input("model")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    corpora = read_texts(base, work.settings.calibration, work.numbered_inputs("rows", 2))

    def loss_of(removed: list[int]) -> float:
        each = [[float(loss_alone(model, t.ids, t.content_from, removed)) for t in c.loss_texts] for c in corpora]
        return sum(sum(losses) / len(losses) for losses in each) / len(each)

    gone: list[int] = []
    losses: list[float] = []
    for _ in range(depth):
        found = {block: loss_of([*gone, block]) for block in free if block not in gone}
        gone.append(min(found, key=lambda block: found[block]))
        losses.append(found[gone[-1]])
    return gone, losses


def test_blocks_that_go_one_after_the_other_are_those_of_brute_force(greedy, measured):
    work = greedy(blocks=3, protect=Protect(first=1))
    summary = loss.build(work)
    order, losses = brute_force(work, 3, range(1, 6))
    assert [step.block for step in summary.steps] == order
    assert [step.loss for step in summary.steps] == pytest.approx(losses, abs=1e-4)
    assert summary.choice.blocks == tuple(sorted(order))
    assert summary.choice.value == summary.steps[-1].loss
    assert 0 < summary.choice.agreement <= min(step.agreement for step in summary.steps)
    for step in summary.steps:
        assert step.loss == pytest.approx(sum(step.losses.values()) / 2) and step.loss <= step.runner_up_loss
    assert measured == [5, 4, 3]
    work.storage.commit(work.stage, summary.plain(), 0.0)

    # Fewer blocks need nothing that was not measured, and more only what is missing.
    fewer = loss.build(greedy(blocks=2, protect=Protect(first=1)))
    assert fewer.steps == summary.steps[:2] and fewer.base_loss == summary.base_loss
    assert measured == [5, 4, 3]
    more = loss.build(greedy(blocks=4, protect=Protect(first=1)))
    assert more.steps[:3] == summary.steps and measured == [5, 4, 3, 2]

    inputs = {"model": work.stage.inputs["model"], "loss": work.stage}
    pruned = cut.stage(Prune(blocks=3, contiguous=False, protect=Protect(first=1)), inputs["model"], None, work.stage)
    assert pruned.inputs == inputs
    done = cut.build(Work(pruned, work.storage, work.compute, work.progress))
    assert (done.removed, done.metric, done.cost) == (tuple(sorted(order)), "loss", summary.steps[-1].loss)


def test_cut_of_more_blocks_than_protection_leaves_is_refused(work):
    with pytest.raises(
        UserError, match=r"^prune\.protect: leaves 3 of 6 blocks to remove 4 from\. Lower prune\.protect"
    ):
        cut_choice(work(), metric="angular", depth=4, protect=Protect(first=1, last=2))
