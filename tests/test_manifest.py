"""The RayJob that is printed has KubeRay's fields, what the compute file asks for, and no secret."""

from pathlib import Path

import pytest
import yaml

from sdft_ray import manifest
from sdft_ray.errors import UserError

ROOT = Path(__file__).parents[1]
RECIPE, COMPUTE = ROOT / "configs/recipes/gsm8k.yaml", ROOT / "configs/compute/gpu8.yaml"

# Of KubeRay's CRD ray.io/v1 (2026-08): the fields that a RayJob may have, as far as ours could want them.
JOB = {
    *("entrypoint", "runtimeEnvYAML", "submissionMode", "submitterConfig", "submitterPodTemplate", "backoffLimit"),
    *("activeDeadlineSeconds", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec", "suspend"),
}
CLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec"}
CLUSTER |= {"workerGroupSpecs", "gcsFaultToleranceOptions", "networkPolicy"}
AUTOSCALER = {"version", "idleTimeoutSeconds", "upscalingMode", "resources", "env", "envFrom"}
HEAD = {"rayStartParams", "template", "serviceType", "labels", "resources"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "numOfHosts"}
WORKERS |= {"rayStartParams", "template", "labels", "resources"}
POD = {"containers", "volumes", "serviceAccountName", "automountServiceAccountToken", "nodeSelector", "tolerations"}
CONTAINER = {"name", "image", "resources", "env", "envFrom", "volumeMounts", "securityContext"}


def test_the_manifest_in_jobs_is_what_is_printed():
    assert (ROOT / "jobs/rayjob.yaml").read_text() == manifest.render(
        RECIPE, COMPUTE, "/shared/artifacts", None, "sdft-ray:0.1.0"
    )


@pytest.mark.parametrize("root", ["/shared/artifacts", "s3://bucket/artifacts"])
def test_manifest_has_kuberays_fields_and_what_the_compute_file_asks_for(root):
    files, job = yaml.safe_load_all(manifest.render(RECIPE, COMPUTE, root, "distill", "registry/image:1"))
    assert yaml.safe_load(files["data"]["recipe.yaml"]) == yaml.safe_load(RECIPE.read_text())
    compute = yaml.safe_load(files["data"]["compute.yaml"])
    assert compute["ray"] == {"address": "auto", "wait_seconds": 1800, "largest_node": {"cpus": 4, "gpus": 1.0}}

    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= JOB and spec["entrypoint"].endswith(f"--root {root} --until distill")
    assert (
        spec["shutdownAfterJobFinishes"]
        and spec["backoffLimit"] == 3
        and set(spec["submitterConfig"]) == {"backoffLimit"}
    )
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= CLUSTER and cluster["authOptions"] == {"mode": "token"}
    assert set(cluster["autoscalerOptions"]) <= AUTOSCALER
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(head) <= HEAD and set(workers) <= WORKERS
    assert (workers["minReplicas"], workers["maxReplicas"]) == (0, 8)
    for group, gpus in ((head, None), (workers, 1)):
        pod = group["template"]["spec"]
        assert set(pod) <= POD
        (container,) = pod["containers"]
        assert set(container) <= CONTAINER and container["image"] == "registry/image:1"
        assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
        assert container["envFrom"] == [{"secretRef": {"name": "sdft-secrets", "optional": True}}]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert volumes == {mount["name"] for mount in container["volumeMounts"]}
        assert ("root" in volumes) == root.startswith("/")


def test_manifest_of_files_on_this_machine_or_of_this_machines_cores_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"compute.score.cpus: auto means the cores of this machine\. Give a number"):
        manifest.render(RECIPE, None, "/shared/a", None, "image")
    recipe = yaml.safe_load(RECIPE.read_text())
    (tmp_path / "texts.txt").write_text("One text.")
    recipe["prune"]["calibration"] = {"text": str(tmp_path / "texts.txt")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=r"texts\.txt is a path of this machine, and a manifest carries no files"):
        manifest.render(tmp_path / "recipe.yaml", COMPUTE, "/shared/a", None, "image")
    with pytest.raises(UserError, match="--root: artifacts is relative"):
        manifest.render(RECIPE, COMPUTE, "artifacts", None, "image")
