"""Every script end to end, as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = ["dr_sac.py", "da_sac.py", "dma_sac.py", "dmah_sac.py", "dmash_sac.py"]


def run(script, *flags, cwd):
    """The finished process of `python script flags`, in a directory of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900, check=False)


def finished_run(process, cwd):
    """The only run's directory of a process that ended well and printed nothing of other people."""
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stderr + process.stdout and "Traceback" not in process.stderr
    (directory,) = (cwd / "runs").iterdir()
    return directory


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("script", "env_id", "flags", "method"),
    [
        ("dmash_sac.py", "DI", "", "DMAstar-SH"),
        ("dmash_sac.py", "Cheetah", "", "DMAstar-SH"),
        ("dmash_sac.py", "WalkerGym", "", "DMAstar-SH"),
        ("dmash_sac.py", "DI-Perm", "--mask-prob 0 --no-normalise", "DMA-SH"),
        ("dmash_sac.py", "DI", "--no-detach-critic", "DMAstar-SH-nodetach-critic"),
        ("dmash_sac.py", "DI", "--no-detach-actor", "DMAstar-SH-nodetach-actor"),
        ("dmash_sac.py", "DI", "--no-detach-actor --no-detach-critic", "DMAstar-SH-nodetach-critic-nodetach-actor"),
        ("dmash_sac.py", "DI", "--no-normalise --no-detach-actor", "DMAstar-SH-nonorm-nodetach-actor"),
        ("dmah_sac.py", "DI", "", "DMAstar-H"),
        ("dmah_sac.py", "DI", "--rl-only", "DMAstar-H-RLonly"),
        ("dma_sac.py", "DI", "", "DMAstar"),
        ("dma_sac.py", "DI", "--mask-prob 0", "DMAstar-nomask"),
        ("dma_sac.py", "DI-Friction", "--mask-prob 0 --no-normalise", "DMA"),
        ("dma_sac.py", "ODE-5", "--kl-beta 0.4", "DMA-Pearl"),
        ("da_sac.py", "DI", "", "DA"),
        ("da_sac.py", "ODE-3", "--scale-context", "DA-scaled"),
        ("dr_sac.py", "Reacher-E", "", "DR"),
        ("dr_sac.py", "DI", "--context-aware", "Concat"),
        ("dr_sac.py", "ODE", "--context-aware --scale-context", "Concat-scaled"),
    ],
)
def test_script_trains_and_evaluates(script, env_id, flags, method, tmp_path):
    starts = 1000 if env_id in ("Cheetah", "WalkerGym", "Reacher-E") else 300
    short = ("--total-timesteps", 200, "--learning-starts", starts, "--eval-every", 100, "--eval-rollouts", 1)
    process = run(script, "--env-id", env_id, *flags.split(), *short, cwd=tmp_path)
    directory = finished_run(process, tmp_path)
    metrics = metrics_of(directory)
    assert [m["global_step"] for m in metrics] == [0, 100, 200]
    for m in metrics:
        assert list(m["aer"]) == ["train", "eval-in", "eval-out"] and all(len(r) == 20 for r in m["returns"].values())
        assert f"step {m['global_step']}: AER train {m['aer']['train']:.1f}, eval-in " in process.stdout
    config = json.loads((directory / "config.json").read_text())
    assert config["args"]["env_id"] == env_id and config["args"]["total_timesteps"] == 200
    results = json.loads((directory / "results.json").read_text())
    assert results["method"] == config["method"] == directory.name.split("__")[1] == method
    for split, aer in metrics[-1]["aer"].items():
        rollouts = [sum(row) / len(row) for row in results["returns"][split]]
        assert sum(rollouts) / 20 == pytest.approx(aer) and len(results["contexts"][split]) == 20
    assert torch.load(directory / "agent.pt", weights_only=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_gives_the_same_metrics(script, tmp_path):
    def metrics(name, seed):
        flags = ("--total-timesteps", 150, "--learning-starts", 200, "--eval-every", 50, "--eval-rollouts", 2)
        (tmp_path / name).mkdir()
        process = run(script, "--env-id", "ODE", "--seed", seed, *flags, cwd=tmp_path / name)
        return [
            {k: v for k, v in m.items() if k != "seconds"} for m in metrics_of(finished_run(process, tmp_path / name))
        ]

    first = metrics("first", 1)
    assert first == metrics("again", 1) and first != metrics("other", 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env-id", "Cheeta"], "unknown task 'Cheeta' (did you mean Cheetah?)"),
        (["--env-id", "ODE-21"], "allowed: DI, DI-Friction"),
        (["--total-timestep", "5"], "--total-timesteps"),
        (["--total-timesteps", "many"], "invalid literal for int() with base 10: 'many'"),
        (["--total-timesteps", "0"], "--total-timesteps must be from 1"),
        (["--gamma", "nan"], "--gamma must be from 0 to 1"),
        (["--mask-prob", "1.5"], "--mask-prob must be from 0 to 1"),
        (["--q-lr", "inf"], "--q-lr must be from 0 to 1"),
        (["--learning-starts", "50"], "--learning-starts must be from 100"),
        (["--env-id", "Cheetah", "--buffer-size", "999"], "--buffer-size must be from 1000"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["Cheetah"], "Unrecognized options: Cheetah"),
        (["--run-dir", "/dev/null/runs"], "/dev/null"),
        (["dr_sac.py", "--scale-context"], "--scale-context needs --context-aware"),
        (["dma_sac.py", "--kl-beta", "-1"], "--kl-beta must be from 0 to 1"),
    ],
)
def test_bad_input_gets_one_clear_line(flags, message, tmp_path):
    script, *flags = flags if flags[0].endswith(".py") else ["dmash_sac.py", *flags]
    process = run(script, *flags, cwd=tmp_path)
    assert process.returncode == 2 and message in process.stderr
    assert len(process.stderr.splitlines()) == 1 and process.stderr.startswith(script) and not process.stdout
    assert not list(tmp_path.iterdir())


def test_a_wrong_flag_is_named_on_a_terminal_without_unicode(tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(ROOT / "dmash_sac.py"), "--total-timestep", "5"]
    process = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert process.returncode == 2 and "--total-timesteps" in process.stderr and len(process.stderr.splitlines()) == 1


def test_help_explains_every_flag(tmp_path):
    process = run("dmash_sac.py", "--help", cwd=tmp_path)
    assert process.returncode == 0 and "(default: None)" in process.stdout
    for text in ("the task's own", "use a GPU if there is one", "smoothing coefficient", "--no-cuda", "--mask-prob"):
        assert text in process.stdout
