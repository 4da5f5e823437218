"""Every script, method, flag and task: that it learns, in small."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import learning
import pytest
import torch

import aib_envs
import aib_run

ROOT = learning.ROOT

# ------------------------------------------------ training, in this process ------------------------------------------


def metrics_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def check_finished(directory, method, steps):
    """What a finished run has written."""
    metrics = metrics_of(directory)
    assert [m["global_step"] for m in metrics] == steps
    for m in metrics:
        assert list(m["aer"]) == list(aib_envs.SPLITS) and all(len(r) == 20 for r in m["returns"].values())
        assert all(math.isfinite(value) for value in (*m["aer"].values(), *m["losses"].values()))
    results = json.loads((directory / "results.json").read_text())
    config = json.loads((directory / "config.json").read_text())
    assert results["method"] == config["method"] == directory.name.split("__")[1] == method
    for split, aer in metrics[-1]["aer"].items():
        (rollouts,) = zip(*results["returns"][split], strict=True)  # --eval-rollouts 1
        assert sum(rollouts) / 20 == pytest.approx(aer)
        assert results["contexts"][split] == aib_envs.context_set(config["args"]["env_id"], split)
    assert torch.load(directory / "agent.pt", weights_only=True)


@pytest.mark.parametrize("method", learning.MAIN_METHODS, ids=lambda method: method.name)
def test_every_method_trains(method, train, monkeypatch):
    agent, turns = learning.script(method.script).Agent, []
    update = agent.update
    monkeypatch.setattr(agent, "update", lambda self, *batch: turns.append(batch[-1]) or update(self, *batch))
    run = train(method.script, method.flags)
    assert turns in ([True, False] * 22 + [True], [False, True] * 22 + [False])  # the policy's
    check_finished(run.directory, method.name, [0, 30, 45])
    window = run.agent.window_size
    # A random episode, two of 20 steps, and 5 steps of another; each with its warm-up
    assert run.env_steps == 20 * (3 * (window + 20) + window + 5) and run.episode == 3


@pytest.mark.parametrize("script", learning.SCRIPTS)
def test_the_same_seed_learns_the_same_however_often_one_looks(script, train):
    flags = "--total-timesteps 25"
    one, often = (train(script, f"{flags} --eval-every {every}", str(every)) for every in (100, 10))
    other = train(script, f"{flags} --seed 2 --eval-every 100")
    assert learning.same(one.agent.state_dict(), often.agent.state_dict())
    assert not learning.same(one.agent.state_dict(), other.agent.state_dict())
    steps = (0, 25)
    assert metrics_of(one.directory) == [m for m in metrics_of(often.directory) if m["global_step"] in steps]


def test_learning_starts(train):
    """Learning may start in the middle of an episode; each episode of 20 steps has a warm-up of 10."""
    runs = [train("dmash_sac.py", f"--learning-starts {n} --total-timesteps 4", str(n)) for n in (20, 35, 40)]
    assert [run.env_steps // 20 for run in runs] == [20 + 4 + 2 * 10, 35 + 4 + 2 * 10, 40 + 4 + 3 * 10]


# ------------------------------------------------------- flags -------------------------------------------------------

# A value that is not the default of the flags that say what is learned; flags for every script stand in aib_run.py
OTHER = {
    "batch_size": 7,
    "gamma": 0.5,
    "tau": 0.3,
    "bootstrap_at_limit": False,
    "policy_lr": 1e-2,
    "q_lr": 1e-2,
    "dynamics_lr": 1e-2,
    "encoder_lr": 1e-2,
    "bias_init": True,
    "mask_prob": 0.9,
    "normalise": False,
    "detach_critic": False,
    "detach_actor": False,
    "kl_beta": 0.9,
    "rl_only": True,
    "context_aware": True,
    "scale_context": True,
}
FLAGS = [
    (script, field.name)
    for script in learning.SCRIPTS
    for field in dataclasses.fields(learning.script(script).Args)
    if field.name in OTHER
]


@pytest.mark.parametrize(("script", "name"), FLAGS)
def test_a_flag_changes_what_is_learned(script, name):
    module = learning.script(script)
    results = []
    needed = {("dr_sac.py", "scale_context"): {"context_aware": True}, ("rsac.py", "bias_init"): {"hypernetwork": True}}
    needed = needed.get((script, name), {})
    for flags in (needed, needed | {name: OTHER[name]}):
        torch.manual_seed(0)
        agent = learning.make_agent(module, **flags)
        buffer = learning.random_buffer(module, agent)
        learning.update(agent, buffer, steps=3, batch_size=agent.args.batch_size)
        results.append(learning.weights(agent))
    assert all(x.isfinite().all() for x in results[1].values()) and not learning.same(*results)


@pytest.mark.parametrize("script", learning.SCRIPTS)
def test_buffer_size_counts_transitions_of_each_context(script):
    module = learning.script(script)
    history = aib_envs.History(3, 24, 100, 4, 2)
    for size, episodes in ((100, 1), (399, 3), (400, 4)):
        buffer = module.ReplayBuffer(history, size, "cpu")
        assert buffer.num_episodes == episodes and buffer.rewards.shape[:2] == (3, episodes)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        *((script, "--learning-starts 50") for script in learning.SCRIPTS),
        *((script, "--buffer-size 99") for script in learning.SCRIPTS),
        ("dmash_sac.py", "--mask-prob 1.5"),
        ("dmash_sac.py", "--gamma nan"),
        ("dmash_sac.py", "--q-lr inf"),
        ("dmash_sac.py", "--batch-size 0"),
        ("dma_sac.py", "--kl-beta -1"),
        ("dr_sac.py", "--scale-context"),
        ("rsac.py", "--bias-init"),
    ],
)
def test_bad_flags_get_one_line_that_names_them(script, flags, monkeypatch, capsys, tmp_path):
    module = learning.script(script)
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as stop:
        module.train(learning.parse(module, [*flags.split(), "--run-dir", str(tmp_path)]))
    output = capsys.readouterr()
    assert stop.value.code == 2 and len(output.err.splitlines()) == 1 and not output.out
    assert flags.split()[0] in output.err and output.err.startswith(script)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------- tasks -------------------------------------------------------


@pytest.mark.parametrize("env_id", [task for task in aib_envs.TASKS if not task.startswith("ODE-")])
def test_every_task_is_learned_from(env_id):
    """Two contexts, a warm-up and four steps with the agent's own actions, and two gradient steps."""
    module = learning.script("dmash_sac.py")
    args = learning.parse(module, f"--env-id {env_id}")
    agent, buffer = learning.short_episode(module, args)
    task = aib_envs.get_task(env_id)
    obs, actions, next_obs, *_, window = buffer.sample(8)
    assert obs.shape == next_obs.shape == (8, task.obs_dim) and actions.shape == (8, task.act_dim)
    assert [part.shape for part in window] == [(8, task.window // 5, x.shape[1]) for x in (obs, actions, obs)]
    before = learning.weights(agent)
    losses = learning.update(agent, buffer, steps=2, batch_size=8)
    assert all(loss.isfinite() for loss in losses.values())
    assert not learning.same(before, learning.weights(agent))


@pytest.mark.parametrize(
    ("script", "flags"),
    [("dr_sac.py", "--context-aware"), ("dr_sac.py", "--context-aware --scale-context"), ("da_sac.py", "")],
)
@pytest.mark.parametrize("env_id", ["DI-Perm", "ODE-1", "ODE-20", "Cartpole"])
def test_methods_that_are_told_the_context_learn_with_any_number_of_dimensions(script, flags, env_id):
    module = learning.script(script)
    agent, buffer = learning.short_episode(module, learning.parse(module, f"--env-id {env_id} {flags}"))
    losses = learning.update(agent, buffer, steps=2, batch_size=8)
    assert all(loss.isfinite() for loss in losses.values())


# -------------------------------------------------- as a user starts it ----------------------------------------------


def start(script, *flags, cwd):
    """The finished process of `python script flags`."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False)


SLOW = [
    ("dr_sac.py", "Reacher-E", "", "DR"),
    ("da_sac.py", "ODE-3", "--scale-context", "DA-scaled"),
    ("dma_sac.py", "Cheetah", "--kl-beta 0.4", "DMA-Pearl"),
    ("dmah_sac.py", "HopperGym", "--rl-only", "DMAstar-H-RLonly"),
    ("dmash_sac.py", "WalkerGym", "", "DMAstar-SH"),
    ("rsac.py", "Reacher-H", "--hypernetwork", "RSAC-H"),
]


@pytest.mark.parametrize(
    ("script", "env_id", "flags", "method"),
    [("dmash_sac.py", "DI", "", "DMAstar-SH"), *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)],
)
def test_a_script_is_a_program(script, env_id, flags, method, tmp_path):
    """Episodes of full length; nothing on the terminal that is not ours."""
    steps = aib_envs.get_task(env_id).steps
    short = ("--total-timesteps", 30, "--learning-starts", steps, "--eval-every", 20, "--eval-rollouts", 1)
    process = start(script, "--env-id", env_id, *flags.split(), *short, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stderr + process.stdout and "Traceback" not in process.stderr
    (directory,) = (tmp_path / "runs").iterdir()
    check_finished(directory, method, [0, 20, 30])


@pytest.mark.parametrize("script", learning.SCRIPTS)
def test_help_has_every_flag(script, capsys):
    module = learning.script(script)
    with pytest.raises(SystemExit) as stop:
        aib_run.parse_args(module.Args, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(aib_run.flag(field.name) in text for field in dataclasses.fields(module.Args))
