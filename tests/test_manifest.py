"""The RayJob that is printed has KubeRay's fields, what the compute file asks for, and no secret."""

import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sdft_ray.errors import UserError
from sdft_ray.submit import kuberay

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
    assert (ROOT / "jobs/rayjob.yaml").read_text() == kuberay.render(
        RECIPE, COMPUTE, "/shared/artifacts", None, "sdft-ray:0.1.0"
    )


@pytest.mark.parametrize("root", ["/shared/artifacts", "s3://bucket/artifacts"])
def test_manifest_has_kuberays_fields_and_what_the_compute_file_asks_for(root):
    files, job = yaml.safe_load_all(kuberay.render(RECIPE, COMPUTE, root, "distill", "registry/image:1"))
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


def closed(schema: Any) -> Any:
    """Return a schema that refuses what Kubernetes would drop without a word, and takes numbers where it does."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: closed(part) for key, part in schema.items()}
    if parts.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], **{key: parts[key] for key in parts if key == "pattern"}}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        parts.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return parts


@pytest.mark.parametrize("root", ["/shared/artifacts", "s3://bucket/artifacts"])
def test_manifest_is_valid_by_the_schema_of_kuberay(root):
    if not (definition := os.environ.get("SDFT_KUBERAY_CRD")):
        pytest.skip("set SDFT_KUBERAY_CRD to KubeRay's ray.io_rayjobs.yaml")
    (version,) = (
        each["schema"]["openAPIV3Schema"]
        for each in yaml.safe_load(Path(definition).read_text())["spec"]["versions"]
        if each["name"] == "v1"
    )
    rules = closed(version)
    rules["properties"]["metadata"] = {"type": "object"}  # which Kubernetes itself looks at
    _, job = yaml.safe_load_all(kuberay.render(RECIPE, COMPUTE, root, "distill", "registry/image:1"))
    check = jsonschema.Draft202012Validator(rules)
    assert [f"{error.json_path}: {error.message}" for error in check.iter_errors(job)] == []
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["container"] = []
    job["spec"]["backoffLimit"] = "3"
    assert {error.json_path for error in check.iter_errors(job)} == {
        "$.spec.backoffLimit",
        "$.spec.rayClusterSpec.headGroupSpec.template.spec",
    }


def test_manifest_of_files_on_this_machine_or_of_this_machines_cores_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"compute.score.cpus: auto means the cores of this machine\. Give a number"):
        kuberay.render(RECIPE, None, "/shared/a", None, "image")
    recipe = yaml.safe_load(RECIPE.read_text())
    (tmp_path / "texts.txt").write_text("One text.\n\nAnother text.\n\nA third text.")
    recipe["prune"]["calibration"] = {"text": str(tmp_path / "texts.txt")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=r"texts\.txt is a path of this machine, and a manifest carries no files"):
        kuberay.render(tmp_path / "recipe.yaml", COMPUTE, "/shared/a", None, "image")
    with pytest.raises(UserError, match="--root: artifacts is relative"):
        kuberay.render(RECIPE, COMPUTE, "artifacts", None, "image")


@pytest.mark.parametrize(
    "stem",
    [
        *("gsm8k", "1b", "Größe_2.5", "日本語", "__", "-", "--x--", "a b", "v1.0-rc.1", "a" * 39 + "-b", "a" * 300),
        *("x" * 42, "x" * 43, "name-" * 12, ".yaml", "UPPER", "\udcff"),
    ],
)
def test_job_of_any_recipe_name_has_a_name_that_kubernetes_takes(stem):
    name = kuberay.job_name(stem)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)  # RFC 1035, which KubeRay asks for
    assert len(name) <= 47  # KubeRay's MaxRayJobNameLength


def test_jobs_of_different_recipe_names_have_different_names():
    stems = ["a-b", "a_b", "a.b", "A-b", "-a-b", "日本", "中国", "x" * 60 + "1", "x" * 60 + "2", "x" * 60]
    assert len({kuberay.job_name(stem) for stem in stems}) == len(stems)
    assert kuberay.job_name("a_b") == kuberay.job_name("a_b")
    assert kuberay.job_name("gsm8k-7b") == "sdft-gsm8k-7b"


def test_manifest_of_a_recipe_with_an_unusual_name_calls_its_objects_by_one_valid_name(tmp_path):
    recipe = tmp_path / f"{'Llama_3.1 Größe ' * 6}.yaml"
    recipe.write_text(RECIPE.read_text())
    files, job = yaml.safe_load_all(kuberay.render(recipe, COMPUTE, "/shared/a", None, "image"))
    name = kuberay.job_name(recipe.stem)
    assert (files["metadata"]["name"], job["metadata"]["name"]) == (name, name)
    pods = [job["spec"]["rayClusterSpec"]["headGroupSpec"], *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    for pod in pods:
        assert pod["template"]["spec"]["volumes"][0]["configMap"]["name"] == name
