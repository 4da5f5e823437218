"""DMA*-SH as the authors' public code trains it: what differs from dmash_sac.py, and that nothing else does."""

import json
import subprocess
import sys

import learning
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import aib_envs
import dmash_public as script
import dmash_sac

SCRIPT = "relatives/dmash_public.py"


def test_without_its_flags_it_is_dmash(train):
    one = train("dmash_sac.py", name="one").agent
    other = train(SCRIPT, "--no-public-steps", name="other").agent
    assert learning.same(learning.weights(one), learning.weights(other))


def test_unchunked_hypernetwork_generates_the_adapter():
    torch.manual_seed(0)
    hypernetwork, x = script.UnchunkedHypernetwork(8), torch.randn(5, 256)
    z = torch.randn(5, 8)
    numbers = hypernetwork.head(hypernetwork.features(z)[:, :-1])
    down, up, b_down, b_up = numbers.split([32 * 256, 256 * 32, 32, 256], dim=1)
    hidden = F.relu((down.view(5, 32, 256) @ x[:, :, None])[:, :, 0] + b_down)
    expected = F.relu(x + (up.view(5, 256, 32) @ hidden[:, :, None])[:, :, 0] + b_up)
    torch.testing.assert_close(dmash_sac.adapt(x, hypernetwork(z)), expected, rtol=1e-4, atol=1e-5)


def test_parameter_count_on_walker_is_the_public_codes():
    agent = learning.make_agent(script, "Walker", unchunked=True)
    modules = (agent.encoder, agent.hypernetwork, agent.dynamics, agent.actor, agent.qf1, agent.qf2)
    assert sum(p.numel() for module in modules for p in module.parameters()) == 1_401_990  # 1.40 M


def test_the_window_holds_the_transition_itself_as_often_as_any_other():
    k, steps = 24, 100
    history = script.History(2, k, steps, 1, 1)
    buffer = script.ReplayBuffer(history, steps, "cpu")
    for array in (history.obs, history.actions, history.next_obs):
        array[..., 0] = np.arange(k + steps)
    history.next_obs += 1
    history.lengths[:] = steps
    buffer.add(history)
    obs, actions, next_obs, _, last, (w_obs, w_actions, w_deltas) = buffer.sample(20_000)
    assert torch.equal(next_obs, obs + 1) and torch.equal(actions, obs) and torch.equal(w_obs, w_actions)
    assert torch.equal(last, obs[:, 0] == k + steps - 1) and (w_deltas == 1).all()
    age = (obs - w_obs[..., 0]).long()
    counts = torch.bincount(age.flatten(), minlength=k)
    assert len(counts) == k and counts.min() > 0.8 * counts.float().mean()


def test_each_loss_has_a_mask_of_its_own_and_the_encoder_steps_first():
    agent, buffer = learning.learner(script)
    seen, order = [], []
    agent.encoder.register_forward_hook(lambda module, inputs, z: seen.append((z.requires_grad, z.detach().clone())))
    for name in ("dynamics_optimizer", "q_optimizer", "actor_optimizer", "alpha_optimizer"):
        getattr(agent, name).register_step_post_hook(lambda *_, name=name: order.append(name[: -len("_optimizer")]))
    agent.update(*buffer.sample(32), True)
    assert [with_gradient for with_gradient, _ in seen] == [True, False, False, False]
    assert not any(torch.equal(seen[i][1], seen[j][1]) for i in range(4) for j in range(i))
    assert order == ["dynamics", "q", "actor", "alpha", "actor", "alpha"]


def test_a_warm_up_begins_with_the_last_episodes_window():
    history = script.History(3, 10, 20, 2, 1)
    for t in range(30):
        value = np.full((3, 2), t, np.float32)
        history.add(value, value[:, :1], value[:, 0], value + 1, np.zeros(3, bool))
    (before, *_), places = history.window(np.arange(10)[None]), np.arange(10)[None]
    history.begin()
    assert np.array_equal(history.window(places)[0], before) and before[0, :, 0].tolist() == list(range(20, 30))
    buffer = script.ReplayBuffer(history, 60, "cpu")
    for number in range(4):  # the last one takes the place of the first
        for part in (history.obs, history.actions, history.next_obs):
            part += number
        buffer.add(history)
    restored = script.History(3, 10, 20, 2, 1)
    restored.restore(buffer)
    history.begin()
    assert all(map(np.array_equal, restored.window(places), history.window(places)))
    assert aib_envs.History(3, 10, 20, 2, 1).window(places)[0].max() == 0  # ours starts from zeros


@pytest.mark.parametrize("public_steps", [False, True])
def test_every_part_of_an_unchunked_agent_learns(public_steps):
    agent, buffer = learning.learner(script, unchunked=True, public_steps=public_steps)
    before = learning.weights(agent)
    learning.update(agent, buffer, 4)
    assert not [name for name, p in learning.weights(agent).items() if torch.equal(p, before[name])]


def test_the_temperature_sees_new_actions():
    agent, buffer = learning.learner(script)
    batch = buffer.sample(32)
    drawn = []
    act = agent.actor.get_action
    agent.actor.get_action = lambda obs, omega: drawn.append(act(obs, omega)) or drawn[-1]
    losses = agent.update(*batch, True)
    actions = [action.detach() for action, _ in drawn]
    assert len(actions) == 1 + 2 * 2 and not any(map(torch.equal, actions[1::2], actions[2::2]))
    entropy = (drawn[-1][1] + agent.target_entropy).mean()
    assert losses["alpha_loss"] / -entropy == pytest.approx(1, rel=0.01)  # the temperature has made one step from 1


def test_ablations_of_detaching_are_refused(capsys):
    args = script.Args(env_id="DI", detach_actor=False)
    with pytest.raises(SystemExit):
        script.method_name(args)
    assert "--no-public-steps" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--unchunked"])
def test_extended_it_is_the_same_run(flags, tmp_path):
    def run(*more):
        subprocess.run([sys.executable, learning.ROOT / SCRIPT, *more], cwd=tmp_path, check=True, capture_output=True)

    short = "--env-id DI --learning-starts 100 --eval-rollouts 1 --keep-checkpoint"
    run(*short.split(), *flags.split(), "--total-timesteps", "100", "--run-dir", "a")
    (directory,) = (tmp_path / "a").iterdir()
    run("--resume", str(directory), "--total-timesteps", "150")
    run(*short.split(), *flags.split(), "--total-timesteps", "150", "--run-dir", "b")
    (other,) = (tmp_path / "b").iterdir()
    weights = [torch.load(d / "agent.pt", weights_only=True) for d in (directory, other)]
    assert json.loads((directory / "config.json").read_text())["resumed"]
    assert learning.same(*weights)
