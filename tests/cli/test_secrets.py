"""A secret of the shell is in nothing that is written or said."""

from pathlib import Path

import yaml
from command import sdft
from recipes import write_recipe

SECRETS = {
    "HF_TOKEN": "hf_PLANTED0hub",
    "RAY_AUTH_TOKEN": "PLANTED1ray" * 4,
    "AWS_ACCESS_KEY_ID": "PLANTED2key",
    "AWS_SECRET_ACCESS_KEY": "PLANTED3secret",
    "WANDB_API_KEY": "PLANTED4wandb",
}


def test_planted_secrets_are_in_no_file_and_no_output(tiny_model, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    recipe = write_recipe(tmp_path, tiny_model, where=Path())
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(recipe))
    hub = {"repo": "some/model", "revision": "0" * 40}
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump({**recipe, "model": hub}))
    (tmp_path / "nowhere.yaml").write_text(
        "ray: {address: '127.0.0.1:1'}\nscore: {cpus: 1}\ndistill: {cpus: 1}\ntrain: {cpus: 1}"
    )
    commands = [
        ("run", "here.yaml", "--until", "rows"),
        ("run", "hub.yaml"),  # no hub answers: a failure, with whatever it writes about that
        ("run", "here.yaml", "--compute", "nowhere.yaml"),
        ("check", "here.yaml", "--json"),
        ("doctor", "hub.yaml", "--compute", "nowhere.yaml", "--json"),
        (
            "submit",
            "hub.yaml",
            "--compute",
            "nowhere.yaml",
            "--address",
            "http://127.0.0.1:1",
            "--root",
            str(tmp_path / "root"),
        ),
    ]
    said = []
    for command in commands:
        done = sdft(*command, cwd=tmp_path)
        assert "Traceback" not in done.stderr, done.stderr
        said.append(done.stdout + done.stderr)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(list((tmp_path / "artifacts").glob("rows/*/manifest.json"))) == 1 and all(said)
    for secret in SECRETS.values():
        assert [path for path, content in written.items() if secret.encode() in content] == []
        assert [text for text in said if secret in text] == []
