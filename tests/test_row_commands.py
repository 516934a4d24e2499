"""Calibration texts, `init`, `check` and `submit` take the kinds of files that rows may come from."""

import os
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from row_files import ONE_FILE, pack, save

from sdft_ray import cli
from sdft_ray.data import calibration, files, readers
from sdft_ray.errors import UserError
from sdft_ray.spec.sources import Calibration, FileRows
from sdft_ray.stages.rows import stage
from sdft_ray.store.files import hash_file
from sdft_ray.submit import job, kuberay

pytestmark = pytest.mark.usefixtures("own_cache")


# --- calibration texts ----------------------------------------------------------------------------------------

TEXTS = ["One text.", "Two texts.", "Three texts."]


@pytest.mark.parametrize("name", [*ONE_FILE, "texts.txt", "texts.txt.gz", "texts.txt.zst"])
def test_calibration_texts_are_the_same_from_every_kind_of_file(tmp_path, name):
    path = tmp_path / name
    if ".txt" in name:
        pack(path, "\n\n".join(TEXTS).encode())
    else:
        save([{"text": text} for text in TEXTS], path)
    assert calibration.read_calibration(path, "text", 9) == TEXTS
    (corpus,) = calibration.describe_corpora((Calibration(text=str(path)),), (None,))
    assert corpus.sha256 == hash_file(path)


def test_calibration_texts_of_a_directory_or_glob_are_read_in_order(tmp_path, monkeypatch):
    folder = tmp_path / "corpus"
    save([{"text": TEXTS[1]}], folder / "b.csv")
    for name, text in {"a.txt": TEXTS[0], "c.txt": TEXTS[2], "README.txt": "Not a text."}.items():
        (folder / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    for path in ("corpus", "corpus/*"):
        (corpus,) = calibration.describe_corpora((Calibration(text=path),), (None,))
        assert (corpus.name, corpus.path) == ("corpus", str(tmp_path / path))
        assert corpus.sha256 == sha256_of_all([folder / name for name in ("a.txt", "b.csv", "c.txt")])
        assert calibration.read_calibration(Path(path), "text", 9) == TEXTS


def sha256_of_all(paths: list[Path]) -> str:
    return files.hash_content(paths, "several")


# --- commands -------------------------------------------------------------------------------------------------

SUMS = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(60)]


@pytest.mark.parametrize("rows", ["data", "data/*", "data/**/*.csv.gz", "rows.csv", "saved"])
def test_init_check_and_submit_take_every_form(tiny_model, tmp_path, monkeypatch, capsys, rows):
    monkeypatch.chdir(tmp_path)
    for start in (0, 30):
        save(SUMS[start : start + 30], tmp_path / "data" / f"{start:02}.csv.gz")
    save(SUMS, tmp_path / "rows.csv")
    datasets.Dataset.from_list(SUMS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"")
    assert cli.main(["init", "--model", str(tiny_model), "--rows", rows]) == 0, capsys.readouterr().err
    assert cli.main(["check", "recipe.yaml"]) == 0, capsys.readouterr().err
    with pytest.raises(UserError, match=rf"{tmp_path / rows.split('*')[0]}.* is a path of this machine") as error:
        values = yaml.safe_load(Path("recipe.yaml").read_text())
        Path("rows-only.yaml").write_text(yaml.safe_dump({**values, "model": {"repo": "a/b", "revision": "0" * 40}}))
        kuberay.render(Path("rows-only.yaml"), None, "/r", None, "image")
    assert len(error.value.problems) == 1
    packed = unpack(Path("recipe.yaml"), tmp_path)
    monkeypatch.chdir(packed)
    inside = yaml.safe_load(Path("recipe.yaml").read_text())["rows"]
    assert not Path(inside["path"]).is_absolute()
    monkeypatch.chdir(tmp_path)
    there = FileRows.model_validate({**inside, "path": str(packed / inside["path"])})
    here = FileRows.model_validate({**inside, "path": rows})
    assert (stage(there, "offline").id, stage(there, "offline").slug) == (
        stage(here, "offline").id,
        stage(here, "offline").slug,
    )
    assert readers.read_rows(there) == readers.read_rows(here)


def unpack(recipe: Path, folder: Path) -> Path:
    """Return the directory of a packed job."""
    job.pack(recipe, None, "/r", None, folder / "job.zip")
    shutil.unpack_archive(folder / "job.zip", folder / "job[0]")
    return folder / "job[0]"


@pytest.mark.parametrize("rows", ["data", "data/*.csv"])
def test_rows_below_the_root_stay_there(tmp_path, monkeypatch, rows):
    save(SUMS, tmp_path / "data" / "rows.csv")
    shipped: dict[Path, str] = {}
    value = str(tmp_path / rows)
    assert job.with_shipped({"path": value}, "", str(tmp_path), shipped) == {"path": value} and not shipped
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^path: none/\*\.csv does not exist\. Check the path"):
        job.with_shipped({"path": "none/*.csv"}, "", "/r", shipped)
    assert job.with_shipped({"path": "/none/*.csv"}, "", "/r", shipped) == {"path": "/none/*.csv"}


def test_a_large_glob_does_not_travel(tmp_path):
    save(SUMS, tmp_path / "data" / "rows.csv")
    os.truncate(tmp_path / "data" / "rows.csv", 200_000_000)  # sparse
    assert round(job.size_mb(tmp_path / "data" / "*.csv")) == 200
