"""python -m runner: the same command as run.py."""

import sys

from runner.cli import main

if __name__ == "__main__":
    sys.exit(main())
