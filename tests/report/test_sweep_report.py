"""What the report of a sweep says of artifacts whose scores are known (conftest.py)."""

import csv
import io
import json
import shutil

import pytest
import yaml
from recipes import write_recipe
from rich.console import Console

from sdft_ray import cli, pipeline
from sdft_ray.errors import StageFailed, UserError
from sdft_ray.report import frame, page, plots, sources, sweep, table, terminal
from sdft_ray.store.storage import Storage
from sdft_ray.sweep import goal, planning

ITEMS = 20  # of each task


def test_report_takes_seeds_together_with_their_spread(collected):
    groups = {(group.arm, *group.values): group for group in collected.groups}
    sft, distilled = groups["sft",], groups["distilled",]
    assert (len(sft.trials), len(distilled.trials)) == (3, 3)
    assert sft.recovery == pytest.approx(100 * 13 / 16) and distilled.recovery == pytest.approx(100 * 15 / 16)
    assert sft.recovery_sd == pytest.approx(100 / 16)


def test_report_chooses_by_validation_loss_and_never_by_score(collected):
    other = next(group for group in collected.groups if group.values)
    assert other.values == {"arms.sft.lr": 1e-3}
    assert other.recovery > 100 and not other.chosen
    assert all(group.chosen for group in collected.groups if group is not other)


def test_report_compares_chosen_arms_item_by_item_over_seeds(collected):
    (entry,) = collected.comparisons
    assert (entry.blocks, entry.rows, entry.seeds) == (2, 16, {"sft": 3, "distilled": 3})
    mean = entry.compared.mean
    assert entry.compared.tasks["arc_easy"].value == pytest.approx(2 / ITEMS) == mean.value
    assert 0 <= mean.low < mean.value < mean.high


def test_report_of_retention_takes_seeds_together_and_stands_on_terminal_csv_and_json(collected):
    group = next(group for group in collected.groups if group.arm == "sft" and not group.values)
    assert group.retention == pytest.approx({"kl_responses": 0.1 + 0.01 * 13, "agreement_responses": 0.9 - 0.01 * 13})
    kept = [model.retention.figures["kl_responses"].value for model in collected.models]
    assert kept == [0.0, 0.5, 0.75]
    console = Console(width=200, record=True, file=io.StringIO())
    terminal.show_sweep(collected, console)
    text = console.export_text()
    assert all(said in text for said in ("KL, responses", "0.230", "0.750")) and "KL, texts" not in text
    lines = list(csv.DictReader(io.StringIO(frame.as_csv(frame.lines(collected)))))
    values = [line["retention.responses.kl.value"] for line in lines]
    assert values.count("") == sum(line["status"] != "done" for line in lines) == 2 and "0.22" in values
    done = next(trial for trial in collected.plain()["trials"] if trial["status"] == "done")
    assert done["retention"]["responses"]["tokens"] == 9


def test_report_lists_every_trial_with_its_state_and_reason(collected):
    states = [(trial.status, trial.reason) for trial in collected.trials if trial.blocks == 3]
    assert states == [("missing", None), ("failed", "train: it broke")]
    lines = list(csv.DictReader(io.StringIO(frame.as_csv(frame.lines(collected)))))
    assert len(lines) == len(collected.trials) == 9
    assert {line["status"] for line in lines} == {"done", "missing", "failed"}


def test_lines_of_a_sweep_have_names_whole_numbers_and_ids_as_they_are(collected):
    first, *others = collected.trials
    first = first.model_copy(update={"id": "012345678901", "values": {"train.seed": [0, 1]}})
    lines = frame.lines(collected.model_copy(update={"trials": (first, *others)}))
    written = list(csv.DictReader(io.StringIO(frame.as_csv(lines))))
    assert "" not in written[0] and {line["blocks"] for line in written} == {"2", "3"}
    assert {line["parameters"] for line in written if line["status"] == "done"} == {
        str(others[0].result.cost.parameters)
    }
    assert (written[0]["id"], written[0]["train.seed"]) == ("012345678901", "[0, 1]")
    over_rows = {"axes": ("rows",), "trials": (first.model_copy(update={"values": {"rows": {"path": "a"}}}),)}
    (line,) = frame.lines(collected.model_copy(update=over_rows))
    assert (line["rows"], line["axes.rows"]) == (first.rows, '{"path": "a"}')
    in_pandas = frame.as_frame(lines)
    assert in_pandas.id[0] == "012345678901" and in_pandas.recovery.isna().sum() == 2
    several = frame.of_several({"a": collected, "b": collected})
    assert [line["of"] for line in several] == ["a"] * 9 + ["b"] * 9 and {line["blocks"] for line in several} == {2, 3}


def test_show_of_an_artifact_of_another_version_has_its_facts(finished, capsys):
    (score,) = (finished[0] / "artifacts" / "score").iterdir()  # its summary is empty
    assert cli.main(["show", str(score)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert score.name.endswith(lines[0].split()[-1]) and all(line[0] != " " for line in lines)


def test_report_of_two_bases_chooses_within_each_and_names_them(plan, write_all, tiny_model, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text()) | {"arms": {"sft": {}}, "draft": None}
    recipe["rows"]["validation"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    axes = {"model.path": [str(tiny_model), str(other)]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": axes}))
    storage, both = Storage(str(tmp_path / "both")), planning.load_sweep(tmp_path / "sweep.yaml")
    write_all(both, storage, lambda trial: {"validation_loss": 1.0 + (trial.values["model.path"] == str(other))})
    report = sweep.collect(both, "sweep.yaml", storage)
    assert [(group.of, group.chosen) for group in report.groups] == [(str(tiny_model), True), (str(other), True)]
    names = [report.name_model(model) for model in report.models]
    assert names == ["base, tiny", "base, other", "pruned, tiny-2", "pruned, other-2"]
    text = page.render_sweep(report.model_copy(update={"maps": []}), tmp_path)
    assert all(name in text for name in names) and " %)" not in text, "no share of another base is saved"


def test_report_of_two_row_files_chooses_within_each(plan, write_all, tmp_path):
    """Validation rows are of the file: their losses do not compare."""
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text()) | {"draft": None}
    recipe["rows"]["held_out"], recipe["evaluate"]["retention"] = 0, None
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    own, other = str(tmp_path / "rows.jsonl"), str(tmp_path / "other.jsonl")
    (tmp_path / "other.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("?", "!"))
    axes = {"rows.path": [own, other], "train.lr": [1e-3, 1e-4]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": axes}))
    storage, both = Storage(str(tmp_path / "both")), planning.load_sweep(tmp_path / "sweep.yaml")
    loss = {own: 1.0, other: 2.0, 1e-3: 0.1, 1e-4: 0.2}
    write_all(both, storage, lambda trial: {"validation_loss": sum(map(loss.get, trial.values.values()))})
    report = sweep.collect(both, "sweep.yaml", storage)
    chosen = [(group.of, group.arm, group.values["train.lr"]) for group in report.groups if group.chosen]
    assert chosen == [(path, arm, 1e-3) for arm in ("sft", "distilled") for path in (own, other)]
    assert [entry.recipe for entry in report.comparisons] == [own, other]


def test_report_on_the_terminal_names_what_did_not_end(collected):
    console = Console(width=200, record=True, file=io.StringIO())
    terminal.show_sweep(collected, console)
    text = console.export_text()
    for said in ("failed: 3 blocks, 16 rows, distilled: train: it broke", "(not chosen)", "±6.2", "+10.0 ["):
        assert said in text


@pytest.mark.parametrize("width", [20, 40, 80])
def test_report_on_a_narrow_terminal_cuts_no_digit_off(collected, width):
    console = Console(width=width, record=True, file=io.StringIO())
    terminal.show_sweep(collected, console)
    assert "…" not in console.export_text()
    many = [f"{10 + i}.{i % 10} ±{i % 10}.7" for i in range(40)]
    columns = ["model", *(f"task {i}" for i in range(40))]
    terminal.print_table(table.filled(table.titled(""), columns, [["distilled", *many]]), console)
    assert {*" ".join(many).split(), "distilled"} <= {*console.export_text().split()}


def test_report_of_drafts_counts_tokens_of_seeds_together_and_takes_the_best_measured_speed(collected):
    drafts = [(draft.arm, draft.blocks, draft.drafts) for draft in collected.drafts]
    assert drafts == [("pruned", 2, 1), ("distilled", 2, 3), ("pruned", 3, 1)]
    pruned, distilled, _ = (draft.worth.greedy for draft in collected.drafts)
    assert pruned.acceptance == pytest.approx(60 / 140)
    assert distilled.acceptance == pytest.approx((60 + 70 + 80 + 30 + 35 + 40) / (300 + 60 + 70 + 80))
    assert 0 < distilled.acceptance_error < pruned.acceptance_error
    assert (distilled.tokens, distilled.speedup, distilled.speedup_max) == (1, 2.0, 3.0)
    assert distilled.expected_speedup == pytest.approx(1.7 / 1.5) and distilled.break_even_cost == 0.7


def test_report_of_drafts_stands_on_terminal_csv_and_page_with_what_failed(collected, tmp_path):
    console = Console(width=200, record=True, file=io.StringIO())
    terminal.show_sweep(collected, console)
    failed = "draft sft, lr 0.001, blocks 2: draft: it broke"
    for said in ("as drafts of the base", "0.62 ±0.02", "2.00 (1.50 to 3.00)", f"failed: {failed}"):
        assert said in console.export_text(clear=False), said
    lines = list(csv.DictReader(io.StringIO(frame.as_csv(frame.lines(collected)))))
    first = next(line for line in lines if line["arm"] == "distilled")
    assert (first["draft.cost"], first["draft.sampled.tokens"], lines[-1]["draft.cost"]) == ("0.5", "1", "")
    drafts = plots.draft_lines(collected, "acceptance", "a"), plots.draft_lines(collected, "speedup", "speed")
    assert all("distilled, sampled" in figure and "(not chosen)" not in figure for figure in drafts)


def test_report_of_named_blocks_has_their_number_and_no_map(plan, write_all, tmp_path):
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe |= {"prune": {"remove": [0]}, "arms": {"sft": {}}}
    recipe["rows"]["validation"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    axes = {"prune.remove": [[0, 1], [0, 1, 2]]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": axes}))
    storage, named = Storage(str(tmp_path / "named")), planning.load_sweep(tmp_path / "sweep.yaml")
    assert "score" not in {stage.name for stage in named.shared}
    write_all(named, storage)
    report = sweep.collect(named, "sweep.yaml", storage)
    assert [(trial.blocks, trial.values["prune.remove"]) for trial in report.trials] == [(2, [0, 1]), (3, [0, 1, 2])]
    assert [(group.blocks, group.chosen) for group in report.groups] == [(2, True), (3, True)]
    assert report.maps == []
    console = Console(record=True, width=200, file=io.StringIO())
    terminal.show_sweep(report, console)
    assert "remove [0, 1]" in console.export_text()
    assert "sft" in frame.as_csv(frame.lines(report)) and "<html" in page.render_sweep(report, tmp_path)


def test_report_of_mixtures_has_the_sources_of_each_group_as_means_over_seeds(plan, write_all, tmp_path):
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    (tmp_path / "chats.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    chats = recipe["rows"] | {"path": str(tmp_path / "chats.jsonl"), "answer": "none"}
    recipe |= {"rows": [recipe["rows"], chats], "prune": {"remove": [0, 1]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": {"train.seed": [0, 1]}}))
    storage, mixed = Storage(str(tmp_path / "mixed")), planning.load_sweep(tmp_path / "sweep.yaml")

    def by_source(trial: planning.Trial) -> dict:
        losses = {0: 1.0 + trial.train.settings.train.seed, 1: 2.0}
        counts = {"rows_by_source": {0: 12, 1: 4}}
        return {**counts, "final_loss_by_source": losses, "validation_loss_by_source": {1: 0.5}}

    write_all(mixed, storage, by_source)
    report = sweep.collect(mixed, "sweep.yaml", storage)
    assert list(sources.sweep_rows(report)) == [
        ["sft", "2", "16", "rows", "12", "-", "1.500", "-", "-"],
        ["sft", "2", "16", "chats", "4", "-", "2.000", "0.500", "-"],
        ["distilled", "2", "16", "rows", "12", "75%", "1.500", "-", "-"],
        ["distilled", "2", "16", "chats", "4", "100%", "2.000", "0.500", "-"],
    ]
    console = Console(width=200, record=True, file=io.StringIO())
    terminal.show_sweep(report, console)
    assert "sources of rows" in console.export_text() and "Sources of rows" in page.render_sweep(report, tmp_path)
    lines = list(csv.DictReader(io.StringIO(frame.as_csv(frame.lines(report)))))
    assert {line["sources.rows.loss"] for line in lines} == {"1.0", "2.0"}


def test_report_of_depths_has_each_pruned_model_with_its_blocks(collected):
    models = {model.blocks: model for model in collected.models}
    assert models[0].quality.recovery == 100
    assert models[2].quality.recovery == pytest.approx(75) and models[3].quality.recovery == pytest.approx(62.5)
    assert models[3].cost.parameters < models[2].cost.parameters < models[0].cost.parameters
    assert (models[2].cut.removed, models[3].cut.removed) == ((0, 1), (0, 1, 2))


def test_report_of_a_sweep_prints_what_is_inside_an_entry_among_its_own_fields(collected):
    plain = collected.plain()
    done = next(trial for trial in plain["trials"] if trial["status"] == "done")
    assert {"arm", "id", "validation_loss", "tasks", "recovery", "parameters", "draft"} <= done.keys()
    missing = next(trial for trial in plain["trials"] if trial["status"] == "missing")
    assert "recovery" not in missing and missing["draft"] is None
    assert plain["models"][1]["removed"] == [0, 1] and "removed" not in plain["models"][0]
    assert plain["comparisons"][0]["mean"]["n"] == 2 * ITEMS and "maps" not in plain


def test_pipeline_of_a_sweeps_cell_needs_nothing_but_the_sweeps_stages(plan):
    known = {stage.id for stage in planning.stages_of(plan)}
    for cell in plan.cells:
        assert {stage.id for stage in pipeline.chain(cell.recipe).in_order} <= known


def test_sweep_that_fails_before_there_is_a_report_says_why(finished, monkeypatch, capsys):
    folder, _ = finished

    def fail(*_):
        raise StageFailed("disk: is full. Free space.")

    def lack(*_):
        raise UserError("sweep.yaml: has nothing to compare with. Do: sdft sweep sweep.yaml.")

    monkeypatch.setattr(goal, "run", fail)
    monkeypatch.setattr(sweep, "collect", lack)
    assert cli.main(["sweep", str(folder / "sweep.yaml"), "--root", str(folder / "artifacts")]) == 1
    assert "disk: is full. Free space." in capsys.readouterr().err


def test_report_of_metrics_tells_cuts_of_one_depth_apart(collected):
    base, pruned, *_ = collected.models
    other = pruned.model_copy(update={"id": "012345678901", "cut": pruned.cut.model_copy(update={"removed": (1, 3)})})
    report = collected.model_copy(update={"models": (base, pruned, other)})
    assert [report.name_model(model) for model in report.models] == ["base", "pruned, [0, 2)", "pruned, 1, 3"]
    same = report.model_copy(update={"models": (base, pruned, pruned.model_copy(update={"id": other.id}))})
    assert [same.name_model(model) for model in same.models] == ["base", f"pruned, {pruned.id}", "pruned, 012345678901"]


def test_report_of_patched_models_has_the_speed_of_their_shape(tiny_model, tmp_path):
    prune = {"blocks": 2, "patch": "linear"}
    write_recipe(tmp_path, tiny_model, 40, prune=prune, evaluate={"tasks": ["arc_easy"], "speed": True})
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": {"prune.blocks": [2, 3]}}))
    untuned = sweep._Untuned.of(planning.load_sweep(tmp_path / "sweep.yaml"))
    for patched, pruned in untuned.patched.values():
        assert untuned.speeds[patched.id].inputs["pruned"].id == pruned.id
