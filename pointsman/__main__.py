"""`python -m pointsman` is the command `pointsman`."""

import sys

from pointsman.cli import main

if __name__ == "__main__":
    sys.exit(main())
