"""What one pass over a model measures, against transformers' own hidden states and definitions taken by hand."""

import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import blocks_of, each_architecture
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model, make_tiny_rows
from walks import measure_states, result_of

from sdft_ray.core.rows import PLAIN, Row
from sdft_ray.core.walking import Walk
from sdft_ray.data import calibration
from sdft_ray.data.calibration import Corpus, CorpusSettings
from sdft_ray.errors import UserError
from sdft_ray.models.streamed import open_walk
from sdft_ray.progress import Progress
from sdft_ray.results import read_measured, read_split
from sdft_ray.spec import compute
from sdft_ray.stages import Work, score
from sdft_ray.stages.score import on_disk, pass_by
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

torch.set_num_threads(1)

TEXTS = [
    list(range(10, 40)),
    [7, 7, 200],
    [100, 3, 50, 60, 61, 62, 63, 9],
    [42],
    list(range(250, 200, -2)),
]
LAST = [len(ids) - 1 for ids in TEXTS]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from transformers import AutoModel

    made = {}

    def model(architecture: str):
        if architecture not in made:
            directory = make_tiny_model(tmp_path_factory.mktemp(architecture) / "model", architecture)
            made[architecture] = AutoModel.from_pretrained(directory).eval()
        return made[architecture]

    return model


def states_alone(model, ids: list[int]) -> torch.Tensor:
    """x(0)..x(L) of one text, (L+1, T, D): transformers' own hidden states, and the last block's output by a hook."""
    last = []
    hook = blocks_of(model)[-1].register_forward_hook(
        lambda _module, _args, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    hook.remove()
    return torch.stack([*(x[0] for x in hidden[:-1]), last[0][0]])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def by_definition(states: torch.Tensor, first: int) -> tuple[list[list[float]], list[float]]:
    """d(l, m) over the tokens from `first` and the influence of each block, one pair of vectors at a time."""
    states = states.double()
    tokens = range(states.shape[1])
    distances = [
        [
            sum(math.acos(max(-1.0, min(1.0, cosine(a[t], b[t])))) / math.pi for t in tokens[first:])
            / len(tokens[first:])
            for b in states
        ]
        for a in states
    ]
    influences = [1 - sum(cosine(a[t], b[t]) for t in tokens) / len(tokens) for a, b in itertools.pairwise(states)]
    return distances, influences


@pytest.mark.parametrize(
    ("architecture", "positions"), [*each_architecture("last"), ("llama", "all"), ("gemma3_text", "second half")]
)
def test_pass_by_a_padded_batch_gives_what_the_definitions_give_for_each_text_alone(models, architecture, positions):
    first = {"last": LAST, "all": [0] * 5, "second half": [len(ids) // 2 for ids in TEXTS]}[positions]
    model = models(architecture)
    distances, influences = measure_states(Walk(model), TEXTS, first)
    assert distances.shape == (5, 7, 7) and influences.shape == (5, 6)
    for i, ids in enumerate(TEXTS):
        expected = by_definition(states_alone(model, ids), first[i])
        torch.testing.assert_close(distances[i], torch.tensor(expected[0], dtype=torch.float64), atol=1e-5, rtol=0)
        torch.testing.assert_close(influences[i], torch.tensor(expected[1]), atol=1e-5, rtol=0)
    assert distances[:, 0, -1].min() > 0.01, "a random model moves its stream"
    # Block by block from disk, in two batches.
    streamed = open_walk("AutoModel", Path(model.name_or_path), "float32", "cpu", streamed=True)
    texts = [*zip(TEXTS, first, strict=True)]
    parts = result_of(pass_by(streamed, [texts[:2], texts[2:]], on_disk))
    for found, expected in zip(zip(*parts, strict=True), (distances, influences), strict=True):
        torch.testing.assert_close(torch.cat(found), expected, atol=1e-6, rtol=0)
    assert all(each.is_meta for block in streamed.blocks for each in block.parameters())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_pass_by_does_not_depend_on_how_texts_are_batched(models, size):
    walk = Walk(models("llama"))
    whole = measure_states(walk, TEXTS, LAST)
    parts = [measure_states(walk, TEXTS[i : i + size], LAST[i : i + size]) for i in range(0, len(TEXTS), size)]
    for found, expected in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(found), expected, atol=1e-6, rtol=0)


def test_pass_by_ends_before_the_final_norm(models, tmp_path):
    model = models("llama")
    before = measure_states(Walk(model), TEXTS, LAST)
    with torch.no_grad():
        # A trained norm has weights that turn the vector; a fresh one would only rescale it.
        model.norm.weight.copy_(torch.linspace(-2, 2, 64))
    for found, expected in zip(measure_states(Walk(model), TEXTS, LAST), before, strict=True):
        assert torch.equal(found, expected)


# --- the stage, on real Ray Data -------------------------------------------------------------------------------------

CORPUS = {"field": "text", "limit": 20, "held_back": 6, "max_tokens": 48, "positions": "last"}


def make_work(root: Path, model: Path, *corpora: dict, **plan: Any) -> Work:
    """Return the score stage's work; a corpus with `rows: True` is a rows artifact, else a text file."""
    storage = Storage(str(root))
    inputs, settings = {"model": Stage("model", "tiny", 1, {}, location=model)}, []
    for i, corpus in enumerate(corpora):
        path = None
        if corpus.get("rows"):
            inputs[f"rows_{i}"] = make_tiny_rows(storage)
        else:
            path = root / f"texts_{i}.jsonl"
            texts = [f"Text {j} of corpus {i}, " + "and so on " * (j % 7) for j in range(corpus.get("count", 26))]
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        wanted = CORPUS | {k: v for k, v in corpus.items() if k in CORPUS}
        settings.append(CorpusSettings(**wanted, name=f"corpus {i}", path=path and str(path)))
    stage = Stage("score", "tiny", 1, score.Settings(dtype="float32", calibration=tuple(settings)), inputs)
    section = compute.Score(**{"cpus": 1, "batch_size": 4} | plan)
    return Work(stage, storage, compute.Compute(score=section), Progress("score", "texts"))


def read_corpora(work: Work) -> list[Corpus]:
    """Return the corpora of a score stage as its build reads them."""
    wanted = work.settings.calibration
    rows = {i: read_split(place, "train", Row) for i, place in work.numbered_inputs("rows", len(wanted)).items()}
    return calibration.read_corpora(work.input("model"), wanted, rows)


@pytest.fixture
def scored(ray_cluster, tiny_model, tmp_path):
    def run(name: str, *corpora: dict, model: Path = tiny_model, **options):
        root = tmp_path / name
        root.mkdir()
        work = make_work(root, model, *corpora, **options)
        return work, score.build(work)

    return run


def test_score_is_the_same_whatever_the_number_of_actors_and_in_one_process(scored, models, tiny_model):
    forms = {"one": {}, "two": {"actors": 2}, "streamed": {"actors": 2, "weights": "streamed"}}
    one, *others = (scored(name, {}, {"positions": "all"}, **form)[0] for name, form in forms.items())
    first = read_measured(one.directory)
    for other in others:
        second = read_measured(other.directory)
        for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    texts = read_corpora(one)[0].measured
    ids = [text.ids for text in texts]
    distances, influences = measure_states(Walk(models("llama")), ids, [len(text) - 1 for text in ids])
    torch.testing.assert_close(first[0][0], distances.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(first[1][0], influences.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_score_of_a_killed_actor_is_that_of_a_calm_one(scored, tmp_path, monkeypatch, weights):
    calm = read_measured(scored("calm", {})[0].directory)
    fuse = tmp_path / "fuse"

    class Killed(score.Scorer):
        def __call__(self, batches):
            if not fuse.exists():
                fuse.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batches)

    monkeypatch.setattr(score, "Scorer", Killed)
    killed = read_measured(scored("killed", {}, weights=weights)[0].directory)
    assert fuse.exists()
    assert torch.equal(killed[0][0], calm[0][0]) and torch.equal(killed[1][0], calm[1][0])


def test_score_summary_says_for_every_size_what_each_metric_and_each_corpus_would_remove(scored):
    work, summary = scored("two", {}, {"rows": True, "positions": "response"})
    assert [(c.name, c.positions, c.texts) for c in summary.corpora] == [
        ("corpus 0", "last", 20),
        ("corpus 1", "response", 20),
    ]
    for choices in (summary.choices, *(corpus.choices for corpus in summary.corpora)):
        assert set(choices) == {"angular", "influence"}
        for metric in choices.values():
            assert list(metric) == [1, 2, 3, 4, 5]
            for size, choice in metric.items():
                assert len(choice.blocks) == size and 0 < choice.agreement <= 1
    assert all(0 <= c.shared <= 1 for metric in summary.choices.values() for c in metric.values())
    mean = torch.tensor(json.loads((work.directory / "distances.json").read_text())["corpora"][0]["distances"])
    torch.testing.assert_close(mean, read_measured(work.directory)[0][0].mean(dim=0), atol=1e-6, rtol=0)


def test_score_holds_back_texts_that_it_never_measures(tiny_model, tmp_path):
    corpus = read_corpora(make_work(tmp_path, tiny_model, {"limit": 8, "held_back": 5}))[0]
    assert (len(corpus.measured), len(corpus.loss_texts)) == (8, 5)
    assert not {tuple(t.ids) for t in corpus.measured} & {tuple(t.ids) for t in corpus.loss_texts}
    (tmp_path / "short").mkdir()
    short = read_corpora(make_work(tmp_path / "short", tiny_model, {"count": 10}))[0]
    assert (len(short.measured), len(short.loss_texts)) == (7, 3)


def test_score_of_chat_rows_ends_at_the_response_and_cuts_their_start(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    whole = read_corpora(make_work(tmp_path, tiny_model, {"rows": True, "max_tokens": 400}))[0]
    for text in whole.measured:
        response = tokenizer.decode(text.ids[text.content_from :])
        assert response.startswith("It is ") and response.endswith(".")
    assert whole.shortened == 0
    short = read_corpora(make_work(tmp_path, tiny_model, {"rows": True, "max_tokens": 20}))[0]
    assert short.shortened == 20
    assert [t.ids for t in short.measured] == [t.ids[-20:] for t in whole.measured]
    assert {t.content_from for t in short.measured} == {0}


def test_score_finds_the_rows_of_a_corpus_behind_corpora_of_plain_texts(tiny_model, tmp_path):
    first, second, chat = read_corpora(make_work(tmp_path, tiny_model, {}, {}, {"rows": True, "max_tokens": 400}))
    assert (first.name, second.name, chat.name) == ("corpus 0", "corpus 1", "corpus 2")
    assert {text.content_from > 0 for text in chat.measured} == {True}
    assert {text.content_from for text in (*first.measured, *second.measured)} == {0}


def test_score_of_plain_texts_keeps_their_start(tiny_model, tmp_path):
    whole = read_corpora(make_work(tmp_path, tiny_model, {"max_tokens": 400}))[0]
    short = read_corpora(make_work(tmp_path, tiny_model, {"max_tokens": 5}))[0]
    assert [t.ids for t in short.measured] == [t.ids[:5] for t in whole.measured]
    assert (whole.shortened, short.shortened) == (0, 20)


def test_score_of_plain_rows_reads_them_as_a_file_of_these_texts(tiny_model, tmp_path):
    texts = [f"{number} is a number, and so is its double." for number in range(6)]
    work = make_work(tmp_path, tiny_model, {"limit": 4, "held_back": 2, "max_tokens": 9})
    (tmp_path / "texts_0.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    plain = [Row("", text, conversation=PLAIN) for text in texts]
    (of_rows,) = calibration.read_corpora(tiny_model, work.settings.calibration, {0: plain})
    assert of_rows == read_corpora(work)[0]
    assert of_rows.shortened == 4


def test_score_leaves_out_texts_of_one_token_which_nothing_predicts(tiny_model, tmp_path):
    work = make_work(tmp_path, tiny_model, {"limit": 8, "held_back": 5})
    texts = "".join(json.dumps({"text": text}) + "\n" for text in ("A", "BB", "C", "D", "EE", "FF", "G"))
    (tmp_path / "texts_0.jsonl").write_text(texts)
    (corpus,) = read_corpora(work)
    assert [len(text.ids) for text in (*corpus.measured, *corpus.loss_texts)] == [2, 2, 2]
    (tmp_path / "texts_0.jsonl").write_text('{"text": "A"}\n{"text": "B"}\n')
    with pytest.raises(UserError, match=rf"^prune\.calibration: {tmp_path}/texts_0\.jsonl has no text of two tokens\."):
        read_corpora(work)


def test_score_of_more_tokens_than_the_context_is_refused(tiny_model, tmp_path):
    with pytest.raises(
        UserError, match=r"^prune\.calibration\.max_tokens: 3000 is more than .* context of 2048\. Give"
    ):
        read_corpora(make_work(tmp_path, tiny_model, {"max_tokens": 3000}))


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("model.embed_tokens.weight", "resident"),
        ("model.layers.0.mlp.up_proj.weight", "resident"),
        ("model.layers.4.self_attn.q_proj.weight", "streamed"),
    ],
)
def test_score_of_nan_weights_names_the_tensor(scored, tmp_path, name, weights):
    model = make_tiny_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[:64] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name.removeprefix('model.')} of its weights holds NaN or infinity"):
        scored("nan", {}, model=model, weights=weights)


def test_score_of_activations_that_overflow_names_the_block(scored, tmp_path):
    model = make_tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"] *= 1e38
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="block 3 gives NaN or infinity on calibration texts, though its weights are"):
        scored("overflow", {}, model=model)
