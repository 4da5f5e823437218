"""What the tests find around them, to be set before torch is imported; and a fixture that trains."""

import dataclasses
import os
import signal
import sys

import pytest

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # for each of pytest-xdist's workers
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["GIT_CONFIG_GLOBAL"] = os.devnull
OF_A_GRID = ("RUN_DIR", "STEPS", "FLAGS", "JOBS", "DRY", "RUNNER", "SBATCH", "TIME")
OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # git sets them: a test's commit would be yours
for name in (*OF_A_GRID, *OF_A_HOOK, "WANDB_DIR"):
    os.environ.pop(name, None)


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(script, flags) trains on ODE, with K = 10 and episodes of 20 steps. Returns the finished run."""
    import learning  # here, since the tests of the benchmark also run where there is no torch

    import aib_envs

    ode = dataclasses.replace(aib_envs.TASKS["ODE"], steps=20, window=10)
    monkeypatch.setitem(aib_envs.TASKS, "ODE", ode)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def train(script, flags="", name="runs"):
        module = learning.script(script)
        monkeypatch.setattr(sys, "argv", [str(learning.ROOT / script)])
        short = "--learning-starts 20 --total-timesteps 45 --eval-every 30 --eval-rollouts 1 --batch-size 8"
        given = ["--env-id", "ODE", "--run-dir", str(tmp_path / name), *short.split(), *flags.split()]
        args = learning.parse(module, given)
        run = module.train(args)
        run.close()
        for file in (run._metrics, run._train):
            file.close()
        return run

    yield train
    for number, handler in handlers.items():
        signal.signal(number, handler)
