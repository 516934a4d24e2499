"""How much quality each way wins back at one depth, and at what cost: `python -m benchmarks.recover`.

In: nothing; the demo's small model and rows. Out: a table of models (untrained, patched, sft, distilled, logits,
patched and then logits) with recovery, divergence from the base and seconds, and the figures as the last line. All arms
see the same number of rows in the same steps. The table is what two runs of `sdft run` report; whatever was built under
--root is not built again. With the default sizes about 40 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import print_figures

DEMO = Path(__file__).parents[1] / "configs" / "recipes" / "demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("artifacts"), help="where artifacts are")
    parser.add_argument("--blocks", type=int, default=5, help="blocks to remove")
    parser.add_argument("--rows", type=int, default=160, help="training rows of each arm")
    parser.add_argument("--limit", type=int, default=100, help="items of each task")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    measure(parser.parse_args())


def measure(options: argparse.Namespace) -> None:
    """Run both recipes, and print everything."""
    options.root.mkdir(exist_ok=True)
    arms: dict[str, Any] = {"sft": {}, "distilled": {}, "logits": {}}
    plain = run(options, "none", arms)
    patched = run(options, "linear", {"logits": {}})
    models = {name: plain[name] for name in ("base", "pruned", "sft", "distilled", "logits")}
    models |= {"patched": patched["patched"], "patched, logits": patched["logits"]}
    print(f"{'model':<16} {'recovery %':>10} {'KL responses':>13} {'KL texts':>9} {'own seconds':>12}")
    for name, model in models.items():
        kept = [model["retention"].get(kind, {}).get("kl", {}).get("value") for kind in ("responses", "texts")]
        shown = [
            f"{value:>{width}.3f}" if value is not None else "-" for value, width in zip(kept, (13, 9), strict=True)
        ]
        print(f"{name:<16} {model['recovery'] or 0:>10.1f} {' '.join(shown)} {model['seconds']:>12.1f}")
    print_figures("recover", figures_of(models, options.root))


def run(options: argparse.Namespace, patch: str, arms: dict[str, Any]) -> dict[str, Any]:
    """Return every model of one recipe as the report has it, by name, with the seconds that it took to make."""
    recipe = yaml.safe_load(DEMO.read_text())
    recipe["prune"] |= {"blocks": options.blocks, "patch": patch}
    recipe["prune"]["calibration"] |= {"limit": 200, "held_back": 40}
    recipe["train"] |= {"rows": options.rows}
    recipe["evaluate"] |= {"limit": options.limit, "retention": {"rows": 24, "texts": 32}}
    recipe["arms"] = arms
    file = options.root / f"recover-{patch}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    overrides = [word for value in options.set for word in ("--set", value)]
    command = [
        sys.executable,
        "-m",
        "sdft_ray.cli",
        "run",
        str(file),
        "--root",
        str(options.root),
        "--json",
        *overrides,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    models = {model["model"]: model for model in json.loads(done.stdout)["models"]}
    return {name: model | {"seconds": seconds_of(options.root, model["id"])} for name, model in models.items()}


def seconds_of(root: Path, artifact: str) -> float:
    """Return how long it took to make an artifact."""
    (manifest,) = root.glob(f"*/*-{artifact}/manifest.json")
    return float(json.loads(manifest.read_text())["provenance"]["wall_seconds"])


def figures_of(models: dict[str, Any], root: Path) -> dict[str, float]:
    """Return the figures: gains in points of recovery, and ratios of divergences and of seconds."""

    def points(first: str, second: str) -> float:
        return float(models[first]["recovery"] - models[second]["recovery"])

    def divergence(first: str, second: str, kind: str) -> float:
        one, other = (models[name]["retention"][kind]["kl"]["value"] for name in (first, second))
        return float(one / other)

    (score,) = {manifest for manifest in root.glob("score/*/manifest.json") if _is_of(manifest, models["pruned"]["id"])}
    score_seconds = json.loads(score.read_text())["provenance"]["wall_seconds"]
    figures = {
        "patch_recovery_gain": points("patched", "pruned"),
        "logits_over_distilled_points": points("logits", "distilled"),
        "patch_seconds_over_score": models["patched"]["seconds"] / score_seconds,
        "logits_over_distilled_seconds": models["logits"]["seconds"] / models["distilled"]["seconds"],
    }
    for kind in ("responses", "texts"):
        figures[f"patched_over_pruned_kl_{kind}"] = divergence("patched", "pruned", kind)
        figures[f"logits_over_distilled_kl_{kind}"] = divergence("logits", "distilled", kind)
    return {name: round(value, 4) for name, value in figures.items()}


def _is_of(score: Path, pruned: str) -> bool:
    """Return whether a pruned model was cut by a scoring."""
    (cut,) = score.parents[2].glob(f"cut/*-{pruned}/manifest.json")
    scored = json.loads(cut.read_text())["identity"]["inputs"]["score"]
    return score.parent.name.endswith(f"-{scored}")


if __name__ == "__main__":
    main()
