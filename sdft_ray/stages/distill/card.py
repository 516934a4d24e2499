"""The distilled dataset as others read it: its Arrow schema, and the card that says how it was made.

In: selected rows and the figures of the stage. Out: tables for train.parquet, and README.md with the front matter that
dataset hubs read. `datasets.load_dataset("parquet", data_files=...)` and `load_dataset(DIRECTORY)` both load it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.core.rows import Exchange, Message
from sdft_ray.data.readers import GymContent, HubContent, RowsContent
from sdft_ray.results import DistilledRow
from sdft_ray.spec.sources import ServedModel
from sdft_ray.stages.distill.draws import Settings
from sdft_ray.stages.distill.teaching import teacher_name
from sdft_ray.store.identity import Stage

_TEXTS = (
    *("id", "prompt", "reference", "answer", "response", "source", "reason", "generated", "finish_reason"),
    "conversation",
)
_COUNTS = ("sample", "prompt_tokens", "generated_tokens", "origin")
# Licences of sources that are known by name; what a file holds, its owner knows.
_LICENCES = {"openai/gsm8k": "mit", "databricks/databricks-dolly-15k": "cc-by-sa-3.0"}
_SAMPLING = ("temperature", "top_p", "max_new_tokens", "samples", "dtype", "seed")


def schema() -> Any:
    """Return the columns of train.parquet."""
    import pyarrow as pa

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [(name, pa.string()) for name in _TEXTS]
        + [("messages", pa.list_(turn))]
        + [(name, pa.int32()) for name in _COUNTS]
        + [("sampling_seed", pa.int64())]
    )


def table(rows: Sequence[DistilledRow]) -> Any:
    """Return selected rows as an Arrow table, each with its conversation as chat messages."""
    import pyarrow as pa

    columns = dict(zip(DistilledRow._fields, zip(*rows, strict=True), strict=True))
    columns |= {"messages": tuple(map(_messages, rows))}
    return pa.table([pa.array(columns[field.name], field.type) for field in schema()], schema())


def _messages(row: DistilledRow) -> list[dict[str, str]]:
    history = Exchange(row.prompt, row.response, row.conversation).given.messages
    return [{"role": turn.role, "content": turn.content} for turn in (*history, Message("assistant", row.response))]


def write(
    directory: Path, stage: Stage[Settings], counts: Mapping[str, int], examples: Mapping[str, DistilledRow]
) -> None:
    """Write README.md; counts: the rows for each reason."""
    from huggingface_hub import DatasetCardData

    mixed, teacher = stage.rows, teacher_name(stage)
    each = [describe_source(read.settings.source, read.slug) for read in mixed.inputs.values() or [mixed]]
    name, licences = " and ".join(name for name, _ in each), list(dict.fromkeys(licence for _, licence in each))
    licence = ", ".join(licences)
    front = DatasetCardData(
        license=licence if len(licences) == 1 else licences,
        task_categories=["text-generation"],
        tags=["data-distillation" if teacher else "self-data-distillation"],
        configs=[{"config_name": "default", "data_files": "train.parquet"}],
    )
    served = isinstance(stage.settings.teacher, ServedModel)  # in a precision of its own
    known = [key for key in _SAMPLING if not (served and key == "dtype")]
    sampling = ", ".join(f"{key} {getattr(stage.settings, key)}" for key in known)
    reasons = "\n".join(f"| {reason} | {count} |" for reason, count in counts.items() if count)
    rows = sum(counts.values())
    rewrite, method = "model's own rewrite of the reference", "after *Self-Data Distillation* (arXiv 2410.09982)"
    if teacher:
        rewrite = f"rewrite of the reference by {teacher}"
        method = f"for {stage.model.slug}, which did not write the rewrites: this is no self-distillation"
    seeds = "; each sample of a row has its own seed" if stage.settings.seeds == "row" else ""
    if looked_up := stage.settings.lookup:
        seeds += f"; {looked_up.tokens} tokens at a time were proposed from the text before them, and judged"
    text = f"""---
{front.to_yaml()}
---

# {stage.slug}, rewritten by {teacher or stage.model.slug}

{rows} rows of {name} (licence of the source: {licence}). Where `source` is `distilled`, the response is the
{rewrite}, checked; else it is the reference, verbatim, and `reason` says why. No row was
dropped. Made by sdft_ray {method}.

| reason | rows |
|---|---|
{reasons}

Sampling: {sampling}{seeds}. `messages` holds prompt and response as a conversation;
`generated` is what the model wrote last, kept or not.

## Examples
{"".join(_describe_example(row) for row in examples.values())}"""
    (directory / "README.md").write_text(text, encoding="utf-8")


def describe_source(source: RowsContent, slug: str) -> tuple[str, str]:
    """Return the name of where rows come from, and its licence; slug: what their artifact is called."""
    match source:
        case GymContent():
            return source.gym, "apache-2.0"
        case HubContent():
            return f"{source.repo} {source.revision}", _LICENCES.get(source.repo, "unknown")
        case _:
            return slug, "unknown"


def _describe_example(row: DistilledRow) -> str:
    return f"""
**{row.reason}**. Prompt:

{_quote(row.prompt)}

Reference:

{_quote(row.reference)}

Generated:

{_quote(row.generated)}
"""


def _quote(text: str) -> str:
    shown = text if len(text) <= 600 else text[:600] + " …"
    return "\n".join(f"> {line}".rstrip() for line in shown.splitlines() or [""])
