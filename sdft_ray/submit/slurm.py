"""A recipe or sweep as a Slurm job script: one text for `sbatch`.

In: a recipe or sweep file, a compute file, the root. Out: a script that starts Ray on every node of the job, runs the
command on the first, and ends as it ends. Nodes see the files where they are; only the compute file is in the script,
because it has to join the job's own Ray.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import jinja2

from sdft_ray.errors import UserError, problem
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.loading import dump_yaml, is_sweep, load_recipe
from sdft_ray.spec.wording import validate
from sdft_ray.submit.job import on_cluster, require_shared
from sdft_ray.submit.kuberay import job_name, worker_pods
from sdft_ray.sweep.planning import load_sweep


def render(recipe: Path, compute: Path | None, root: str, until: str | None) -> str:
    """Return the script; raises UserError for mistakes in the files, and for a root that nodes cannot share.

    A node is `ray.largest_node` of the compute file, or the smallest that holds one actor of every stage; there are as
    many as the widest stage can use.
    """
    require_shared(root)
    sweep = is_sweep(recipe)
    if sweep and until:
        raise UserError(problem("--until", "is for recipes", "Leave out --until"))
    load_sweep(recipe) if sweep else load_recipe(recipe)
    data = on_cluster(compute)
    node, nodes = worker_pods(validate(Compute, data))
    data["ray"].pop("largest_node", None)  # an autoscaler's; a job's nodes are all there
    command = ["sdft", "sweep" if sweep else "run", str(recipe), "--root", root]
    where = jinja2.PackageLoader("sdft_ray.submit", ".")
    rules = jinja2.Environment(loader=where, trim_blocks=True, undefined=jinja2.StrictUndefined)
    rules.keep_trailing_newline = True
    return rules.get_template("slurm.sh.jinja").render(
        name=job_name(recipe.stem),
        nodes=nodes,
        cpus=node.cpus,
        gpus=math.ceil(node.gpus),
        compute=dump_yaml(data),
        command=shlex.join([*command, *(["--until", until] if until else [])]),
    )
