"""The Python surface: what `from sdft_ray import run, sweep, report` promises, frozen."""

import inspect
import subprocess
import sys

import numpy as np
import pandas
import pytest
import yaml
from recipes import write_recipe

import sdft_ray
from sdft_ray import report, run, sweep
from sdft_ray.errors import UserError
from sdft_ray.store.storage import Storage
from sdft_ray.sweep import goal, planning

# Whoever changes a line here breaks the code of others: add parameters with defaults at most.
SURFACE = {
    "run": "(recipe: 'Source', *, compute: 'Source | None' = None, root: 'str | os.PathLike[str]' = './artifacts', "
    "overrides: 'Mapping[str, Any] | None' = None, until: 'str | None' = None) -> 'dict[str, str]'",
    "sweep": "(sweep: 'Source', *, compute: 'Source | None' = None, root: 'str | os.PathLike[str]' = './artifacts') "
    "-> 'dict[str, str]'",
    "report": "(source: 'Source', *, root: 'str | os.PathLike[str]' = './artifacts', "
    "overrides: 'Mapping[str, Any] | None' = None) -> 'pandas.DataFrame'",
}


def test_surface_is_frozen():
    assert {*SURFACE} == {*sdft_ray.__all__}
    for name, signature in SURFACE.items():
        function = getattr(sdft_ray, name)
        assert str(inspect.signature(function)) == signature and "Return" in (function.__doc__ or "").title()


def test_surface_stays_functions_beside_folders_of_the_same_names():
    assert sdft_ray.sweep is sweep and sdft_ray.report is report and sdft_ray.run is run
    assert planning.__name__ == "sdft_ray.sweep.planning"
    with pytest.raises(AttributeError, match="no attribute 'swep'"):
        _ = sdft_ray.swep


def test_surface_import_loads_nothing_heavy():
    code = "import sys; from sdft_ray import run, sweep, report; import sdft_ray.sweep.planning; "
    code += (
        "print([m for m in ('torch', 'ray', 'pandas', 'transformers') if m in sys.modules], sdft_ray.sweep is sweep)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_report_of_a_sweep_has_a_line_for_each_trial_by_file_and_by_content(finished, monkeypatch):
    folder, collected = finished
    frame = report(folder / "sweep.yaml", root=folder / "artifacts")
    assert len(frame) == len(collected.trials) == 9
    assert {*frame.status} == {"done", "missing", "failed"}
    done = frame[frame.status == "done"].set_index("id")
    for trial in collected.trials:
        if trial.result:
            assert done.loc[trial.id, "recovery"] == pytest.approx(trial.result.quality.recovery)
            assert done.loc[trial.id, "arc_easy"] == trial.result.quality.tasks["arc_easy"].value
    monkeypatch.chdir(folder)
    content = yaml.safe_load((folder / "sweep.yaml").read_text())
    pandas.testing.assert_frame_equal(report(content, root="artifacts"), frame)


def test_report_of_a_recipe_that_is_not_finished_says_so(finished):
    folder, _ = finished
    with pytest.raises(UserError, match=r"recipe.yaml: is not finished under .*artifacts \(missing: "):
        report(str(folder / "recipe.yaml"), root=folder / "artifacts", overrides={"train.rows": 8})


def test_sweep_tells_two_trials_of_one_name_apart(plan, write_all, tmp_path, monkeypatch):
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text()) | {"arms": {"distilled": {}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    axes = [{"train.seed": [1]}, {"distill.seed": [1]}]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": axes}))
    both, storage = planning.load_sweep(tmp_path / "sweep.yaml"), Storage(str(tmp_path / "both"))
    write_all(both, storage)
    monkeypatch.setattr(goal, "run", lambda *_: None)
    models = sweep(tmp_path / "sweep.yaml", root=tmp_path / "both")
    assert [*models] == ["distilled, seed 1", "distilled, seed 1-2"] and len({*models.values()}) == 2


def test_overrides_may_be_numbers_of_numpy_and_paths_and_are_of_recipes(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.setenv("HOME", str(folder))
    overrides = {"train.rows": np.int64(8), "train.lr": np.float32(0.5), "rows.path": folder / "rows.jsonl"}
    overrides |= {"distill.template": "😀 {prompt} {reference}"}
    with pytest.raises(UserError, match=r"is not finished under .*train"):
        report("~/recipe.yaml", root=folder / "artifacts", overrides=overrides)
    with pytest.raises(UserError, match=r"^overrides: are for recipes\. Change the sweep\.$"):
        report(folder / "sweep.yaml", root=folder / "artifacts", overrides={"train.rows": 8})


def test_run_of_a_wrong_value_is_the_commands_line(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"^--until: ctu is no stage\. Did you mean cut\?"):
        run(write_recipe(tmp_path, tiny_model), root=tmp_path, until="ctu")
    with pytest.raises(UserError, match=r"train\.lrr: unknown key\. Did you mean lr\?"):
        run({"model": {"path": "m"}, "train": {"lrr": 1}}, root=tmp_path)
    with pytest.raises(UserError, match=r"^axes: "):
        sweep({"recipe": "recipe.yaml", "axes": 3}, root=tmp_path)
