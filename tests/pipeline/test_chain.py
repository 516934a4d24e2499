"""The whole chain through the command on a tiny model: real Ray, vLLM, DeepSpeed and lm-eval."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from command import sdft

from sdft_ray.store.manifest import check_files, read_manifest

REASONS = {
    *("kept", "error", "truncated", "empty", "leak", "refusal", "repeated", "too_long"),
    *("no_answer", "wrong_answer", "tool_call", "plain"),
}


@pytest.fixture(scope="module")
def chain(ray_cluster, tiny_model, tmp_path_factory):
    """A finished run of a small recipe, in its own directory; returns that directory and the completed process."""
    folder = tmp_path_factory.mktemp("chain")
    with (folder / "sums.jsonl").open("w") as lines:
        for i in range(48):
            row = {"q": f"What is {i} + {i}?", "a": f"{i} + {i} = {2 * i}\n#### {2 * i}"}
            lines.write(json.dumps(row) + "\n")
    (folder / "calibration.txt").write_text("\n\n".join(f"Text number {i} about nothing much." for i in range(8)))
    recipe = {
        "model": {"path": str(tiny_model)},
        "rows": {
            "path": "sums.jsonl",
            "fields": {"prompt": "q", "response": "a"},
            "held_out": 4,
            "validation": 4,
            "answer": "number",
        },
        "prune": {"blocks": 2, "calibration": {"text": "calibration.txt", "limit": 8, "max_tokens": 32}},
        "distill": {"max_new_tokens": 24, "dtype": "float32"},
        "train": {"global_batch_size": 16, "epochs": 2, "lr": 1e-3},
        "arms": {"sft": {}, "distilled": {"lr": 2e-3}},
        "export": {"models": ["sft"], "formats": ["int8"]},
        "evaluate": {
            "tasks": ["arc_easy", "held_out"],
            "limit": 3,
            "max_new_tokens": 8,
            "dtype": "float32",
            "retention": {"rows": 3, "texts": 2, "text": "plain.txt"},
        },
    }
    (folder / "plain.txt").write_text("A text of another file.\n\nAnother one.\n\nA third one.")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "compute.yaml").write_text(
        yaml.safe_dump(
            {
                "ray": {"address": ray_cluster},
                "score": {"cpus": 1},
                "distill": {"cpus": 1, "engine": {"kv_cache_gib": 0.25, "max_num_seqs": 16}},
                "train": {"workers": 2, "cpus": 1, "micro_batch": 4},
            }
        )
    )
    done = sdft("run", "recipe.yaml", "--compute", "compute.yaml", "--json", "--html", "report.html", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def artifact(folder: Path, stage: str, slug: str = "") -> Path:
    found = list((folder / "artifacts" / stage).glob(f"*{slug}-*"))
    assert len(found) == 1, found
    return found[0]


def test_chain_reports_every_model_in_the_promised_shape(chain):
    report = json.loads(chain[1].stdout)
    assert [model["model"] for model in report["models"]] == ["base", "pruned", "sft", "distilled", "sft int8"]
    base, pruned = report["models"][:2]
    for model in report["models"]:
        assert set(model["tasks"]) == {"arc_easy", "held_out"}
        assert model["limited"] and model["tasks"]["arc_easy"]["limited"] and not model["tasks"]["held_out"]["limited"]
        assert model["tasks"]["arc_easy"]["n"] == 3 and model["tasks"]["held_out"]["n"] == 4
        assert model["tasks"]["held_out"]["bits_per_byte"] > 0
        kept, written = model["retention"], model["generated"]
        assert (kept["responses"]["texts"], kept["texts"]["texts"], kept["bits_per_byte"]["n"]) == (3, 2, 3)
        assert written["answers"] == 4 and 0 <= written["ended"] <= 1
    assert base["retention"]["texts"]["kl"]["value"] == 0 < pruned["retention"]["texts"]["kl"]["value"]
    (nearer,) = report["retention"]
    assert nearer["first"] == "distilled" and nearer["figures"]["kl_texts"]["n"] == 2
    (cost,) = report["further_comparisons"]
    assert (cost["first"], cost["second"]) == ("sft int8", "sft") and cost["tasks"]["arc_easy"]["n"] == 3
    small = report["exports"]["sft int8"]
    assert small["bytes"] < small["of_bytes"] and 0 < small["largest_error"] < 0.01
    assert pruned["parameters"] < base["parameters"]
    assert pruned["flops_per_token"] < base["flops_per_token"]


def test_chain_every_artifact_is_whole_and_its_files_are_the_listed_ones(chain):
    folder, _ = chain
    manifests = list((folder / "artifacts").glob("*/*/manifest.json"))
    # rows, score, loss, cut, distill, nll, probes; train; export; evaluate, retention
    assert len(manifests) == 7 + 2 + 1 + 5 * 3
    for path in manifests:
        manifest = read_manifest(path.parent)
        check_files(path.parent, manifest, hashes=True)
        listed = {file.path for file in manifest.files}
        there = {p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*") if p.is_file()}
        assert there == listed | {"manifest.json"}
    assert not list((folder / "artifacts" / "scratch").glob("*/*"))
    assert not list((folder / "artifacts" / "resumable").glob("*/*"))


def test_chain_distilled_dataset_holds_every_row_once_with_a_reason(chain):
    folder, _ = chain
    rows = pq.read_table(artifact(folder, "distill") / "train.parquet").to_pylist()
    expected = pq.read_table(artifact(folder, "rows") / "train.parquet").to_pylist()
    assert [row["id"] for row in rows] == [row["id"] for row in expected]
    counts = read_manifest(artifact(folder, "distill")).summary["reasons"]
    assert set(counts) == REASONS and sum(counts.values()) == len(rows)
    for row in rows:
        assert (row["source"] == "distilled") == (row["reason"] == "kept")
        assert row["source"] == "distilled" or row["response"] == row["reference"]
        assert row["finish_reason"] in {"stop", "length"} and row["generated_tokens"] > 0  # a real engine wrote it


def test_chain_tuned_models_load_as_plain_models_and_differ(chain):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = chain
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = {}
    for name, directory in {
        "pruned": artifact(folder, "cut"),
        "sft": artifact(folder, "train", "-sft"),
        "distilled": artifact(folder, "train", "-distilled"),
    }.items():
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert model.config.num_hidden_layers == 4
        assert AutoTokenizer.from_pretrained(directory).chat_template
        logits[name] = model(ids).logits.detach()
    assert not torch.allclose(logits["pruned"], logits["sft"], atol=1e-4)
    assert not torch.allclose(logits["sft"], logits["distilled"], atol=1e-4)


def test_chain_run_again_builds_nothing(chain):
    folder, _ = chain
    before = {path: path.stat().st_mtime_ns for path in (folder / "artifacts").rglob("manifest.json")}
    again = sdft("run", "recipe.yaml", cwd=folder)  # without the compute file: that never moves an id
    assert again.returncode == 0
    assert "Nothing to do: all 26 artifacts are there already" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "artifacts").rglob("manifest.json")} == before


def test_chain_another_depth_reuses_scoring_and_generation(chain):
    folder, _ = chain
    plan = json.loads(sdft("check", "recipe.yaml", "--json", "--set", "prune.blocks=3", cwd=folder).stdout)
    status = {line["stage"]: line["status"] for line in plan if line["stage"] != "evaluate"}
    assert status == {
        "model": "done",
        "rows": "done",
        "score": "done",
        "distill": "done",
        "nll": "done",
        "probes": "done",
        "retention": "missing",
        "loss": "missing",
        "cut": "missing",
        "train": "missing",
        "export": "missing",
    }


def test_chain_run_again_under_other_names_builds_nothing(chain, tiny_model, tmp_path):
    folder, _ = chain
    shutil.copytree(tiny_model, tmp_path / "another-model")
    for name in ("sums.jsonl", "calibration.txt", "plain.txt"):
        shutil.copy(folder / name, tmp_path / f"other-{name}")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["model"]["path"] = "another-model"
    recipe["rows"]["path"] = "other-sums.jsonl"
    recipe["prune"]["calibration"]["text"] = "other-calibration.txt"
    recipe["evaluate"]["retention"]["text"] = "other-plain.txt"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    again = sdft("run", "recipe.yaml", "--root", folder / "artifacts", "--json", cwd=tmp_path)
    assert again.returncode == 0 and "Nothing to do: all 26 artifacts are there already" in again.stderr, again.stderr
    assert json.loads(again.stdout)["models"] == json.loads(chain[1].stdout)["models"]


def test_chain_shows_how_likely_the_base_finds_rewrites_and_references(chain):
    folder, _ = chain
    nll = json.loads((artifact(folder, "nll") / "nll.json").read_text())
    assert nll["rows"] == read_manifest(artifact(folder, "distill")).summary["kept"]
    line = "Negative log-likelihood a token under the base"
    assert (line in (folder / "report.html").read_text()) == (nll["rows"] > 0), "random models keep few"


def test_chain_page_is_one_file_without_network(chain):
    html = (chain[0] / "report.html").read_text()
    assert html.count("<svg") == 3
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    for outside in ("http://", "https://", "<script", "<link", "@import", "url("):
        assert outside not in re.sub(r"url\(#\w+\)", "", without_namespaces)
    for name in ("base", "pruned", "sft", "distilled", "arc_easy", "held_out", "LIMITED"):
        assert name in html


def test_chain_a_damaged_artifact_is_an_error_and_is_not_rebuilt(chain):
    folder, _ = chain
    file = artifact(folder, "rows") / "train.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    try:
        broken = sdft("run", "recipe.yaml", cwd=folder)
        assert broken.returncode == 2
        assert f"{file}: is damaged (got {len(whole) - 1} bytes; expected {len(whole)})" in broken.stderr
        assert "Traceback" not in broken.stderr
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("stage", ["rows", "score", "loss", "cut", "distill", "train", "nll", "evaluate"])
def test_show_prints_any_artifact(chain, stage):
    folder, _ = chain
    directory = next((folder / "artifacts" / stage).iterdir())
    identity = directory.name.rpartition("-")[2]
    shown = sdft("show", identity[:8], cwd=folder)
    assert shown.returncode == 0 and identity in shown.stdout
    assert json.loads(sdft("show", directory, "--json", cwd=folder).stdout)["id"] == identity


def test_show_of_a_score_draws_its_distances(chain):
    folder, _ = chain
    score = artifact(folder, "score")
    for name, begins in (("map.svg", b"<?xml"), ("map.png", b"\x89PNG")):
        assert sdft("show", score, "--plot", name, cwd=folder).returncode == 0
        assert (folder / name).read_bytes().startswith(begins)
    refused = sdft("show", artifact(folder, "rows"), "--plot", "map.svg", cwd=folder)
    assert refused.returncode == 2 and "--plot: cannot draw rows as .svg. Give a score artifact" in refused.stderr


def test_chain_pruned_model_carries_a_card_that_says_what_is_gone(chain):
    folder, _ = chain
    removed = read_manifest(artifact(folder, "cut")).summary["removed"]
    card = (artifact(folder, "cut") / "README.md").read_text()
    assert f"blocks [{removed[0]}, {removed[-1] + 1})" in card and "library_name: transformers" in card


def test_diff_of_two_tuned_models_names_what_differs(chain):
    folder, _ = chain
    names = [artifact(folder, "train", f"-{arm}").name.rpartition("-")[2] for arm in ("sft", "distilled")]
    differing = json.loads(sdft("diff", *names, "--json", cwd=folder).stdout)
    assert differing["settings.arm"] == ["sft", "distilled"]
    assert differing["settings.train.lr"] == [1e-3, 2e-3]
    assert not any(key.startswith("inputs.model") for key in differing)
