"""What agents do in a mode that they have never seen: what tools/report_modes.py measures."""

import dataclasses
import functools
import types
from pathlib import Path

import learning
import numpy as np
import pytest
import torch

import aib_envs
import report_agents
import report_modes
from relatives import aib_signs


@pytest.fixture
def fresh(monkeypatch):
    """fresh(script, flags) is an untrained agent of DI-Signs, whose episodes have 12 steps."""
    task = "DI-Signs"
    monkeypatch.setitem(aib_envs.TASKS, task, dataclasses.replace(aib_signs.TASKS[task], steps=12))

    def fresh(name, flags=""):
        torch.manual_seed(0)
        module = learning.script(name)
        args = learning.parse(module, f"--env-id {task} {flags}")
        make_envs = functools.partial(module.make_envs, args)
        agent = module.make_agent(args, make_envs([{}]))
        return report_agents.Trained(name, module.method_name(args), task, agent, 0, make_envs)

    return fresh


METHODS = ["dr_sac.py", "da_sac.py", "dma_sac.py", "dmah_sac.py", "dmash_sac.py", "rsac.py"]


@pytest.mark.parametrize(("script", "flags"), [*((name, "") for name in METHODS), ("rsac.py", "--hypernetwork")])
def test_every_method_gets_a_row_for_each_mode(script, flags, fresh):
    trained = fresh(script, flags)
    contexts = aib_envs.eval_contexts(trained.task)
    played = report_agents.Episodes(trained, contexts)
    wandered = report_agents.Episodes(trained, contexts, predict=True, random=True)
    rows, z = report_modes.rows_of(trained, played, wandered, contexts)
    assert [row["mode"] for row in rows] == ["+ +", "+ -", "- +", "- -"]
    assert [row["seen"] for row in rows] == ["yes", "yes", "yes", "no"]
    with_z = script not in ("dr_sac.py", "da_sac.py")
    assert (z is not None) == with_z and all(("nearest z" in row) == with_z for row in rows)
    assert all(("dynamics error" in row) == script.startswith("dma") for row in rows)
    acted = []
    policy = lambda obs, history: acted.append(trained.agent.act(obs, history)) or acted[-1]
    envs = trained.make_envs(contexts)
    aib_envs.evaluate(envs, policy, trained.agent.window_size, 1)
    assert np.array_equal(played.actions, np.stack(acted[-12:-1], axis=1))  # looking changes nothing
    low, middle, high = np.quantile(wandered.actions, [0.05, 0.5, 0.95])
    assert -1 <= low < -0.8 < -0.1 < middle < 0.1 < 0.8 < high <= 1


@pytest.mark.parametrize("script", ["dma_sac.py", "dmah_sac.py", "dmash_sac.py"])
def test_predictions_are_those_of_the_dynamics_model_with_the_agents_own_window(script, fresh):
    trained = fresh(script)
    agent, contexts = trained.agent, aib_envs.eval_contexts(trained.task)[:3]
    seen = []
    act = agent.act

    def remember(obs, history, training=False):
        actions = act(obs, history)
        places = np.linspace(0, 23, 4).astype(int)[None]
        window = [torch.from_numpy(part) for part in history.window(places)]
        with torch.no_grad():
            inputs = torch.from_numpy(np.concatenate([obs, actions], 1))
            seen.append(agent.dynamics(inputs, agent.infer(window)).numpy())
        return actions

    agent.act = remember
    played = report_agents.Episodes(trained, contexts, predict=True)
    assert np.allclose(played.predictions, np.stack(seen, 1)[:, -12:-1], atol=1e-6)
    assert np.allclose(played.obs[:, 1:], (played.obs + played.deltas)[:, :-1])


@pytest.mark.parametrize("flags", [("dma_sac.py", ""), ("dmash_sac.py", ""), ("rsac.py", "--hypernetwork")])
def test_told_its_own_z_the_policy_acts_as_it_did(flags, fresh):
    trained = fresh(*flags)
    encoder = report_agents.encoder_of(trained.agent)
    z = torch.full((8,), 0.3)
    encoder.register_forward_hook(lambda module, inputs, output: z.expand_as(output))
    played = report_agents.Episodes(trained, aib_envs.eval_contexts(trained.task)[:3])
    assert np.allclose(played.actions_with(z.numpy()), played.actions, atol=1e-6)
    assert not np.allclose(played.actions_with(-z.numpy()), played.actions, atol=1e-6)


def test_what_the_table_says(fresh):
    """Made-up episodes: z of the unseen mode lies on that of "+ -", and its first forces are right along x only."""
    trained = fresh("dmash_sac.py")
    contexts = aib_envs.eval_contexts(trained.task)
    mode = np.array([[c["inversion_x"], c["inversion_y"]] for c in contexts])
    rng = np.random.default_rng(0)
    wandered = types.SimpleNamespace()
    wandered.z = np.zeros((60, 11, 8), np.float32)
    wandered.z[:, :, :2] = 3 * np.where((mode == -1).all(1)[:, None], [1, -1], mode)[:, None]
    wandered.deltas = rng.uniform(1, 3, (60, 11, 4))
    wandered.predictions = np.where(mode[:, :1, None] == 1, 0.5, 0.0) * wandered.deltas
    played = types.SimpleNamespace(returns=np.arange(60.0))
    sides = rng.choice([-1, 1], (60, 1, 2))
    played.obs = np.concatenate([0.5 * sides, -0.1 * sides], axis=2).repeat(11, axis=1)  # place and speed
    played.actions = np.repeat(-mode[:, None] * sides, 11, axis=1).astype(np.float32)
    played.actions[:, 5:] *= -1  # then it brakes
    played.actions[40:, :, 1] *= -1
    signs = np.where(np.arange(11) < 5, -1, 1)[None, :, None]
    played.actions_with = lambda z: signs * sides * z[:2] / 3
    rows, _ = report_modes.rows_of(trained, played, wandered, contexts)
    unseen = rows[-1]
    assert (unseen["nearest z"], unseen["acts as in"]) == ("+ -: 100 %", "- +: 100 %")
    assert unseen["distance"] == unseen["unlike it"] == "0.00" and unseen["return"] == "49.5"
    assert unseen["forces towards the goal"] == "100 %, 0 %"
    assert [row["dynamics error"] for row in rows] == ["0.25", "0.25", "1", "1"]
    assert all(row["nearest z"] == row["acts as in"] == f"{row['mode']}: 100 %" for row in rows[:3])
    assert all(row["forces towards the goal"] == "100 %, 100 %" for row in rows[:3])
    # between "+ +", "+ -" and "- +" lie 6, 6 and 6 times the root of 2
    assert [row["distance"] for row in rows[:3]] == ["0.88", "0.88", "0.88"]


def test_the_report_names_what_it_leaves_out(fresh, tmp_path, monkeypatch):
    agents = {"sees": fresh("dma_sac.py"), "blind": fresh("dr_sac.py")}
    agents["DI"] = dataclasses.replace(agents["blind"], task="DI")
    monkeypatch.setattr(report_modes.report_agents, "load", lambda path: agents[path.name])
    report_modes.report([Path(name) for name in (*agents, "nothing")], tmp_path)
    text = (tmp_path / "modes.md").read_text()
    assert "nothing: cannot be used" in text and "DI: not a task with several signs" in text
    assert (tmp_path / "figures" / "sees_modes.png").exists()
    assert len((tmp_path / "tables" / "modes.csv").read_text().splitlines()) == 1 + 2 * 4
