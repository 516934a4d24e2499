"""A recipe as a RayJob of KubeRay: one YAML text for `kubectl apply`.

In: a recipe, a compute file, the root. Out: a ConfigMap with both files and a RayJob whose cluster starts, grows,
shrinks and ends with it. The text is a template with comments: a person has to read it before it costs money.
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
import unicodedata
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import yaml

from sdft_ray.cluster import RayNode, count_places
from sdft_ray.errors import UserError, problem
from sdft_ray.spec.compute import Compute, Node
from sdft_ray.spec.loading import dump_yaml, is_sweep, load_recipe, read_yaml
from sdft_ray.spec.wording import validate
from sdft_ray.store.objects import is_store
from sdft_ray.submit.job import on_cluster, require_shared, with_shipped

_NAME_CHARACTERS = 47  # of a RayJob: KubeRay makes those of its cluster and services from it
_GB_A_CPU = 8  # memory request by CPUs: an 8B model in bfloat16 is 16 GB, and a GPU has four CPUs or more


def render(recipe: Path, compute: Path | None, root: str, until: str | None, image: str) -> str:
    """Return the manifest; raises UserError for what a cluster that does not exist yet cannot have."""
    require_shared(root)
    if is_sweep(recipe):
        raise UserError(problem(str(recipe), "is a sweep", "Give one of its recipes"))
    load_recipe(recipe)
    data = on_cluster(compute)
    local: dict[Path, str] = {}
    with_shipped([read_yaml(recipe), data], "", root, local)
    for path in local:
        what = f"{path} is a path of this machine, and a manifest carries no files"
        raise UserError(problem(str(recipe), what, "Put it where every node sees it and give that path"))
    pod, replicas = worker_pods(validate(Compute, data))
    data["ray"] |= {"largest_node": pod.model_dump(mode="json")}
    command = ["sdft", "run", "/etc/sdft/recipe.yaml", "--compute", "/etc/sdft/compute.yaml", "--root", root]
    return _template().render(
        name=job_name(recipe.stem),
        recipe=recipe.read_text(encoding="utf-8-sig").rstrip(),
        compute=dump_yaml(data),
        root=root,
        is_path=not is_store(root),
        entrypoint=shlex.join([*command, *(["--until", until] if until else [])]),
        image=image,
        ray=metadata.version("ray"),
        pod=pod,
        gpus=math.ceil(pod.gpus),
        memory=pod.cpus * _GB_A_CPU,
        replicas=replicas,
    )


def job_name(name: str) -> str:
    """Return the name of a recipe's RayJob: letters, digits and hyphens, which KubeRay and Kubernetes take.

    A recipe's name that changes on the way, or is cut, gets a few digits of its hash: no two recipes share a job.

    >>> job_name("gsm8k"), job_name("Größe_2.5")
    ('sdft-gsm8k', 'sdft-groe-2-5-ad79b0')
    """
    plain = unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if plain and plain == name and len(f"sdft-{name}") <= _NAME_CHARACTERS:
        return f"sdft-{name}"
    digits = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:6]
    kept = f"sdft-{plain}"[: _NAME_CHARACTERS - len(digits) - 1].rstrip("-")
    return f"{kept}-{digits}"


def worker_pods(compute: Compute) -> tuple[Node, int]:
    """Return the resources of one worker pod, and how many pods the widest stage can use.

    A pod is `ray.largest_node`, or the smallest that holds one actor of every stage.
    """
    widest = {
        "score": (compute.score.actors, compute.score.cpus, compute.score.gpus),
        "distill": (compute.distill.actors.max * compute.distill.nodes, compute.distill.cpus, compute.distill.gpus),
        "train": (compute.train.workers.max, compute.train.cpus, compute.train.gpus),
        "evaluate": (compute.evaluate.actors, compute.evaluate.cpus, compute.evaluate.gpus),
    }
    for name, (_, cpus, _) in widest.items():
        if cpus == "auto":
            what = "auto means the cores of this machine"
            raise UserError(problem(f"compute.{name}.cpus", what, "Give a number: the nodes do not exist yet"))
    needs = [(count, int(cpus), gpus) for count, cpus, gpus in widest.values()]
    whole = math.ceil(max(need[2] for need in needs))  # no pod has a part of a GPU
    pod = compute.ray.largest_node or Node(cpus=max(need[1] for need in needs), gpus=whole)
    pods = 1
    for count, cpus, gpus in needs:
        in_one = count_places([RayNode(pod.cpus, math.ceil(pod.gpus))], cpus, gpus)
        if in_one == 0:
            what = f"{pod.cpus} CPUs and {pod.gpus:g} GPUs hold no actor of {cpus} CPUs and {gpus:g} GPUs"
            raise UserError(problem("compute.ray.largest_node", what, "Raise compute.ray.largest_node"))
        pods = max(pods, math.ceil(count / in_one))
    return pod, pods


def _template() -> Any:
    where = jinja2.PackageLoader("sdft_ray.submit", ".")
    rules = jinja2.Environment(loader=where, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    rules.filters.update(quoted=lambda text: yaml.safe_dump(text, default_style='"', width=10_000).strip())
    return rules.get_template("rayjob.yaml.jinja")
