"""Each module measures one thing: `python -m benchmarks.NAME` in the root of the repository."""
