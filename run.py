"""python run.py --mode data-parallel: a test set becomes a submission. See --help."""

import sys

from runner.cli import main

if __name__ == "__main__":
    sys.exit(main())
