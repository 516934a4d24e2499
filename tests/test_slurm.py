"""The job script for Slurm: its options, and its body run by a stand-in for srun, with and without a real Ray."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from recipes import write_recipe

from sdft_ray.errors import UserError
from sdft_ray.submit import slurm

ROOT = Path(__file__).parents[1]
RECIPE, COMPUTE = Path("configs/recipes/gsm8k.yaml"), Path("configs/compute/gpu8.yaml")
# Of sbatch's manual (Slurm 25.05), as far as ours could want them.
OPTIONS = {"account", "chdir", "cpus-per-task", "exclusive", "gpus-per-node", "job-name", "mem", "nodes"}
OPTIONS |= {"ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "signal", "time"}
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
# Runs what stands behind --, as `ray symmetric-run` does on the head.
RAY = """#!/bin/bash
echo "$@" > ray.txt
while [[ $1 != -- ]]; do shift; done
exec "${@:2}"
"""
SDFT = """#!/bin/bash
echo "$@" > sdft.txt
cp "${@: -1}" used.yaml
echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" > token.txt
exit 3
"""


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def run_script(script: str, folder: Path, commands: dict[str, str]) -> subprocess.CompletedProcess:
    """Return what came of a job script on a node with these commands, which only it sees."""
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "job.sh").write_text(script)
    slurm_sets = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NUM_NODES": "1"}
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **slurm_sets}
    return subprocess.run(["bash", "job.sh"], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_script_in_jobs_is_what_is_printed():
    assert (ROOT / "jobs/slurm.sh").read_text() == slurm.render(RECIPE, COMPUTE, "/shared/artifacts", None)


def test_script_asks_for_what_the_compute_file_needs():
    script = slurm.render(RECIPE, COMPUTE, "s3://bucket/a", "distill")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", script, re.MULTILINE))
    assert set(options) <= OPTIONS and options["job-name"] == "sdft-gsm8k"
    assert (options["nodes"], options["cpus-per-task"], options["gpus-per-node"]) == ("8", "4", "1")
    assert "--num-cpus=4 --num-gpus=1 --" in script
    assert f"sdft run {RECIPE} --root s3://bucket/a --until distill --compute" in script


def test_nodes_are_as_large_as_the_compute_file_says(tmp_path):
    compute = yaml.safe_load(COMPUTE.read_text())
    compute["ray"]["largest_node"] = {"cpus": 32, "gpus": 8}
    (tmp_path / "compute.yaml").write_text(yaml.safe_dump(compute))
    script = slurm.render(RECIPE, tmp_path / "compute.yaml", "/shared/a", None)
    assert "#SBATCH --nodes=1\n" in script and "#SBATCH --gpus-per-node=8\n" in script
    assert "largest_node" not in script  # nothing brings another node


@pytest.mark.parametrize(
    ("gpus", "actors", "nodes"), [({"score": 0.25}, {"score": 8}, 2), ({"evaluate": 1}, {"evaluate": 3}, 3)]
)
def test_there_are_as_many_nodes_as_the_widest_stage_fills(tmp_path, gpus, actors, nodes):
    """A node has whole GPUs, which processes of a part of one share."""
    names = ("score", "distill", "train", "evaluate")
    compute = {name: {"cpus": 1, **({"gpus": gpus[name]} if name in gpus else {})} for name in names}
    compute["train"]["workers"] = 1
    for name, count in actors.items():
        compute[name]["actors"] = count
    compute["ray"] = {"largest_node": {"cpus": 16, "gpus": 1}}
    (tmp_path / "compute.yaml").write_text(yaml.safe_dump(compute))
    script = slurm.render(RECIPE, tmp_path / "compute.yaml", "/shared/a", None)
    assert f"#SBATCH --nodes={nodes}\n" in script and "#SBATCH --gpus-per-node=1\n" in script
    del compute["ray"]
    for name in names:
        compute[name]["cpus"] = 1 if name in gpus else 4
    (tmp_path / "compute.yaml").write_text(yaml.safe_dump(compute))
    assert f"#SBATCH --nodes={nodes}\n" in slurm.render(RECIPE, tmp_path / "compute.yaml", "/shared/a", None)


def test_script_of_a_sweep_runs_the_sweep_and_what_nodes_cannot_share_is_refused():
    sweep = Path("configs/sweeps/paper.yaml")
    assert f"sdft sweep {sweep} --root /shared/a" in slurm.render(sweep, COMPUTE, "/shared/a", None)
    with pytest.raises(UserError, match="--until: is for recipes"):
        slurm.render(sweep, COMPUTE, "/shared/a", "cut")
    with pytest.raises(UserError, match="--root: artifacts is relative"):
        slurm.render(RECIPE, COMPUTE, "artifacts", None)
    with pytest.raises(UserError, match=r"compute.score.cpus: auto means the cores of this machine\. Give a number"):
        slurm.render(RECIPE, None, "/shared/a", None)


def test_script_is_bash_and_ends_as_the_command_ends(tmp_path):
    script = slurm.render(RECIPE, COMPUTE, "/shared/a b", None)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, "-"], input=script, text=True, check=True)
    done = run_script(script, tmp_path, {"srun": SRUN, "ray": RAY, "sdft": SDFT})
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "sdft.txt").read_text().startswith(f"run {RECIPE} --root /shared/a b --compute /")
    assert re.match(r"symmetric-run --address \S+:22345 --min-nodes 1 --num-cpus=4", (tmp_path / "ray.txt").read_text())
    used = yaml.safe_load((tmp_path / "used.yaml").read_text())
    assert used["ray"] == {"address": "auto", "wait_seconds": 1800} and used["train"]["zero_stage"] == 3
    assert re.fullmatch(r"token [0-9a-f]{64}\n", (tmp_path / "token.txt").read_text())


def test_script_whose_ray_does_not_start_fails_although_ray_reports_success(tmp_path):
    script = slurm.render(RECIPE, COMPUTE, "/shared/a", None)
    done = run_script(script, tmp_path, {"srun": SRUN, "ray": "#!/bin/bash\nexit 0\n", "sdft": SDFT})
    assert done.returncode == 1
    assert done.stderr == "ray: did not start on all 1 nodes, so nothing was run. See above, and submit again.\n"


# A node of its own: Ray sees no other Ray, and its `ray stop` ends none.
NODE = """
set -e
mount -t tmpfs tmpfs {ray}
ip link set lo up
ip link add node0 type veth peer name node1
ip address add 10.77.0.1/24 dev node0
ip link set node0 up
ip link set node1 up
exec "$@"
"""


@pytest.mark.full
def test_script_runs_a_recipe_on_a_real_ray_and_takes_it_down(tiny_model, tmp_path):
    node = ["unshare", "--pid", "--fork", "--net", "--mount", "--mount-proc"]
    if subprocess.run([*node, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make namespaces")
    write_recipe(tmp_path, tiny_model, where=Path(), prune={"calibration": {"text": "texts.txt", "limit": 3}})
    compute = {"score": {"cpus": 1}, "distill": {"cpus": 1}, "train": {"cpus": 1, "workers": 1}}
    (tmp_path / "compute.yaml").write_text(yaml.safe_dump(compute))
    script = slurm.render(tmp_path / "recipe.yaml", tmp_path / "compute.yaml", str(tmp_path / "root"), "cut")
    Path("/tmp/ray").mkdir(exist_ok=True)
    folder, ray = tmp_path / "bin", Path(sys.executable).parent
    folder.mkdir()
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "node.sh").write_text(NODE.format(ray="/tmp/ray"))
    environment = {**os.environ, "PATH": f"{folder}:{ray}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "HOME": str(tmp_path)}
    command = [*node, "bash", "node.sh", "bash", "job.sh"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "root" / "cut").glob("*/manifest.json"))
