"""Stage `distill`: the unpruned model rewrites the training references; checked rewrites take their place.

In: the base model and the training rows. Out: train.parquet, each row once, with the response to train on, where it
came from and why. Ray Data drives actors that each hold an engine. What an engine finishes goes into the ledger in
small atomic pieces before anything else happens to it, so no kill costs more than one piece an actor; the artifact
is a view of that ledger. The ledger's identity covers teacher, prompt and sampling, not which rows were asked for:
more rows, another checker or another filter never generate a row again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sdft_ray.artifacts import short_id
from sdft_ray.core.prompts import CHECKABLE, OPEN, RENDERING_VERSION, render_prompt, rewrite_instruction
from sdft_ray.core.selection import COMPLETE, REASONS, Generation, select_response
from sdft_ray.errors import StageFailed
from sdft_ray.stages import Work
from sdft_ray.stages.rows import read_training_rows

VERSION = 1
_SAMPLING = ("temperature", "top_p", "max_new_tokens", "dtype", "seed")
_LEDGER_FIELDS = ("id", "text", "finish_reason", "prompt_tokens", "tokens", "sampling_seed")


@dataclasses.dataclass(frozen=True)
class Request:
    """One row as the engine gets it."""

    id: str
    prompt_ids: list[int]
    sampling_seed: int


class Engine(Protocol):
    """The boundary to vLLM, the only place where tests put a fake."""

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Generation]]:
        """Yield each request with its generation as soon as it is finished, in any order.

        A request that cannot be served is yielded with finish_reason `error`; a broken engine raises.
        """
        ...


def build(work: Work) -> dict[str, Any]:
    """Generate the rows that the ledger lacks, then select and write train.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = read_training_rows(work.input("rows"), work.settings["rows"])
    ledger = work.storage.ledger(ledger_name(work))
    with work.storage.lock(f"ledger-{ledger.name}"):  # recipes that ask for other rows share it
        finished = _finished(_read_ledger(ledger))
        missing = [row for row in rows if row["id"] not in finished]
        work.progress.begin(len(rows), done=len(rows) - len(missing))
        if missing:
            _generate(work, missing, ledger)
        generations = _read_ledger(ledger)
    selected, counts = select_rows(rows, generations)
    failed = counts["error"] / len(rows)
    if failed > work.settings["max_failed_fraction"]:
        messages = Counter(row["generated"] for row in selected if row["reason"] == "error")
        raise StageFailed(
            f"distill: {counts['error']} of {len(rows)} rows failed in the engine (allowed: "
            f"{work.settings['max_failed_fraction']:.0%}), mostly: {messages.most_common(1)[0][0]}. "
            f"{len(_finished(generations))} generated rows are kept in {ledger}"
        )
    text = ("id", "prompt", "reference", "answer", "response", "source", "reason", "generated", "finish_reason")
    schema = pa.schema(
        [(name, pa.string()) for name in text]
        + [("prompt_tokens", pa.int32()), ("generated_tokens", pa.int32()), ("sampling_seed", pa.int64())]
    )
    pq.write_table(pa.Table.from_pylist(selected, schema), work.directory / "train.parquet")
    tokens = [row["generated_tokens"] for row in selected]
    return {
        "rows": len(selected),
        "kept": counts["kept"],
        "acceptance": counts["kept"] / len(selected),
        "reasons": counts,
        "generated_tokens": sum(tokens),
        "mean_generated_tokens": sum(tokens) / len(tokens),
        "ledger": ledger.name,
    }


def ledger_name(work: Work) -> str:
    """Return the name of the ledger that these rows' generations go into."""
    identity = {
        "model": work.stage.inputs["model"].id,
        "rendering": RENDERING_VERSION,
        "template": _template(work.settings),
        **{key: work.settings[key] for key in _SAMPLING},
    }
    return f"{work.stage.inputs['model'].slug}-{short_id(identity)}"


def _template(settings: Mapping[str, Any]) -> str:
    """Return the rewriting instruction: the recipe's own, else the one that suits how rows are checked."""
    return settings["template"] or (OPEN if settings["answer"] == "none" else CHECKABLE)


def sampling_seed(row_id: str, seed: int) -> int:
    """Return a row's own seed: it depends on nothing but the row and the recipe's seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row_id}".encode()).digest()[:4], "big")


def select_rows(
    rows: Sequence[Mapping[str, Any]], generations: Mapping[str, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return every row with its selected response, and how many rows there are for each reason.

    rows in = rows out, in the same order: each is trained on, with the rewrite or with its reference.
    """
    selected = []
    for row in rows:
        made = generations[row["id"]]
        generation = Generation(made["text"], made["finish_reason"], made["prompt_tokens"], made["tokens"])
        chosen = select_response(row["reference"], row["answer"], generation, may_say=row["prompt"])
        selected.append(
            {
                **row,
                **dataclasses.asdict(chosen),
                "generated": generation.text,
                "finish_reason": generation.finish_reason,
                "prompt_tokens": generation.prompt_tokens,
                "generated_tokens": generation.tokens,
                "sampling_seed": made["sampling_seed"],
            }
        )
    counts = Counter(row["reason"] for row in selected)
    assert len(selected) == len(rows) == counts.total(), "every row has exactly one reason"
    return selected, {reason: counts[reason] for reason in REASONS}


def _generate(work: Work, rows: Sequence[Mapping[str, Any]], ledger: Path) -> None:
    import ray

    plan = work.compute.distill
    dataset = ray.data.from_items(
        [{key: row[key] for key in ("id", "prompt", "reference")} for row in rows],
        override_num_blocks=max(plan.actors.max, -(-len(rows) // plan.batch_rows)),
    ).map_batches(
        Rewriter,
        fn_constructor_kwargs={
            "engine": VllmEngine,
            "model": str(work.input("model")),
            "settings": dict(work.settings),
            "options": plan.engine.model_dump() | {"tensor_parallel_size": plan.tensor_parallel_size},
            "alone": plan.actors.max == 1,
            "ledger": str(ledger),
            "piece_rows": plan.piece_rows,
        },
        batch_size=plan.batch_rows,
        compute=ray.data.ActorPoolStrategy(
            min_size=plan.actors.min, max_size=plan.actors.max, max_tasks_in_flight_per_actor=2
        ),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus or None,
    )
    before = work.progress.done
    tokens = count = 0
    for piece in dataset.iter_batches(batch_size=None):
        count += len(piece["tokens"])
        tokens += int(piece["tokens"].sum())
        work.progress.update(before + count, f"{tokens} tokens generated")


class Rewriter:
    """An actor with an engine; turns a batch of rows into ledger pieces."""

    def __init__(
        self,
        engine: Callable[..., Engine],
        model: str,
        settings: dict[str, Any],
        options: dict[str, Any],
        alone: bool,
        ledger: str,
        piece_rows: int,
    ) -> None:
        from transformers import AutoTokenizer

        self.engine = engine(model, settings, options, alone)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.settings, self.ledger, self.piece_rows = settings, Path(ledger), piece_rows

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the token counts of each piece once it is durable."""
        import numpy as np

        # Pieces are named after their batch, so a batch that Ray hands out again after a kill finds what it wrote.
        name = hashlib.sha256("".join(batch["id"]).encode()).hexdigest()[:12]
        written = _read_pieces(self.ledger, f"part-{name}-*.parquet")
        there = {row["id"]: row for row in written if row["finish_reason"] in COMPLETE}
        if there:
            yield {"tokens": np.array([row["tokens"] for row in there.values()])}
        requests = [
            self._request(row_id, prompt, reference)
            for row_id, prompt, reference in zip(batch["id"], batch["prompt"], batch["reference"], strict=True)
            if row_id not in there
        ]
        piece: list[dict[str, Any]] = []
        for request, generation in self.engine.generate(requests):
            piece.append({"id": request.id, "sampling_seed": request.sampling_seed, **dataclasses.asdict(generation)})
            if len(piece) == self.piece_rows:
                _write_piece(self.ledger, name, piece)
                yield {"tokens": np.array([row["tokens"] for row in piece])}
                piece = []
        if piece:
            _write_piece(self.ledger, name, piece)
            yield {"tokens": np.array([row["tokens"] for row in piece])}

    def _request(self, row_id: str, prompt: str, reference: str) -> Request:
        instruction = rewrite_instruction(prompt, reference, _template(self.settings))
        return Request(row_id, render_prompt(self.tokenizer, instruction), sampling_seed(row_id, self.settings["seed"]))


class VllmEngine:
    """vLLM behind the `Engine` boundary, inside the actor's own process: a killed actor leaves no engine behind."""

    def __init__(self, model: str, settings: Mapping[str, Any], options: Mapping[str, Any], alone: bool) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
        os.environ["HF_HUB_OFFLINE"] = "1"  # the model is a local directory
        # vLLM leaves a core idle and pins its threads; two engines on one machine must not pin to the same cores.
        os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
        if not alone:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        from vllm import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        named = {key: value for key, value in options.items() if value is not None}
        kv_cache_gib = named.pop("kv_cache_gib")
        if current_platform.is_cpu():
            named.pop("gpu_memory_utilization")
            named["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
            # A prompt split over two steps would rewind its seeded generator, which only CUDA's can
            # (docs/footguns.md).
            named["enable_chunked_prefill"] = False
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(model=model, dtype=settings["dtype"], disable_log_stats=True, generation_config="vllm", **named)
        )
        self.settings = settings

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Generation]]:
        """Yield each request with its generation as it finishes; the engine batches continuously."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        waiting: dict[str, Request] = {}
        for request in requests:
            params = SamplingParams(
                temperature=self.settings["temperature"],
                top_p=self.settings["top_p"],
                max_tokens=self.settings["max_new_tokens"],
                seed=request.sampling_seed,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            try:
                self.engine.add_request(request.id, {"prompt_token_ids": request.prompt_ids}, params)
            except ValueError as error:  # this row cannot be served, for example longer than the context
                yield request, Generation(str(error), "error")
                continue
            waiting[request.id] = request
        while waiting:
            for output in self.engine.step():
                if output.finished:
                    yield waiting.pop(output.request_id), self._generation(output)

    def _generation(self, output: Any) -> Generation:
        made, prompt_tokens = output.outputs[0], len(output.prompt_token_ids)
        if made.finish_reason == "length" and len(made.token_ids) < self.settings["max_new_tokens"]:
            # Cut off by the engine, not by the recipe: no setting of the compute file may decide what a row becomes.
            what = f"prompt of {prompt_tokens} tokens leaves too little of compute.distill.engine.max_model_len"
            return Generation(what, "error", prompt_tokens)
        return Generation(made.text, made.finish_reason, prompt_tokens, len(made.token_ids))


def _write_piece(ledger: Path, batch: str, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = f"part-{batch}-{uuid.uuid4().hex[:8]}.parquet"
    temporary = ledger / f".{name}.tmp"
    pq.write_table(pa.Table.from_pylist(rows).select(list(_LEDGER_FIELDS)), temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.rename(ledger / name)


def _read_pieces(ledger: Path, pattern: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for path in sorted(ledger.glob(pattern)):
        yield from pq.read_table(path).to_pylist()


def _read_ledger(ledger: Path) -> dict[str, dict[str, Any]]:
    """Return what the ledger holds for each row; a later success takes the place of an error."""
    found: dict[str, dict[str, Any]] = {}
    for row in _read_pieces(ledger, "part-*.parquet"):
        if row["id"] not in found or found[row["id"]]["finish_reason"] not in COMPLETE:
            found[row["id"]] = row
    return found


def _finished(generations: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the ids that need no engine any more; rows that ended in an error are tried again."""
    return {row_id for row_id, row in generations.items() if row["finish_reason"] in COMPLETE}
