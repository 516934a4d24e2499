"""Reference page, JSON Schemas and `sdft explain` agree with the loader, and with each other."""

import json
from pathlib import Path

import jsonschema
import pytest
import reference
import yaml

from sdft_ray import cli
from sdft_ray.errors import UserError
from sdft_ray.spec import help, schema
from sdft_ray.spec.fields import entries, tree
from sdft_ray.spec.loading import load_recipe, load_section, read_yaml

ROOT = Path(__file__).parents[1]
SHIPPED = [
    *((path, "recipe") for path in sorted((ROOT / "configs/recipes").glob("*.yaml"))),
    *((path, "compute") for path in sorted((ROOT / "configs/compute").glob("*.yaml"))),
    *((path, "sweep") for path in sorted((ROOT / "configs/sweeps").glob("*.yaml"))),
]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECIPE = {
    "model": {"path": "MODEL"},
    "rows": {"gym": "chain_sum", "limit": 10},
    "prune": {"blocks": 2},
    "evaluate": {"tasks": ["arc_easy"]},
}
SWEEP = {"recipe": "recipe.yaml", "axes": {"prune.blocks": [2, 3]}}


def is_valid(kind: str, data: dict) -> bool:
    return jsonschema.Draft202012Validator(schema.schema_of(kind)).is_valid(data)


def is_loaded(kind: str, data: dict, folder: Path) -> bool:
    path = folder / "file.yaml"
    path.write_text(yaml.safe_dump(data))
    try:
        load_section(schema.KINDS[kind], path)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("path", reference.pages(), ids=lambda path: path.name)
def test_generated_page_is_up_to_date(path):
    assert path.read_text(encoding="utf-8") == reference.pages()[path], "out of date. Do: python tools/reference.py"


@pytest.mark.parametrize("kind", schema.KINDS)
def test_every_field_has_a_help_text(kind):
    assert [entry.path for entry in entries(tree(kind)) if not entry.help.strip()] == []


@pytest.mark.parametrize("kind", schema.KINDS)
def test_reference_shows_every_field_once_or_links_to_its_section(kind):
    text = reference.reference()
    anchors = {reference.anchor(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}
    shown = {}
    for entry in entries(tree(kind)):
        if entry.fields and shown.setdefault(entry.sections, entry.path) == entry.path:
            for field in entry.fields:
                assert f"\n| `{field.path}` | " in text
    links = {link.partition(")")[0] for link in text.split("](#")[1:]}
    assert links and links <= anchors


@pytest.mark.parametrize("kind", schema.KINDS)
def test_schema_is_valid_and_refuses_unknown_keys(kind):
    whole = schema.schema_of(kind)
    assert whole["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(whole)
    for section in (whole, *whole["$defs"].values()):
        assert "properties" not in section or section["additionalProperties"] is False


@pytest.mark.parametrize(("path", "kind"), SHIPPED, ids=lambda value: getattr(value, "stem", value))
def test_shipped_file_names_its_schema_and_is_valid(path, kind):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    _, arrow, target = first.partition("# yaml-language-server: $schema=")
    assert arrow and (path.parent / target).resolve() == ROOT / "docs/schema" / f"{kind}.json"
    jsonschema.Draft202012Validator(json.loads((path.parent / target).read_text())).validate(read_yaml(path))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("recipe", RECIPE),
        ("recipe", RECIPE | {"prune": {"blocks": 2, "calibration": {"text": "boolq", "limit": 8}}}),
        ("recipe", RECIPE | {"prune": {"blocks": 2, "calibration": [{"text": "boolq"}, {"rows": "own"}]}}),
        ("recipe", RECIPE | {"prune": {"blocks": 2, "calibration": {"rows": {"gym": "products", "limit": 3}}}}),
        ("recipe", RECIPE | {"model": {"repo": "a/b", "revision": COMMIT}}),
        ("recipe", RECIPE | {"model": {"package": "a", "file": "b.gguf"}}),
        ("recipe", RECIPE | {"rows": {"path": "f.jsonl", "fields": {"prompt": "q", "response": "a"}}}),
        ("recipe", RECIPE | {"arms": {"sft": {"lr": 1}}, "train": {"lora": {"targets": ["q_proj"]}, "rows": None}}),
        ("recipe", RECIPE | {"merge": {"others": {"b": {"path": "M"}}, "slerp": {"t": [0.1, 0.2]}}}),
        (
            "recipe",
            RECIPE
            | {"prune": {"blocks": 2, "calibration": {"rows": {"gym": "a", "limit": 9, "decontaminate": ["piqa"]}}}},
        ),
        ("compute", {}),
        ("compute", {"train": {"workers": 4, "cpus": "auto"}, "distill": {"actors": {"min": 1, "max": 3}}}),
        ("compute", {"ray": {"largest_node": {"cpus": 4}}, "evaluate": {"cpus": 2}}),
        ("sweep", SWEEP),
        ("sweep", SWEEP | {"recipe": ["a.yaml", "b.yaml"], "axes": [{"train.rows": [None, 8]}, {"train.seed": [1]}]}),
        ("sweep", SWEEP | {"axes": {"train.lr": {"from": 1e-5, "to": 1e-3, "scale": "log"}}, "samples": 3}),
        ("sweep", SWEEP | {"axes": {"prune.blocks": {"values": [2]}}, "asha": {"grace_steps": 3}}),
    ],
)
def test_schema_accepts_what_the_loader_accepts(kind, data, tmp_path):
    assert is_loaded(kind, data, tmp_path)
    assert is_valid(kind, data)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("recipe", {key: RECIPE[key] for key in ("model", "rows", "prune")}),
        ("recipe", RECIPE | {"distil": {}}),
        ("recipe", RECIPE | {"train": {"lora": {"rnk": 4}}}),
        ("recipe", RECIPE | {"train": {"epochs": "3"}}),
        ("recipe", RECIPE | {"train": {"epochs": 0}}),
        ("recipe", RECIPE | {"distill": {"top_p": 2}}),
        ("recipe", RECIPE | {"train": None}),
        ("recipe", RECIPE | {"model": {"repo": "a/b", "revision": "main"}}),
        ("recipe", RECIPE | {"model": {"repo": "a/b", "path": "x"}}),
        ("recipe", RECIPE | {"rows": {"limit": 3}}),
        ("recipe", RECIPE | {"prune": {"blocks": 2, "calibration": []}}),
        ("recipe", RECIPE | {"prune": {"blocks": 2, "calibration": {"rows": "mine"}}}),
        ("recipe", RECIPE | {"prune": {"blocks": 2, "calibration": [{"max_token": 5}]}}),
        ("compute", {"train": {"workers": 0}}),
        ("compute", {"distill": {"actors": {"mix": 1, "max": 2}}}),
        ("compute", {"train": {"zero_stage": 4}}),
        ("sweep", {"recipe": "a.yaml"}),
        ("sweep", SWEEP | {"axes": {}}),
        ("sweep", SWEEP | {"axes": {"prune.blocks": []}}),
        ("sweep", SWEEP | {"axes": {"prune.blocks": 3}}),
        ("sweep", SWEEP | {"axes": {"train.lr": {"from": 1, "too": 2}}, "samples": 2}),
    ],
)
def test_schema_refuses_a_wrong_file_as_the_loader_does(kind, data, tmp_path):
    assert not is_loaded(kind, data, tmp_path)
    assert not is_valid(kind, data)


@pytest.mark.parametrize("kind", schema.KINDS)
def test_schema_command_prints_the_committed_schema(kind, capsys):
    assert cli.main(["schema", kind]) == 0
    assert capsys.readouterr().out == (ROOT / f"docs/schema/{kind}.json").read_text(encoding="utf-8")


def test_explain_of_a_field_gives_type_default_and_help():
    (entry,) = help.explain("train.lr")
    assert (entry.kind, entry.path, entry.type, entry.default) == ("recipe", "train.lr", "number above 0", "0.0001")
    text = help.show([entry])
    assert all(part in text for part in ("train.lr", "number above 0", "0.0001", "Learning rate"))


def test_explain_of_a_name_in_two_files_shows_both():
    assert [entry.path for entry in help.explain("train")] == ["train", "compute.train"]


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("compute.train.workers", "compute.train.workers"),
        ("ray.address", "compute.ray.address"),
        ("recipe.train.lr", "train.lr"),
        ("axes", "axes"),
        ("sweep.axes", "axes"),
        ("prune.calibration.1.text", "prune.calibration.text"),
        ("merge.others.dolly.rows.limit", "merge.others.NAME.rows.limit"),
    ],
)
def test_explain_takes_a_key_as_messages_and_people_write_it(key, path):
    assert [entry.path for entry in help.explain(key)] == [path]


def test_explain_of_a_section_lists_its_fields_one_line_each():
    lines = help.show(help.explain("prune.protect")).splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["prune.protect.first", "prune.protect.last"]


def test_explain_of_a_section_fits_a_terminal():
    lines = help.show(help.explain("prune")).splitlines()
    assert max(map(len, lines)) <= 110
    (metric,) = [i for i, line in enumerate(lines) if "prune.metric" in line]
    assert lines[metric + 1].startswith(" " * lines[metric].index("What decides")), (
        "further lines stand below the first"
    )


def test_explain_of_a_field_of_one_kind_of_source_names_its_key():
    assert "only with repo" in help.show(help.explain("model.revision"))


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("train.lrr", "train.lrr: unknown key. Did you mean train.lr?"),
        ("sweep.vary", "sweep.vary: unknown key. Known: asha, axes, goal, recipe, samples, seed."),
        ("lr", "lr: unknown key. Did you mean train.lr?"),
        ("trian.workers", "trian.workers: unknown key. Did you mean compute.train.workers?"),
        ("prune.protect.zzz_zzz_zzz_zzz_zzz", "prune.protect.zzz_zzz_zzz_zzz_zzz: unknown key. Known: first, last."),
        (
            "zzzzzzz",
            "zzzzzzz: unknown key. List the keys: sdft explain recipe, sdft explain compute, sdft explain sweep.",
        ),
    ],
)
def test_explain_of_an_unknown_key_gives_the_nearest_and_exit_code_2(key, line, capsys):
    assert cli.main(["explain", key]) == 2
    assert capsys.readouterr().err == f"{line}\n"


def test_explain_as_json_holds_what_is_shown(capsys):
    assert cli.main(["explain", "train.lora.rank", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["path"], entry["type"], entry["default"]) == ("train.lora.rank", "whole number above 0", "8")


def test_default_in_the_reference_is_what_a_recipe_without_the_key_has(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    recipe = load_recipe(tmp_path / "recipe.yaml").model_dump(mode="json")
    for section in ("distill", "train"):
        for field in next(entry for entry in tree("recipe").fields if entry.path == section).fields:
            if not field.fields:
                assert yaml.safe_load(field.default or "") == recipe[section][field.path.rpartition(".")[2]]
