"""`python -m benchmarks`: latency of the benchmark set, time and memory of `optimize`, operators. Goes on where it stopped."""

import sys

from benchmarks import operators, run, scaling

if __name__ == "__main__":
    sys.exit(run.main(sys.argv[1:]) or scaling.main([]) or operators.main())
