"""The notebook of the docs runs, on a tiny model."""

from pathlib import Path

from notebook import run_cells

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def test_notebook_runs_from_model_to_frames(ray_cluster, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, models, frame, depths, blocks = run_cells(NOTEBOOK, MODEL={"path": str(tiny_model)})
    assert [*models] == [*frame.model] == ["base", "pruned", "sft", "distilled"]
    assert frame.recovery[0] == 100 and frame.parameters[1] < frame.parameters[0]
    assert [*depths.index] == [3, 5] and [*depths.columns] == ["distilled", "sft"]
    assert blocks == 3
