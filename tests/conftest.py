"""One thread for each of pytest-xdist's workers, to be set before torch is imported; and a fixture that trains."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import dataclasses
import signal
import sys

import pytest

import aib_envs


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(script, flags) trains on DI, with K = 10 and episodes of 20 steps. Returns the finished run."""
    import learning  # here, since the tests of the benchmark also run where there is no torch

    di = dataclasses.replace(aib_envs.TASKS["DI"], steps=20, window=10)
    monkeypatch.setitem(aib_envs.TASKS, "DI", di)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def train(script, flags="", name="runs"):
        module = learning.script(script)
        monkeypatch.setattr(sys, "argv", [str(learning.ROOT / script)])
        short = "--learning-starts 20 --total-timesteps 45 --eval-every 30 --eval-rollouts 1 --batch-size 8"
        args = learning.parse(module, f"--run-dir {tmp_path / name} {short} {flags}")
        run = module.train(args)
        run.close()
        for file in (run._metrics, run._train):
            file.close()
        return run

    yield train
    for number, handler in handlers.items():
        signal.signal(number, handler)
