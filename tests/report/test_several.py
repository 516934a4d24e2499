"""Several reports side by side: a recipe and sweeps whose scores are known (conftest.py)."""

import json

import pandas

from sdft_ray import cli
from sdft_ray.report import several


def test_rows_hold_models_and_groups_of_each_report_under_its_name(collected):
    rows = [dict(zip(several.columns({"a": collected}), row, strict=True)) for row in several.rows({"a": collected})]
    assert {row["of"] for row in rows} == {"a"} and len(rows) == len(collected.models) + len(collected.groups)
    base, *_ = rows
    assert (base["blocks"], base["rows"], base["arc_easy"], base["recovery"]) == ("0", "", "80.0 ±10.0", "100.0")
    sft = next(row for row in rows if row["model"] == "sft")
    assert (sft["blocks"], sft["rows"], sft["arc_easy"], sft["recovery"]) == ("2", "16", "65.0", "81.2 ±6.2")


def test_notes_name_what_does_not_compare(collected):
    base = collected.base.model_copy(update={"id": "another"})
    other = collected.model_copy(update={"models": (base, *collected.models[1:])})
    assert len(several.notes({"a": collected, "b": collected})) == 2
    assert several.notes({"a": collected, "b": other})[2:] == [
        "Recovery is in percent of each one's own base, and the bases differ."
    ]
    scores = dict([*base.quality.tasks.items()][:1])
    fewer = base.model_copy(update={"quality": base.quality.model_copy(update={"tasks": scores})})
    other = collected.model_copy(update={"models": (fewer, *collected.models[1:])})
    assert "Means do not compare: tasks or their numbers of items differ." in several.notes(
        {"a": collected, "b": other}
    )


def test_report_of_several_prints_writes_and_refuses_what_it_cannot_set(finished, tmp_path, capsys):
    folder, collected = finished
    name, root = str(folder / "sweep.yaml"), ("--root", str(folder / "artifacts"))
    page, lines = tmp_path / "page.html", tmp_path / "lines.csv"
    assert cli.main(["report", name, name, *root, "--html", str(page), "--csv", str(lines)]) == 0
    assert "sweep-2" in capsys.readouterr().out
    assert page.read_text().count("<h2>") == 2
    frame = pandas.read_csv(lines)
    assert frame.groupby("of").size().to_dict() == {"sweep": len(collected.trials), "sweep-2": len(collected.trials)}
    assert cli.main(["report", name, name, *root, "--json"]) == 0
    assert [*json.loads(capsys.readouterr().out)] == ["sweep", "sweep-2"]
    assert cli.main(["report", name, name, *root, "--set", "train.rows=3"]) == 2
    assert capsys.readouterr().err.startswith("--set: is for one recipe. ")
    assert cli.main(["report", name, str(folder / "recipe.yaml"), *root]) == 2
    assert f"recipe.yaml: is not finished under {folder / 'artifacts'} (missing: " in capsys.readouterr().err
