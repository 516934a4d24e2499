"""The harness's model with vLLM where transformers would be: it is given token ids, and returns token ids.

In: a model directory. Out: a `Loaded` whose parts start at their first use. The harness's own class still encodes,
truncates and cuts at stop strings: only what computes is another. On a CPU likelihoods stay with transformers: prompt
logprobs take all of a context through the head, and the packed pass only what is scored.

The module imports torch and lm-eval, so it is imported by workers alone.
"""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoTokenizer

from sdft_ray.cluster import last_line
from sdft_ray.data.chat import opened_thought, response_ends
from sdft_ray.engine import engine_arguments
from sdft_ray.errors import StageFailed, UserError, problem
from sdft_ray.models.exporting import load_causal
from sdft_ray.models.generation import Draw, Written, read_written
from sdft_ray.spec.compute import EngineOptions
from sdft_ray.stages.evaluate.harness import Loaded
from sdft_ray.stages.evaluate.likelihoods import score_requests

_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")  # with one meaning in vLLM and transformers
_LAST_TOKENS = 128  # that vLLM looks up behind one prompt
_ALL_AT_ONCE = 2**31  # the engine batches by itself


def load_engine(model: str, dtype: str, batch_size: int, device: str, options: EngineOptions) -> Loaded:
    """Return a model in vLLM."""
    lm = EngineLM(model, dtype, batch_size, device, options)
    return Loaded(lm, lm.tokenizer, lm.answer, lm.score)


class OutlineLM(HFLM):
    """The harness's model without weights: what computes is elsewhere."""

    def __init__(self, model: str) -> None:
        outline = SimpleNamespace(config=AutoConfig.from_pretrained(model), device=torch.device("cpu"))
        tokenizer = AutoTokenizer.from_pretrained(model)
        super().__init__(pretrained=outline, tokenizer=tokenizer, backend="causal", batch_size=_ALL_AT_ONCE)
        self.pretrained = model


class EngineLM(OutlineLM):
    """The harness's model over vLLM."""

    def __init__(self, model: str, dtype: str, batch_size: int, device: str, options: EngineOptions) -> None:
        super().__init__(model)
        self.dtype, self.options = dtype, options
        self.rows_at_once, self.in_engine = batch_size, device != "cpu"
        self.ends = response_ends(self.tokenizer, self.config.eos_token_id)
        self._max_length = self.max_length - 1  # vLLM always makes a token behind what it reads

    @functools.cached_property
    def engine(self) -> Any:
        """The engine."""
        arguments = engine_arguments(self.pretrained, self.dtype, self.options, alone=False)
        from vllm import LLM

        try:
            return LLM(**arguments)
        except Exception as error:
            what = f"vLLM does not start with this model ({last_line(error)})"
            raise StageFailed(problem("evaluate.engine", what, "Set evaluate.engine: transformers")) from error

    @functools.cached_property
    def network(self) -> Any:
        """The model in transformers."""
        return load_causal(Path(self.pretrained), self.dtype).eval()

    def _complete(self, prompts: Sequence[list[int]], params: Sequence[Any]) -> list[Any]:
        """Return what vLLM makes of each prompt."""
        longest = max((len(ids) + each.max_tokens for ids, each in zip(prompts, params, strict=True)), default=0)
        if longest > (most := self.engine.llm_engine.model_config.max_model_len):
            # Cut off by the engine, not by the recipe: no setting of the compute file may decide on an answer.
            what = f"{most} is too few for a prompt and answer of {longest} tokens"
            raise UserError(problem("compute.evaluate.engine.max_model_len", what, f"Raise it to {longest} or more"))
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        return list(self.engine.generate(asked, list(params), use_tqdm=False))

    def answer(
        self, prompts: Sequence[list[int]], max_new_tokens: int, draws: Sequence[Draw] | None = None
    ) -> list[Written]:
        """Return the continuations of prompts (token ids) up to where a response ends, greedy or as their draws say."""
        from vllm import SamplingParams

        opened = opened_thought(self.tokenizer)
        common = {"max_tokens": max_new_tokens, "ignore_eos": True, "stop_token_ids": self.ends, "detokenize": False}
        ways: list[dict[str, Any]] = (
            [each._asdict() for each in draws] if draws else [{"temperature": 0}] * len(prompts)
        )
        made = self._complete(prompts, [SamplingParams(**common, **way) for way in ways])
        return [read_written(self.tokenizer, list(each.outputs[0].token_ids), self.ends, opened) for each in made]

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], attention_mask: torch.Tensor, **asked: Any
    ) -> torch.Tensor:
        """Return all prompts (N, T), each followed by what was made behind it and padding."""
        from vllm import SamplingParams

        sampled, temperature = asked.pop("do_sample", False), asked.pop("temperature", 0.0)
        if unknown := sorted(asked.keys() - set(_SAMPLING)):
            what = f"vllm cannot generate with {', '.join(unknown)}, which a task asks for"
            raise UserError(problem("evaluate.engine", what, "Set evaluate.engine: transformers"))
        common = {
            "temperature": temperature if sampled else 0.0,
            "max_tokens": max_length - context.shape[1],
            "stop": [text for text in stop if text],
            "ignore_eos": True,  # vLLM's own also holds those of generation_config.json
            "stop_token_ids": self.ends,
            "skip_special_tokens": False,  # a stop string may be one
            **asked,
        }
        prompts = [ids[seen.bool()].tolist() for ids, seen in zip(context, attention_mask, strict=True)]
        seeds = _seeds(prompts) if sampled else [None] * len(prompts)
        made = self._complete(prompts, [SamplingParams(**common, seed=seed) for seed in seeds])
        behind = [torch.tensor(each.outputs[0].token_ids, dtype=context.dtype) for each in made]
        pad = self.tokenizer.pad_token_id
        padded = torch.nn.utils.rnn.pad_sequence(behind, batch_first=True, padding_value=pad)
        return torch.cat([context, padded], dim=1)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        return self.score([(context, continuation) for _, context, continuation in requests])

    def score(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is greedy) of each (context, continuation), both token ids."""
        if self.in_engine:
            return self._score_in_engine(requests)
        return score_requests(self.network, requests, self.max_length, self.rows_at_once)

    def _score_in_engine(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return the same by the engine.

        A prompt ends before the last token of its continuation, which is looked up in the distribution of the next one.
        So choices of one token (letters) are looked up together, behind one reading of their context.
        """
        members: dict[tuple[tuple[int, ...], int], dict[int, list[int]]] = {}
        for i, (context, continuation) in enumerate(requests):
            assert context and len(continuation) <= self.max_length, f"request {i} fits no model of this context"
            *given, last = (context + continuation)[-(self.max_length + 1) :]
            members.setdefault((tuple(given), len(continuation) - 1), {}).setdefault(last, []).append(i)
        asked = [_Asked(*key, some) for key, lasts in members.items() for some in _pieces(list(lasts), _LAST_TOKENS)]
        scores: dict[int, tuple[float, bool]] = {}
        for (ids, inner, some), output in zip(asked, self._read(asked), strict=True):
            (completion,) = output.outputs
            own = [output.prompt_logprobs[place][ids[place]] for place in range(len(ids) - inner, len(ids))]
            before, greedy = sum(each.logprob for each in own), all(each.rank == 1 for each in own)
            for last in some:
                score = before + completion.logprobs[0][last].logprob, greedy and completion.token_ids[0] == last
                scores |= dict.fromkeys(members[ids, inner][last], score)
        return [scores[i] for i in range(len(requests))]

    def _read(self, asked: Sequence[_Asked], cached: bool = True) -> list[Any]:
        """Return vLLM's outputs with the logprobs that are asked for; cached: contexts may be read from its cache.

        vLLM itself reads nothing from there for such requests, because it then leaves the logprobs of what it read
        unset (its issue 42019). Those of the context are not needed here; where more was read, it is done once more.
        """
        from vllm import SamplingParams

        outputs = self._complete(
            [list(each.ids) for each in asked],
            [
                SamplingParams(
                    temperature=0,
                    max_tokens=1,
                    detokenize=False,
                    flat_logprobs=True,
                    prompt_logprobs=0 if each.inner else None,  # of the prompt's own tokens
                    logprob_token_ids=each.lasts,
                    skip_reading_prefix_cache=not cached,
                )
                for each in asked
            ],
        )
        pairs = enumerate(zip(asked, outputs, strict=True))
        unset = [i for i, (each, output) in pairs if output.num_cached_tokens >= len(each.ids) - each.inner]
        if cached and unset:
            for i, output in zip(unset, self._read([asked[i] for i in unset], cached=False), strict=True):
                outputs[i] = output
        return outputs


class _Asked(NamedTuple):
    """A prompt, and which logprobs are needed."""

    ids: tuple[int, ...]
    inner: int
    """Of so many of its last tokens."""
    lasts: list[int]
    """And of these tokens behind it."""


def _seeds(prompts: Sequence[list[int]]) -> list[int]:
    """Return a seed for each prompt, which no other prompt moves; one that is repeated gets further ones."""
    times: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for ids in map(tuple, prompts):
        seeds.append(zlib.crc32(repr((ids, times[ids])).encode()))
        times[ids] += 1
    return seeds


def _pieces(items: list[int], most: int) -> Iterator[list[int]]:
    yield from (items[i : i + most] for i in range(0, len(items), most))
