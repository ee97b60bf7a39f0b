"""`python -m normfuse` is the command `normfuse`."""

import sys

from normfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
