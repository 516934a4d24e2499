"""Compare two computations of one model: with and without KV cache, transformers and vLLM.

In: a model directory. Out: greedy tokens for a few prompts, judged by the logits of one plain forward pass in float32.
A token that differs where the two best logits lie closer than rounding counts as a near-tie, not as a difference.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.data.chat import render_prompt
from sdft_ray.engine import NEAR_TIE

if TYPE_CHECKING:
    import torch

# Short and long, digits, line breaks, letters beyond ASCII: positions and bytes that a wrong cut would get wrong.
PROMPTS = (
    "What is the capital of France?",
    "What is 17 + 25?",
    "Write one sentence about the sea.",
    "Is ice lighter than water? Answer yes or no, and say why.",
    "Translate to German: good morning, my friend.",
    "Was heißt »größer« auf Englisch?",
    "Complete this function:\n\ndef add(a, b):\n    return",
    "A farmer has 12 sheep, 7 goats and 30 hens. In spring 5 lambs and 3 kids are born, and a fox takes 4 hens. "
    "In autumn the farmer sells half of the sheep and all of the goats but two. How many animals are left? "
    "Think step by step, then give the number on a line of its own.",
)
NEW_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The agreement of one engine's greedy tokens with the logits of another."""

    tokens: int
    near_ties: tuple[str, ...]
    """Tokens that are not the most likely one, by less than NEAR_TIE."""
    differing: tuple[str, ...]
    """Tokens that are not the most likely one, by more."""

    def describe(self) -> str:
        """Return the agreement in words, near-ties always included."""
        same = self.tokens - len(self.near_ties) - len(self.differing)
        ties = f", {len(self.near_ties)} at near-ties ({self.near_ties[0]})" if self.near_ties else ""
        return f"{same} of {self.tokens} greedy tokens the same{ties}"


def render_prompts(directory: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    return [render_prompt(tokenizer, prompt) for prompt in PROMPTS]


def load_in_float32(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def compute_logits(network: Any, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits (T V) of one sequence, without a cache."""
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = network(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits


def continue_greedily(network: Any, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], torch.Tensor]:
    """Return NEW_TOKENS greedy tokens for each prompt and the logits (B NEW_TOKENS V) that chose them.

    With the KV cache, all prompts at once, padded on the left.
    """
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, new_tokens, chosen_by = None, [], []
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            out = network(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            chosen_by.append(out.logits[:, -1])
            ids = out.logits[:, -1:].argmax(-1)
            new_tokens.append(ids)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1
    return torch.cat(new_tokens, dim=1).tolist(), torch.stack(chosen_by, dim=1)


def compare_tokens(
    prompts: Sequence[list[int]], made: Sequence[list[int]], logits: Sequence[torch.Tensor]
) -> Agreement:
    """Return the agreement of greedy tokens with the logits (T V) of prompt and tokens together.

    One forward pass over prompt and continuation stands for NEW_TOKENS passes without a cache: while the tokens
    agree, both have read the same; after a near-tie each token is judged by the tokens really before it.
    """
    near_ties: list[str] = []
    differing: list[str] = []
    for i, (prompt, new, own_logits) in enumerate(zip(prompts, made, logits, strict=True)):
        for j, (token, row) in enumerate(zip(new, own_logits[len(prompt) - 1 : -1], strict=True)):
            best = int(row.argmax())
            if token != best:
                gap = float(row[best] - row[token])
                where = f"token {j} of prompt {i} is {token}, else {best}: logits {gap:.2g} apart"
                (near_ties if gap < NEAR_TIE else differing).append(where)
    return Agreement(sum(map(len, made)), tuple(near_ties), tuple(differing))


def compare_with_vllm(directory: Path) -> Agreement:
    """Return the agreement of vLLM's greedy tokens for PROMPTS with transformers' logits, both in float32.

    vLLM runs in a process of its own: it keeps threads, memory and environment variables for good.
    """
    prompts = render_prompts(directory)
    command = [sys.executable, "-m", "sdft_ray.verify.agreement", str(directory)]
    done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"vLLM cannot run this model: {lines[-1]}")
    made = json.loads(done.stdout)
    network = load_in_float32(directory)
    logits = [compute_logits(network, prompt + new) for prompt, new in zip(prompts, made, strict=True)]
    return compare_tokens(prompts, made, logits)


def _continue_in_vllm(directory: str, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return NEW_TOKENS greedy tokens for each prompt."""
    from sdft_ray.engine import VllmEngine
    from sdft_ray.spec.compute import EngineOptions
    from sdft_ray.spec.recipe import Distill

    longest = max(map(len, prompts)) + NEW_TOKENS
    options = EngineOptions(max_model_len=longest + 1, kv_cache_gib=0.5)
    engine = VllmEngine(directory, Distill(dtype="float32"), options, alone=False).engine
    from vllm import SamplingParams  # after the engine has set the variables that vLLM reads on import
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    made: dict[int, list[int]] = {}
    while engine.has_unfinished_requests():
        made |= {int(out.request_id): list(out.outputs[0].token_ids) for out in engine.step() if out.finished}
    return [made[i] for i in range(len(prompts))]


if __name__ == "__main__":  # the process that compare_with_vllm starts
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # native code of the engine prints to stdout
    try:
        print(json.dumps(_continue_in_vllm(sys.argv[1], json.load(sys.stdin))), file=results, flush=True)
    except Exception as error:  # noqa: BLE001 - one line for the other process, not a trace
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
