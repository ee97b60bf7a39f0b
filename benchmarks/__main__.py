"""`python -m benchmarks`: latency of the benchmark set, then time and memory of `optimize`. Goes on where it stopped."""

import sys

from benchmarks import run, scaling

if __name__ == "__main__":
    sys.exit(run.main(sys.argv[1:]) or scaling.main([]))
