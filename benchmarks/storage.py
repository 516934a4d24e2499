"""The cost of a root in an object store against a local directory: `python -m benchmarks.storage`.

In: nothing; the tiny model, rows and recipe of benchmarks/sweep.py, and the S3-speaking server of the tests, on
loopback. Out: seconds of the whole chain as a command, and the figures as the last line. Runs alternate, each with a
root and a node's copy of its own. The chain is tiny, so the cost of requests shows; with large models bytes count more,
and those depend on a network that loopback does not have.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.report import print_figures
from benchmarks.sweep import seconds_of, write_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="runs of each kind (default: %(default)s)")
    options = parser.parse_args()
    s3 = importlib.import_module("tests.s3")
    with tempfile.TemporaryDirectory(prefix="storage-") as folder, s3.s3_server() as address:
        proxy = s3.Proxy(address)  # to count requests
        names = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update(names, AWS_ENDPOINT_URL=proxy.url)
        measure(Path(folder), proxy, options.runs)


def measure(folder: Path, proxy: object, runs: int) -> None:
    """Run and print everything."""
    import boto3

    write_inputs(folder)
    boto3.client("s3").create_bucket(Bucket="benchmark")
    requests = proxy.requests  # type: ignore[attr-defined]
    seconds: dict[str, list[float]] = {"local": [], "object_store": []}
    for run in range(runs):
        os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{run}")
        for kind, root in (("local", f"local-{run}"), ("object_store", f"s3://benchmark/{run}")):
            requests.clear()
            seconds[kind].append(seconds_of(folder, "run", "recipe.yaml", "--root", root))
            print(f"{kind}: {seconds[kind][-1]:.1f} s, {len(requests)} requests", flush=True)
    ratios = [stored / local for stored, local in zip(seconds["object_store"], seconds["local"], strict=True)]
    figures = {
        "object_store_over_local": round(statistics.median(ratios), 3),
        "object_store_over_local_min": round(min(ratios), 3),
        "object_store_over_local_max": round(max(ratios), 3),
        "requests": len(requests),
        **{f"{kind}_seconds": round(statistics.median(runs), 1) for kind, runs in seconds.items()},
    }
    print_figures("storage", figures)


if __name__ == "__main__":
    main()
