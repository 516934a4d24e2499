"""The chain as a Ray job: `ray job submit --working-dir . -- python jobs/run.py RECIPE --compute F --root D`.

In: the arguments of `sdft run`. Out: its exit code. On a cluster the root must be a directory that every node sees.
"""

import sys

from sdft_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
