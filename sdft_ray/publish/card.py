"""The card of a model for a hub: what it is, how good it is, what it was made from, and how to load it.

In: where a model comes from. Out: README.md with the front matter that hubs read. Every figure is of a manifest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jinja2

from sdft_ray.core.recovery import recovery
from sdft_ray.core.surgery import name_blocks
from sdft_ray.publish.origin import Origin, Scored
from sdft_ray.report.lines import interval, percent
from sdft_ray.spec.loading import dump_yaml
from sdft_ray.stages import merge, model, patch, whole
from sdft_ray.store.manifest import Lineage

_LICENCE = re.compile(r"licen[cs]e|copying", re.IGNORECASE)
_KINDS = {
    "cut": "Every other weight is the base's, bit by bit. **Its quality is not restored**: fine-tune it before use.",
    "patch": "A linear map that stands in for them is folded into the block before them. Nothing was trained.",
    "train": "What is left was fine-tuned.",
    "merge": "What is left was fine-tuned, on several kinds of rows apart, and the tuned models were merged.",
    "whole": "What is left of its text decoder was fine-tuned; all else is the base's, bit by bit. Scores are on text.",
}
STAGES = tuple(_KINDS)
"""The kinds of stages whose artifacts are models that were made here."""


def write_card(origin: Origin, name: str, base: str | None, files: Sequence[str], dataset: str | None) -> str:
    """Return README.md of a model.

    name: its name on the hub; base: that of the base, where the manifests do not have it; files: paths of the model's
    files; dataset: the name on the hub of the rewrites that it was trained on, where they are there.
    """
    base = base or (origin.base.identity.settings.get("repo") if origin.base else None)
    removed, shared = origin.cut, [scored for scored in origin.scores if scored.base]
    licence = next((file for file in files if _LICENCE.match(file)), None)
    return _template().render(
        front=_front(origin, name, base, licence, dataset),
        title=name.rpartition("/")[2],
        name=name,
        base=base or _base_name(origin),
        blocks=removed.blocks + len(removed.removed),
        removed=removed,
        span=name_blocks(removed.removed),
        kind=_KINDS[origin.model.stage],
        loader="AutoModelForImageTextToText" if origin.model.stage == "whole" else "AutoModelForCausalLM",
        facts=_facts(origin),
        sources=origin.sources,
        dataset=dataset,
        licence=licence,
        scores=[_score_row(scored) for scored in origin.scores],
        limited=any(scored.score.limited for scored in origin.scores),
        recovery=recovery([scored.score for scored in shared], [scored.base for scored in shared if scored.base])
        if shared
        else None,
        mean=interval(origin.mean_difference) if origin.mean_difference else None,
        ggufs=[file for file in files if file.endswith(".gguf")],
        adapter=any(file.startswith("adapter/") for file in files),
        recipe=dump_yaml(_recipe(origin)),
        version=origin.model.provenance.packages.get("sdft-ray", ""),
    )


def _base_name(origin: Origin) -> str:
    """Return what the base is called where it is on no hub."""
    return model.Summary.model_validate(origin.base.summary).source if origin.base else "a model of its maker's own"


def _front(origin: Origin, name: str, base: str | None, licence: str | None, dataset: str | None) -> str:
    from huggingface_hub import ModelCardData

    datasets = [*([dataset] if dataset else []), *(source.repo for source in origin.sources if source.repo)]
    data = ModelCardData(
        base_model=base,
        base_model_relation="finetune" if base else None,
        datasets=datasets or None,
        license="other" if licence else None,
        license_name="that-of-the-base" if licence else None,
        license_link=licence,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if origin.model.stage == "whole" else "text-generation",
        tags=["depth-pruning", "layer-pruning", "self-data-distillation", "sdft-ray"],
        model_name=name.rpartition("/")[2] if origin.scores else None,
        eval_results=_results(origin.scores) or None,
    )
    return str(data.to_yaml())


def _results(scores: Sequence[Scored]) -> list[Any]:
    """Return scores as the hub's model index has them, in percent."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=scored.task,
            dataset_name=f"{scored.task}, {scored.score.n} items",
            metric_type=scored.score.metric,
            metric_name=scored.score.metric,
            metric_value=round(100 * scored.score.value, 2),
        )
        for scored in scores
    ]


def _facts(origin: Origin) -> list[tuple[str, str]]:
    """Return what is known of a model, by what it is called."""
    removed = origin.cut
    chosen = {"remove": "named by the recipe", "tail": "the last ones"}.get(removed.metric, f"by {removed.metric}")
    if removed.agreement is not None:
        chosen += f"; {removed.agreement:.0%} of bootstrap samples choose the same"
    facts = [
        ("blocks", f"{removed.blocks}"),
        ("parameters", f"{removed.parameters:,}"),
        ("choice of blocks", chosen),
    ]
    for manifest in origin.ancestors:
        if manifest.stage == "whole":
            facts.append(("parameters of the whole", f"{whole.Summary.model_validate(manifest.summary).parameters:,}"))
        if manifest.stage == "patch":
            changed = patch.Summary.model_validate(manifest.summary).changed
            facts.append(("patched", ", ".join(f"`{tensor}`" for tensor in changed)))
        if manifest.stage == "merge":
            merged = merge.Summary.model_validate(manifest.summary)
            facts.append(("merged", f"{manifest.identity.settings['method']}, {merged.tensors} tensors"))
    for trained in origin.trained:
        rewrites = f"answers that {origin.teacher or 'the unpruned model'} rewrote"
        answers = {"distilled": rewrites, "logits": f"{rewrites}, and the unpruned model's probabilities of them"}
        read = answers.get(trained.arm, "reference answers")
        facts.append(("trained", f"{trained.steps} steps on {trained.rows} rows: {read} (arm `{trained.arm}`)"))
        if trained.validation_loss is not None:
            facts.append(("validation loss", f"{trained.validation_loss:.3f} nats a token"))
    return [*facts, ("id", f"`{origin.model.stage} {origin.model.id}`")]


def _score_row(scored: Scored) -> tuple[str, ...]:
    return (
        scored.task,
        str(scored.score.n),
        percent(scored.base) if scored.base else "-",
        percent(scored.score),
        interval(scored.difference) if scored.difference else "-",
    )


def _recipe(origin: Origin) -> dict[str, Any]:
    """Return the settings of every stage that the model depends on, the base's last."""
    stages: dict[str, Any] = {}

    def collect(lineage: Lineage) -> None:
        key, count = lineage.stage, 2
        while key in stages and stages[key] != lineage.settings:
            key, count = f"{lineage.stage} {count}", count + 1
        stages[key] = lineage.settings
        for inner in lineage.inputs.values():
            collect(inner)

    collect(origin.model.lineage)
    return stages


def _template() -> jinja2.Template:
    where = jinja2.PackageLoader("sdft_ray.publish", ".")
    rules = jinja2.Environment(loader=where, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return rules.get_template("model.md.jinja")
