"""What most commands import; the processes of `command` are forked from one that has imported this."""

# ruff: noqa: E402, F401
import gc

from sdft_ray import environment

environment.for_command()
environment.for_ray()  # Ray reads its variables when it is imported

import ray.data
import ray.train
import transformers.models.auto.modeling_auto

import sdft_ray.pipeline

gc.freeze()  # else a fork that collects copies what it shares
