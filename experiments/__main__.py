"""`python -m experiments`."""

import os
import sys

# Loading from the cache of executables, XLA warns at length of features that every CPU "lacks".
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
