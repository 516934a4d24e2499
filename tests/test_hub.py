"""What is pushed to a hub, with which card, and what a hub that refuses or breaks leaves behind."""

import json
import shutil
from types import SimpleNamespace

import pytest
from hub import KEY, Hub
from huggingface_hub import DatasetCard, HfApi, ModelCard, constants
from published import SECRET, Root, make_root
from tiny import rows_settings

from sdft_ray import cli
from sdft_ray.data.readers import HubContent
from sdft_ray.errors import StageFailed, UserError
from sdft_ray.progress import Progress
from sdft_ray.publish import hub
from sdft_ray.publish.card import write_card
from sdft_ray.publish.origin import find_origin
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage

NAME = "me/smaller"


@pytest.fixture(scope="module")
def root(tiny_model, tmp_path_factory) -> Root:
    return make_root(tiny_model, tmp_path_factory.mktemp("published"))


@pytest.fixture
def server(monkeypatch):
    """A hub of its own, which the client reaches by plain HTTP and without waiting between two tries."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    started = Hub()
    yield started
    started.shutdown()
    started.server_close()


def push(server: Hub, root: Root, *targets: str, name: str = NAME, private: bool = False, key: str = KEY) -> list[str]:
    publications = hub.gather(targets, name, None, root.storage)
    return hub.push(publications, name, private, HfApi(server.url, token=key), Progress("push"))


def card_of(root: Root, target: str, base: str | None = None) -> ModelCard:
    (publication,) = hub.gather([target], NAME, base, root.storage)
    return ModelCard(publication.card, ignore_metadata_errors=False)


def test_pushed_model_and_data_set_are_one_commit_each_with_every_file(server, root):
    addresses = push(server, root, root.trained, root.distilled)
    model, data = server.repositories["model", NAME], server.repositories["dataset", NAME]
    assert model.commits == [f"train {root.trained} of sdft_ray"]
    assert data.commits == [f"distill {root.distilled} of sdft_ray"]
    assert addresses == [f"{server.url}/{prefix}{NAME}/commit/{1:040}" for prefix in ("datasets/", "")]
    place = root.storage.find(root.trained)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "losses.json"):
        assert model.files[name] == (place / name).read_bytes()
    assert data.files["train.parquet"] == (root.storage.find(root.distilled) / "train.parquet").read_bytes()
    assert model.files["adapter/adapter_model.safetensors"] == b"weights"


def test_pushed_gguf_lies_beside_the_model_it_was_made_of_alone(server, root, tmp_path):
    of = SimpleNamespace(id=root.trained, lineage={})
    stage = Stage("export", "tiny-q8-0", 1, {"format": "q8_0"}, {"model": of})
    (root.storage.scratch(stage) / "model-q8_0.gguf").write_bytes(b"weights")
    (root.storage.scratch(stage) / "config.json").write_text("{}")
    root.storage.commit(stage, {}, 0.1)
    push(server, root, root.trained, stage.id)
    files = server.repositories["model", NAME].files
    assert files["model-q8_0.gguf"] == b"weights" and len(files["config.json"]) > 2
    assert b"--hf-file model-q8_0.gguf" in files["README.md"]
    push(server, root, root.trained)
    assert "model-q8_0.gguf" not in server.repositories["model", NAME].files
    with pytest.raises(UserError, match=f"{stage.id}: was made of {root.trained}, which is not pushed with it"):
        hub.gather([root.cut, stage.id], NAME, None, root.storage)


def test_pushed_files_hold_no_name_of_a_path_or_machine(server, root):
    push(server, root, root.trained)
    files = server.repositories["model", NAME].files
    assert not [name for name, content in files.items() if SECRET in name or SECRET.encode() in content]
    assert "manifest.json" not in files
    assert json.loads(files["adapter/adapter_config.json"]) == {"r": 4, "base_model_name_or_path": None}


def test_card_of_a_trained_model_has_what_the_manifests_say(root):
    card = card_of(root, root.trained)
    assert card.data.base_model == "some/tiny" and card.data.library_name == "transformers"
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("arc_easy", "acc_norm", 50.0)
    for part in (
        "some/tiny without 2 of its 6 decoder blocks: 1, 3, counted from 0",
        "3 steps on 3 rows: answers that the unpruned model rewrote (arm `distilled`)",
        "| arc_easy | 4 | 75.0 ±25.0 | 50.0 ±25.0 | -25.0 [-75.0, +0.0] |",
        "Recovery: 66.7 % of the base's mean",
        "**Limited**",
        "sums (licence of the source: unknown)",
        f'AutoModelForCausalLM.from_pretrained("{NAME}"',
        "lr: 0.1",
    ):
        assert part in card.text
    assert "None" not in card.text


def test_card_takes_of_several_evaluations_on_a_task_the_largest_that_the_base_has_too(tiny_model, tmp_path):
    root = make_root(tiny_model, tmp_path)
    for i, folder in enumerate(sorted((root.storage.root / "evaluate").iterdir())):
        known = json.loads((folder / "manifest.json").read_text())
        identity = known["identity"]
        right, sizes = (10, [10]) if identity["inputs"]["model"] == root.base else (5, [10, 20])
        for n in sizes:
            summary = known["summary"] | {"n": n, "value": right / n}
            other = identity | {"settings": identity["settings"] | {"limit": n}}
            again = known | {"id": f"{i}{n:011}", "files": [], "summary": summary, "identity": other}
            place = folder.with_name(f"again-{again['id']}")
            place.mkdir()
            (place / "manifest.json").write_text(json.dumps(again))
            items = (json.dumps({"id": str(item), "value": float(item < right)}) + "\n" for item in range(n))
            (place / "items.jsonl").write_text("".join(items))
    text = card_of(root, root.trained).text
    assert "| arc_easy | 10 | 100.0 ±25.0 | 50.0 ±25.0 | -50.0 [" in text and text.count("| arc_easy |") == 1
    assert "Recovery: 50.0 % of the base's mean" in text


@pytest.mark.parametrize(
    ("arm", "teacher", "line"),
    [
        ("sft", None, "3 steps on 3 rows: reference answers (arm `sft`)"),
        ("distilled", "large", "3 steps on 3 rows: answers that large rewrote (arm `distilled`)"),
        ("logits", None, "unpruned model rewrote, and the unpruned model's probabilities of them (arm `logits`)"),
    ],
)
def test_card_of_a_trained_model_says_what_it_was_trained_on(root, arm, teacher, line):
    (trained,) = root.storage.manifests("train")
    origin = find_origin(trained.model_copy(update={"summary": trained.summary | {"arm": arm}}), root.storage)
    assert origin.teacher is None
    assert line in write_card(origin._replace(teacher=teacher), NAME, None, [], None)


def test_card_of_a_cut_says_that_it_is_not_restored_and_was_not_evaluated(root):
    text = card_of(root, root.cut).text
    assert "**Its quality is not restored**" in text and "This model was not evaluated." in text
    assert "adapter" not in text and "Trained on" not in text


@pytest.mark.parametrize(
    ("metric", "line"),
    [("tail", "the last ones"), ("remove", "named by the recipe"), ("loss", "by loss")],
)
def test_card_of_a_cut_whose_choice_was_not_sampled_says_what_chose(root, metric, line):
    (cut,) = root.storage.manifests("cut")
    summary = {key: value for key, value in cut.summary.items() if key not in ("cost", "agreement")}
    origin = find_origin(cut.model_copy(update={"summary": summary | {"metric": metric}}), root.storage)
    assert f"| choice of blocks | {line} |" in write_card(origin, NAME, None, [], None)


def test_card_of_a_merged_model_has_the_rows_and_the_training_of_each(tiny_model, tmp_path):
    root = make_root(tiny_model, tmp_path)
    own = rows_settings()
    dolly = {"repo": "databricks/databricks-dolly-15k", "revision": "0" * 40, "subset": None, "split": "train"}
    source = HubContent(**dolly, fields=own.source.fields)
    rows = Stage("rows", "dolly", 1, own.model_copy(update={"source": source}))
    of = [SimpleNamespace(id=each.id, lineage=each.lineage.model_dump()) for each in root.storage.manifests("train")]
    cut = SimpleNamespace(id=root.cut, lineage={})
    other = Stage("train", "tiny-2-sft", 4, {"arm": "sft"}, {"model": cut, "rows": rows})
    mine = SimpleNamespace(id="f" * 12, lineage={"stage": "model"})
    parents = {f"model_{i}": each for i, each in enumerate((*of, other, mine))}
    merged = Stage("merge", "tiny-2-linear", 2, {"method": "linear"}, parents)
    (trained,) = root.storage.manifests("train")
    counts = dict.fromkeys(("parameters", "tensors", "identical", "fell_back_to_linear"), 1)
    joined = counts | {"least_cosine": 1.0, "least_alike": None, "cosines": {}}
    for stage, summary in ((rows, {}), (other, trained.summary | {"arm": "sft", "steps": 7}), (merged, joined)):
        root.storage.scratch(stage)
        root.storage.commit(stage, summary, 0.1)
    card = card_of(root, merged.id)
    assert card.data.datasets == ["databricks/databricks-dolly-15k"]
    assert "sums (licence of the source: unknown)" in card.text and "licence of the source: cc-by-sa-3.0" in card.text
    assert [line for line in card.text.splitlines() if line.startswith("| trained | ")] == [
        "| trained | 3 steps on 3 rows: answers that the unpruned model rewrote (arm `distilled`) |",
        "| trained | 7 steps on 3 rows: reference answers (arm `sft`) |",
    ]


def test_card_of_a_whole_model_has_the_scores_of_its_decoder_and_how_the_whole_is_loaded(root):
    (trained,) = root.storage.manifests("train")
    identity = trained.identity.model_copy(update={"inputs": {"model": root.trained, "whole": "0" * 12}})
    about = {"stage": "whole", "identity": identity, "summary": {"parameters": 123_456_789, "kept": 3}}
    around = find_origin(trained.model_copy(update=about), root.storage)
    card = ModelCard(write_card(around, NAME, None, [], None))
    assert card.data.pipeline_tag == "image-text-to-text"
    assert f'AutoModelForImageTextToText.from_pretrained("{NAME}"' in card.text
    assert "123,456,789" in card.text and "all else is the base's" in card.text
    assert "| arc_easy | 4 | 75.0 ±25.0 | 50.0 ±25.0 | -25.0 [-75.0, +0.0] |" in card.text


def test_card_names_the_licence_file_and_the_data_set_that_are_pushed_along(root, tiny_model, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(tiny_model, other)
    (other / "LICENSE").write_text("terms")
    licensed = make_root(other, tmp_path)
    _, model = hub.gather([licensed.trained, licensed.distilled], NAME, None, licensed.storage)
    data = ModelCard(model.card).data
    assert (data.license, data.license_link, data.datasets) == ("other", "LICENSE", [NAME])
    assert "see [LICENSE](LICENSE)" in model.card


def test_card_of_a_base_without_a_name_takes_the_one_that_is_given(root, monkeypatch):
    assert card_of(root, root.trained, base="theirs/tiny").data.base_model == "theirs/tiny"


def test_data_set_has_the_card_that_its_stage_wrote(root):
    (publication,) = hub.gather([root.distilled], NAME, None, root.storage)
    assert DatasetCard(publication.card).data.configs[0]["data_files"] == "train.parquet"


def test_connection_that_breaks_in_an_upload_is_tried_again(server, root):
    server.drop = 2
    push(server, root, root.trained)
    model = server.repositories["model", NAME]
    assert model.files["model.safetensors"] == (root.storage.find(root.trained) / "model.safetensors").read_bytes()
    assert len(model.commits) == 1


@pytest.mark.heavy
def test_connection_that_stays_broken_publishes_nothing_and_the_next_push_uploads_the_rest(server, root):
    server.drop = 100
    with pytest.raises(
        StageFailed, match=rf"^{NAME}: the connection to the hub broke in .*; nothing was published\. Run"
    ):
        push(server, root, root.trained, root.distilled)
    assert [repository.commits for repository in server.repositories.values()] == [[], []]
    server.drop = 0
    server.large |= {}  # what was uploaded whole stays there
    push(server, root, root.trained, root.distilled)
    uploads = [request for request in server.requests if request.startswith("PUT")]
    server.requests.clear()
    push(server, root, root.trained, root.distilled)
    assert uploads and not [request for request in server.requests if request.startswith("PUT")]


@pytest.mark.heavy
def test_hub_that_fails_between_two_commits_says_which_was_published_and_the_next_push_makes_the_other(server, root):
    server.broken = "model"  # the second of the two
    address = f"{server.url}/datasets/{NAME}/commit/{1:040}"
    with pytest.raises(StageFailed, match=rf"^{NAME}: the hub answers 500 \(.*\); {address} was published\. Run the"):
        push(server, root, root.trained, root.distilled)
    model, data = (server.repositories[kind, NAME] for kind in ("model", "dataset"))
    assert (model.commits, model.files, len(data.commits)) == ([], {}, 1)
    server.broken = None
    push(server, root, root.trained, root.distilled)
    assert len(model.commits) == 1 and model.files


def test_wrong_key_name_of_others_and_public_repository_are_one_line_each(server, root):
    with pytest.raises(UserError, match=rf"^{NAME}: the hub refuses your token\. Set HF_TOKEN"):
        push(server, root, root.cut, key="hf_wrong")
    with pytest.raises(
        UserError, match=r"^others/x: belongs to others, or your token may not write there\. Give another"
    ):
        push(server, root, root.cut, name="others/x")
    assert not server.repositories
    push(server, root, root.cut)
    with pytest.raises(UserError, match=rf"^--private: the model {NAME} is there and public\."):
        push(server, root, root.cut, private=True)
    push(server, root, root.cut, name="me/mine", private=True)
    assert server.repositories["model", "me/mine"].private


def test_second_push_takes_away_weights_of_the_first_that_it_does_not_have(server, root):
    push(server, root, root.trained)
    server.repositories["model", NAME].files |= {"model-00001-of-00002.safetensors": b"old", "notes.md": b"mine"}
    push(server, root, root.cut)
    names = set(server.repositories["model", NAME].files)
    assert {"model.safetensors", "notes.md"} <= names
    assert not [name for name in names if name.startswith(("adapter/", "model-"))]


def test_what_cannot_be_pushed_is_refused_by_name(root, tmp_path):
    with pytest.raises(UserError, match=rf"^{root.rows}: is of stage rows: neither a model nor a data set made here"):
        hub.gather([root.rows], NAME, None, root.storage)
    with pytest.raises(
        UserError, match=rf"^{root.trained}: is a model, and so is {root.cut}; one name holds one of each"
    ):
        hub.gather([root.cut, root.trained], NAME, None, root.storage)
    with pytest.raises(UserError, match=r"^--to: smaller has no owner\. Give OWNER/smaller"):
        hub.require_name("smaller")
    with pytest.raises(UserError, match=r"^--to: a/b/c cannot be a name"):
        hub.require_name("a/b/c")
    shutil.copytree(root.storage.root, tmp_path / "root")
    damaged = Storage(str(tmp_path / "root"))
    with (damaged.find(root.cut) / "model.safetensors").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"model\.safetensors: is altered"):
        hub.gather([root.cut], NAME, None, damaged)


def test_dry_run_lists_files_and_card_and_asks_nobody_and_no_key_is_one_line(root, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    arguments = ["push", root.trained, "--to", NAME, "--root", str(root.storage.root)]
    assert cli.main([*arguments, "--dry-run", "--private"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"model {NAME}, private: ") and "  model.safetensors\n" in shown
    assert "# smaller\n" in shown and "tensorboard" not in shown
    assert cli.main([*arguments, "--dry-run", "--json"]) == 0
    (described,) = json.loads(capsys.readouterr().out)
    assert described["kind"] == "model" and described["files"]["README.md"] == len(described["card"].encode())
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith("HF_TOKEN: is not set, and nobody is logged in. Set it")
