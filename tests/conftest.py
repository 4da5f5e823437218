"""One thread for each of pytest-xdist's workers; to be set before torch is imported."""

import os

os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
