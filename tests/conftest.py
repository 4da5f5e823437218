"""One thread for each of pytest-xdist's workers; to be set before torch is imported."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
