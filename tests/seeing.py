"""A tiny random model that sees, with the processor of its family, and what vLLM and transformers generate with it.

Needs torchvision: processors of images are written with it. vLLM runs in a process of its own, which is this module.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer, make_wrapped

from sdft_ray.engine import NEAR_TIE
from sdft_ray.models.parts import text_config, write_text_part, write_whole
from sdft_ray.verify.agreement import NEW_TOKENS, render_prompts

if TYPE_CHECKING:
    from PIL.Image import Image

_QWEN_SIZE = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}  # areas
# Tokens that stand for an image and its ends, by the names that the family's processor asks the tokenizer for.
MARKS: dict[str, dict[str, str]] = {
    "gemma3": {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    | {f"lines_{n}_token": "\n" * n for n in range(1, 5)},  # vLLM looks for each
    "gemma4": {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "video_token": "<|video|>"}
    | {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"},
    "llama4": {"patch_token": "<|patch|>", "boi_token": "<|image_start|>", "eoi_token": "<|image_end|>"}
    | {"image_token": "<|image|>", "x_token": "<|tile_x_separator|>", "y_token": "<|tile_y_separator|>"},
    "mistral3": {"image_token": "[IMG]", "break_token": "[IMG_BREAK]", "end_token": "[IMG_END]"},
    "qwen3_5": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    | {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"},
}
# The same in config.json: a field, and the mark that it is the id of.
_FIELDS: dict[str, dict[str, str]] = {
    "gemma3": {"image_token_index": "image_token", "boi_token_index": "boi_token", "eoi_token_index": "eoi_token"},
    "gemma4": {f"{name}_id": name for name in MARKS["gemma4"]} | {"eoa_token_index": "eoa_token"},
    "llama4": {"image_token_index": "patch_token", "boi_token_index": "boi_token", "eoi_token_index": "eoi_token"},
    "mistral3": {"image_token_index": "image_token"},
    "qwen3_5": {f"{name}_id": name for name in MARKS["qwen3_5"]},
}
# What vLLM's CPU build runs: chunks of attention as large as blocks of its KV cache, and experts in every block, as in
# Llama 4 Scout; linear attention of the published models' head size.
_DECODERS = {
    "llama4": {"attention_chunk_size": 128, "interleave_moe_layer_step": 1},
    "qwen3_5": {"linear_key_head_dim": 128, "linear_value_head_dim": 128},
}
BOUNDS = {"float32": NEAR_TIE, "bfloat16": 0.25}
"""How far behind the most likely one a token may be by rounding; transformers' own in bfloat16 are up to 0.11."""
DTYPES = {"qwen3_5": "bfloat16"}
"""Precisions of families that vLLM's CPU build does not run in float32."""
WITHOUT = (1, 4)
"""The blocks of the decoder that are cut."""
# A text with one image.
QUESTIONS = {
    "gemma3": "Look: <start_of_image> What is it?",
    "gemma4": "Look: <|image|> What is it?",
    "llama4": "Look: <|image|> What is it?",
    "mistral3": "Look: [IMG] What is it?",
    "qwen3_5": "Look: <|vision_start|><|image_pad|><|vision_end|> What is it?",
}


def make_seeing(directory: Path, architecture: str, **fields: Any) -> Path:
    """Write a tiny model of a family that sees, with tokenizer and processor."""
    tokenizer = make_tokenizer(marks=MARKS[architecture])
    ids = {key: tokenizer.convert_tokens_to_ids(MARKS[architecture][m]) for key, m in _FIELDS[architecture].items()}
    whole = ids | ({"mm_tokens_per_image": 4} if architecture == "gemma3" else {})
    fields = {"vocab_size": len(tokenizer), **_DECODERS.get(architecture, {}), **fields}
    make_wrapped(directory, architecture, whole, **fields)
    _processor(architecture, tokenizer).save_pretrained(directory)
    if architecture == "gemma3":  # as it is published; transformers writes other names, which vLLM does not know
        weights = load_file(directory / "model.safetensors")
        published = {
            re.sub("^vision_tower.", "vision_tower.vision_model.", name): each for name, each in weights.items()
        }
        save_file(published, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def make_whole(folder: Path, architecture: str) -> Path:
    """Write a model of a family that sees whose decoder was taken out, cut and put back, and return where."""
    from sdft_ray.stages.cut import remove_blocks

    base, text, cut, whole = (folder / name for name in ("base", "text", "cut", "whole"))
    make_seeing(base, architecture)
    for directory in (text, cut, whole):
        directory.mkdir()
    write_text_part(base, text, text_config(base))
    remove_blocks(text, cut, WITHOUT)
    write_whole(cut, base, whole)
    return whole


def _processor(architecture: str, tokenizer: Any) -> Any:
    import transformers as hf

    square = {"height": 28, "width": 28}
    if architecture == "gemma3":
        return hf.Gemma3Processor(hf.Gemma3ImageProcessor(size=square), tokenizer, image_seq_length=4)
    if architecture == "gemma4":
        sizes = {"patch_size": 14, "pooling_kernel_size": 3, "max_soft_tokens": 70}
        images, videos = hf.Gemma4ImageProcessor(**sizes), hf.Gemma4VideoProcessor(**sizes)
        return hf.Gemma4Processor(hf.Gemma4AudioFeatureExtractor(), images, tokenizer, videos, image_seq_length=70)
    if architecture == "llama4":
        return hf.Llama4Processor(hf.Llama4ImageProcessor(size=square, max_patches=4), tokenizer, patch_size=14)
    if architecture == "mistral3":
        images = hf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14)
        return hf.PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=2)
    kinds = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "size": _QWEN_SIZE}
    return hf.Qwen3VLProcessor(hf.Qwen2VLImageProcessor(**kinds), tokenizer, hf.Qwen3VLVideoProcessor(**kinds))


def noise() -> Image:
    """Return an image of which no two parts are alike."""
    import numpy
    from PIL import Image

    pixels = numpy.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels).resize((56, 56), Image.Resampling.BICUBIC)


def white() -> Image:
    """Return an image of one colour."""
    from PIL import Image

    return Image.new("RGB", (56, 56), "white")


def read_question(directory: Path, architecture: str, image: Image, made: list[int]) -> tuple[list[int], list[float]]:
    """Return the tokens of a question with an image, and how far behind the most likely one each token `made` after it
    is: the distance of their logits in float32."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    network = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    inputs = AutoProcessor.from_pretrained(directory)(text=QUESTIONS[architecture], images=image, return_tensors="pt")
    asked = inputs["input_ids"][0].tolist()
    found = network.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=len(made),
        prefix_allowed_tokens_fn=lambda _, ids: [made[len(ids) - len(asked)]],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return asked, [float(row[0].max() - row[0, token]) for row, token in zip(found.logits, made, strict=True)]


def run_in_vllm(directory: Path, dtype: str, architecture: str | None = None) -> dict[str, Any]:
    """Return vLLM's greedy tokens of texts and, of a model that sees, of its question with an image and what it read.

    Raises RuntimeError where vLLM does not run the model.
    """
    command = [sys.executable, __file__, str(directory), dtype, architecture or ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"vLLM cannot run this model: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    return json.loads(done.stdout)


def read_texts(directory: Path, made: list[list[int]]) -> list[float]:
    """Return how far behind the most likely one each token is that was made after the texts."""
    from transformers import AutoModelForImageTextToText

    network = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    behind: list[float] = []
    for prompt, new in zip(render_prompts(directory), made, strict=True):
        with torch.inference_mode():
            rows = network(input_ids=torch.tensor([prompt + new]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        behind += (rows.max(-1).values - rows[range(len(new)), new]).tolist()
    return behind


def _generate(directory: str, dtype: str, architecture: str) -> dict[str, Any]:
    from sdft_ray.engine import engine_arguments
    from sdft_ray.spec.compute import EngineOptions

    arguments = engine_arguments(directory, dtype, EngineOptions(max_model_len=512, kv_cache_gib=0.5), alone=False)
    from vllm import LLM, SamplingParams

    if architecture:
        arguments["limit_mm_per_prompt"] = {"image": 1, "video": 0, "audio": 0}
    llm = LLM(**arguments)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in render_prompts(Path(directory))]
    found: dict[str, Any] = {
        "texts": [[*out.outputs[0].token_ids] for out in llm.generate(prompts, params, use_tqdm=False)]
    }
    if architecture:
        question = {"prompt": QUESTIONS[architecture], "multi_modal_data": {"image": noise()}}
        (out,) = llm.generate([question], params, use_tqdm=False)
        found |= {"asked": [*out.prompt_token_ids], "seen": [*out.outputs[0].token_ids]}
    return found


if __name__ == "__main__":
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # native code of the engine prints to stdout
    try:
        print(json.dumps(_generate(*sys.argv[1:])), file=results, flush=True)
    except Exception as error:  # noqa: BLE001 - one line for the other process, not a trace
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
