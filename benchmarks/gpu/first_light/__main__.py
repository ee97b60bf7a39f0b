"""`python -m benchmarks.gpu.first_light`"""

import sys

from benchmarks.gpu.first_light.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
