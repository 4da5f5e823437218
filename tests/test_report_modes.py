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
    played = report_agents.Episodes(trained, contexts, predict=True)
    rows, z = report_modes.rows_of(trained, played, contexts)
    assert [row["mode"] for row in rows] == ["+ +", "+ -", "- +", "- -"]
    assert [row["seen"] for row in rows] == ["yes", "yes", "yes", "no"]
    with_z = script not in ("dr_sac.py", "da_sac.py")
    assert (z is not None) == with_z and all(("nearest z" in row) == with_z for row in rows)
    assert all(("dynamics error" in row) == script.startswith("dma") for row in rows)
    envs = trained.make_envs(contexts)
    returns, _ = aib_envs.evaluate(envs, trained.agent.act, trained.agent.window_size, 1)
    assert np.array_equal(played.returns, returns[:, 0])  # looking changes nothing


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
    """Made-up episodes: z of the unseen mode lies on that of "+ -", and its forces are right along x only."""
    trained = fresh("dmash_sac.py")
    contexts = aib_envs.eval_contexts(trained.task)
    mode = np.array([[c["inversion_x"], c["inversion_y"]] for c in contexts])
    played = types.SimpleNamespace()
    shown = np.where((mode == -1).all(1)[:, None], [1, -1], mode)
    played.z = np.zeros((60, 11, 8), np.float32)
    played.z[:, :, :2] = shown[:, None]
    played.obs = np.full((60, 11, 4), 0.5, np.float32)
    played.actions = np.repeat(-mode[:, None], 11, axis=1).astype(np.float32)
    played.actions[40:, :, 1] *= -1
    played.actions_with = lambda z: np.broadcast_to(-z[:2], (60, 11, 2))
    played.deltas = np.ones((60, 11, 4))
    played.predictions = np.where(mode[:, :1, None] == 1, 0.5, 0.0) * played.deltas
    played.returns = np.arange(60.0)
    rows, _ = report_modes.rows_of(trained, played, contexts)
    unseen = rows[-1]
    assert unseen["nearest z"] == "+ -: 100 %" and unseen["distance"] == "0.00" and unseen["return"] == "49.5"
    assert unseen["forces towards the goal"] == "100 %, 0 %"
    assert [row["dynamics error"] for row in rows] == ["0.25", "0.25", "1", "1"]
    assert all(row["nearest z"] == row["acts as in"] == f"{row['mode']}: 100 %" for row in rows[:3])
    assert all(row["forces towards the goal"] == "100 %, 100 %" for row in rows[:3])


def test_the_report_names_what_it_leaves_out(fresh, tmp_path, monkeypatch):
    agents = {"sees": fresh("dma_sac.py"), "blind": fresh("dr_sac.py")}
    agents["DI"] = dataclasses.replace(agents["blind"], task="DI")
    monkeypatch.setattr(report_modes.report_agents, "load", lambda path: agents[path.name])
    report_modes.report([Path(name) for name in (*agents, "nothing")], tmp_path)
    text = (tmp_path / "modes.md").read_text()
    assert "nothing: cannot be used" in text and "DI: not a task with several signs" in text
    assert (tmp_path / "figures" / "sees_modes.png").exists()
    assert len((tmp_path / "tables" / "modes.csv").read_text().splitlines()) == 1 + 2 * 4
