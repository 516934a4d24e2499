"""The method: pure functions on tensors, strings and JSON. No ray, vllm, deepspeed or lm_eval here.

Letters in shapes: L blocks, B rows, T tokens, D width, V vocabulary, K trained positions.
"""
