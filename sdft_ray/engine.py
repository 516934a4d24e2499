"""The engine that generates: vLLM here or a server elsewhere, behind the one boundary where tests put a fake.

In: requests of token ids, each with its own seed. Out: each with its generation as soon as it is finished. The engine
lives in the process of the actor that holds it, so a killed actor leaves no engine behind.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import JsonValue

from sdft_ray import cpu, environment
from sdft_ray.core.selection import Generation
from sdft_ray.data.chat import opened_thought, opening_ids, read_generated, response_ends
from sdft_ray.endpoint import CannotServe, Client, Completion, Stopped
from sdft_ray.errors import StageFailed, UserError, problem
from sdft_ray.spec.compute import Endpoint, EngineOptions
from sdft_ray.spec.recipe import Distill
from sdft_ray.spec.sources import ServedModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# Below this the order of two float32 logits is rounding: cached, batched and other kernels' sums differ by that much.
NEAR_TIE = 1e-3


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample of a row that the engine is asked for."""

    id: str
    sample: int
    prompt_ids: list[int]
    sampling_seed: int | None
    """None where the engine draws all texts by one generator."""


class Engine(Protocol):
    """Generates responses."""

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Generation]]:
        """Yield each request with its generation as soon as it is finished, in any order.

        A request that cannot be served is yielded with finish_reason `error`; a broken engine raises. UserError and
        StageFailed say that another engine would not do better.
        """
        ...


class EngineFactory(Protocol):
    """Starts an engine."""

    def __call__(self, model: str, settings: Distill, options: EngineOptions | Endpoint, alone: bool) -> Engine:
        """Return an engine of the model in a directory; alone: no other engine is on this machine."""
        ...


def start_engine(model: str, settings: Distill, options: EngineOptions | Endpoint, alone: bool) -> Engine:
    """Return the engine that the options are of: the endpoint of the teacher, or vLLM in this process."""
    if isinstance(options, Endpoint):
        return EndpointEngine(model, settings, options)
    return VllmEngine(model, settings, options, alone)


class VllmEngine:
    """vLLM behind the `Engine` boundary."""

    def __init__(self, model: str, settings: Distill, options: EngineOptions, alone: bool) -> None:
        arguments = engine_arguments(model, settings.dtype, options, alone)
        seeded = {"seed": settings.seed} if settings.seeds == "engine" else {}
        drafting = {}
        if looked_up := settings.lookup:
            sizes = {"prompt_lookup_min": looked_up.min, "prompt_lookup_max": looked_up.max}
            tokens = {"num_speculative_tokens": looked_up.tokens}
            drafting = {"speculative_config": {"method": "ngram", **tokens, **sizes}}
            fix_sampling()
        from transformers import AutoConfig, AutoTokenizer
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.ends = response_ends(self.tokenizer, named_ends(AutoConfig.from_pretrained(model)))
        self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments, **seeded, **drafting, disable_log_stats=True))
        self.settings = settings

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Generation]]:
        """Yield each request with its generation as it finishes; the engine batches continuously."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        opened = opened_thought(self.tokenizer, self.settings.template_options)
        waiting: dict[str, Request] = {}
        for request in requests:
            params = SamplingParams(
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                max_tokens=self.settings.max_new_tokens,
                seed=request.sampling_seed,
                ignore_eos=True,  # vLLM's own also holds those of generation_config.json
                stop_token_ids=self.ends,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            try:
                self.engine.add_request(request.id, {"prompt_token_ids": request.prompt_ids}, params)
            except (ValueError, VLLMClientError) as error:  # of this row alone, such as one longer than the context
                yield request, Generation(str(error), "error")
                continue
            waiting[request.id] = request
        while waiting:
            for output in self.engine.step():
                if output.finished:
                    yield waiting.pop(output.request_id), self._generation(output, opened)

    def _generation(self, output: Any, opened: str) -> Generation:
        completion, prompt_tokens = output.outputs[0], len(output.prompt_token_ids)
        if completion.finish_reason == "length" and len(completion.token_ids) < self.settings.max_new_tokens:
            # Cut off by the engine, not by the recipe: no setting of the compute file may decide what a row becomes.
            reason = f"prompt of {prompt_tokens} tokens leaves too little of compute.distill.engine.max_model_len"
            return Generation(reason, "error", prompt_tokens)
        text = read_generated(self.tokenizer, completion.token_ids, completion.text, opened)
        return Generation(text, completion.finish_reason, prompt_tokens, len(completion.token_ids))


class EndpointEngine:
    """A model behind an endpoint, of which the tokenizer is here: prompts are those that vLLM would get here."""

    def __init__(self, model: str, settings: Distill, options: Endpoint) -> None:
        from transformers import AutoConfig, AutoTokenizer

        assert isinstance(settings.teacher, ServedModel)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.ends = response_ends(self.tokenizer, named_ends(AutoConfig.from_pretrained(model)))
        self.client, self.threads = Client(settings.teacher, **dict(options)), options.requests
        self.served, self.settings = settings.teacher, settings

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Generation]]:
        """Yield each request with its generation as it is answered; as many as allowed are at the endpoint at once.

        Where it cannot be used any more, what is on its way is waited for before that is raised.
        """
        opened, stopped = opened_thought(self.tokenizer, self.settings.template_options), threading.Event()
        failure: UserError | StageFailed | None = None
        pool = ThreadPoolExecutor(self.threads)
        try:
            waiting = {pool.submit(self.client.complete, self._body(each), stopped): each for each in requests}
            for future in as_completed(waiting):
                try:
                    yield waiting[future], self._generation(waiting[future], future.result(), opened)
                except CannotServe as error:
                    yield waiting[future], Generation(str(error), "error")
                except (UserError, StageFailed) as error:
                    failure = failure or error
                except Stopped:
                    continue
            if failure:
                raise failure
        finally:
            stopped.set()
            pool.shutdown(wait=False)

    def _body(self, request: Request) -> dict[str, JsonValue]:
        """Return a request of `/completions`, with which the endpoint samples as vLLM does here."""
        body: dict[str, JsonValue] = {
            "model": self.served.model,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "max_tokens": self.settings.max_new_tokens,
            **({} if request.sampling_seed is None else {"seed": request.sampling_seed}),
        }
        if self.served.api == "vllm":
            # A server's own defaults are those of the model's generation_config.json, which moves no number here.
            body |= {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
            return body | {"prompt": [*request.prompt_ids], "stop_token_ids": [*self.ends], "return_token_ids": True}
        ids = request.prompt_ids
        if ids[:1] == self.tokenizer("").input_ids[:1]:  # a BOS, which the server adds to a text by itself
            ids = ids[1:]
        return body | {"prompt": self.tokenizer.decode(ids), "stop": [self.tokenizer.decode(i) for i in self.ends[:4]]}

    def _generation(self, request: Request, completion: Completion, opened: str) -> Generation:
        text, reason, read, tokens, ids = completion
        prompt_tokens = len(request.prompt_ids) if read is None else read
        if tokens is None:  # a server that does not count has cut a text off at the limit that it was given
            cut_off = reason == "length" and ids is None
            counted = ids if ids is not None else self.tokenizer.encode(text, add_special_tokens=False)
            tokens = self.settings.max_new_tokens if cut_off else len(counted)
        if reason == "length" and tokens < self.settings.max_new_tokens:
            what = f"prompt of {prompt_tokens} tokens leaves too little of the endpoint's context"
            return Generation(what, "error", prompt_tokens)
        if ids is None:  # only their text shows whether it begins with the template's opening
            opening = opening_ids(self.tokenizer)
            written = self.tokenizer.decode(opening, skip_special_tokens=True)
            ids = list(opening) if written and text.startswith(written) else []
        return Generation(read_generated(self.tokenizer, ids, text, opened), reason, prompt_tokens, tokens)


def named_ends(config: PreTrainedConfig) -> int | list[int] | None:
    """Return the tokens that a model's config says a text ends at: of one that also sees, it or its decoder's."""
    own: int | list[int] | None = getattr(config, "eos_token_id", None)
    return getattr(config.get_text_config(decoder=True), "eos_token_id", None) if own is None else own


def engine_arguments(model: str, dtype: str, options: EngineOptions, alone: bool) -> dict[str, Any]:
    """Return the arguments of vLLM's engine, after setting the environment that vLLM reads when it is imported.

    alone: no other engine is on this machine.
    """
    environment.for_vllm(alone)
    from transformers import AutoConfig
    from vllm.platforms import current_platform

    from sdft_ray.core.rowwise import may_share_a_sequence

    is_cpu = current_platform.is_cpu()
    other_name = {"kv_cache_gib", "gpu_memory_utilization"} if is_cpu else {"kv_cache_gib"}
    named = options.model_dump(exclude_none=True, exclude=other_name)
    if is_cpu:
        config = AutoConfig.from_pretrained(model)
        if rounds_activations(getattr(config, "quantization_config", None)):
            if cpu.overflows_in_int8():
                what = "is a model in int8, of which vLLM's products overflow on this CPU: it has no VNNI"
                raise UserError(problem(model, what, "Take a CPU with avx512_vnni or avx_vnni, or a GPU"))
            if dtype == "float32":
                fix_int8()
        decoder = config.get_text_config(decoder=True)
        shares = options.enable_prefix_caching and may_share_a_sequence(decoder)
        named |= {
            "kv_cache_memory_bytes": int(options.kv_cache_gib * 2**30),
            # A prompt split over two steps would rewind its seeded generator, which only CUDA's can (docs/footguns.md).
            "enable_chunked_prefill": False,
            # Without it vLLM keeps no beginnings of models whose blocks carry a state on.
            "enable_prefix_caching": shares,
        }
    return {"model": model, "dtype": dtype, "generation_config": "vllm", **named}


def rounds_activations(quantised: Mapping[str, Any] | None) -> bool:
    """Return whether a model, by what its config says of its weights, multiplies integers of 8 bits.

    >>> rounds_activations({"config_groups": {"0": {"input_activations": {"num_bits": 8, "type": "int"}}}})
    True
    >>> rounds_activations({"quant_method": "gptq", "bits": 4})
    False
    """
    groups = (quantised or {}).get("config_groups", {}).values()
    rounded = [group.get("input_activations") or {} for group in groups]
    return any(each.get("num_bits") == 8 and each.get("type") == "int" for each in rounded)


def fix_sampling() -> None:
    """Let a CPU judge drafts at the temperature and top_p that were asked for: vLLM's own way loses both, and takes
    what happens to be in memory (docs/footguns.md)."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if current_platform.is_cpu():
        rejection_sampler.expand_batch_to_tokens = expand_to_tokens


def fix_int8() -> None:
    """Let a CPU with AMX multiply int8 for activations in float32: the kernel that vLLM chooses there fails at the
    first prompt, because it takes halves alone (docs/footguns.md)."""
    from vllm.model_executor.kernels.linear.scaled_mm import cpu as kernels

    kernels.check_cpu_sgl_kernel = lambda *_: False


def expand_to_tokens(
    values: torch.Tensor, ends: torch.Tensor, tokens: int, replace_from: float = 0, replace_to: float = 0
) -> torch.Tensor:
    """Return a value of each request (B) for each of its drafted tokens (T); those of request i end before ends[i]."""
    counts = ends.diff(prepend=ends.new_zeros(1)).long()
    return values.masked_fill(values == replace_from, replace_to).repeat_interleave(counts, output_size=tokens)
