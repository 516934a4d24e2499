"""sdft_ray: depth pruning and self-data distillation of instruction-tuned LLMs on Ray.

Nothing is imported here: `sdft --help` must answer before torch or ray could load.
"""

__version__ = "0.1.0"
