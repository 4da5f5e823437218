"""The gradient step, the targets and the acting of every script; and that the published runs are today's."""

import json
import math

import learning
import numpy as np
import pytest
import torch

import aib_envs
from tools import plan
from tools.methods import METHODS

ALL = [learning.script(name) for name in learning.SCRIPTS]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("script", ALL, ids=learning.SCRIPTS)
def test_the_losses_are_those_of_soft_actor_critic(script):
    """With networks that say 2, 4 (targets: 7, 5) and a policy whose log-probability is -3."""
    agent, buffer = learning.learner(script, gamma=0.9, policy_lr=0.0, q_lr=0.0)
    for name, value in {"qf1": 2.0, "qf2": 4.0, "qf1_target": 7.0, "qf2_target": 5.0}.items():
        network = getattr(agent, name)
        network.forward = lambda *x, forward=network.forward, value=value: 0 * forward(*x) + value
    act = agent.actor.get_action
    agent.actor.get_action = lambda *x: [part * 0 - constant for part, constant in zip(act(*x), (0, 3), strict=True)]
    agent.log_alpha.data.fill_(math.log(0.5))
    batch = buffer.sample(64)
    losses = agent.update(*batch, True)
    target = batch[3] + 0.9 * (5 + 0.5 * 3)
    torch.testing.assert_close(losses["qf_loss"], ((2 - target) ** 2 + (4 - target) ** 2).mean())
    assert losses["actor_loss"].item() == pytest.approx(0.5 * -3 - 2)
    assert losses["alpha_loss"].item() == pytest.approx(-0.5 * (-3 - 2))  # two actions: an entropy of -2 is wanted


@pytest.mark.parametrize("script", ALL, ids=learning.SCRIPTS)
def test_targets_follow_by_tau(script):
    agent, buffer = learning.learner(script, tau=0.25)
    before = learning.weights(agent)
    learning.update(agent, buffer)
    after = learning.weights(agent)
    slow = [name for name in after if "_target." in name]
    assert slow
    for name in slow:
        torch.testing.assert_close(after[name], 0.75 * before[name] + 0.25 * after[name.replace("_target", "")])


@pytest.mark.parametrize("script", ALL, ids=learning.SCRIPTS)
def test_evaluation_is_deterministic_and_training_samples(script):
    agent = learning.make_agent(script)
    history = aib_envs.History(20, agent.window_size, 100, 4, 2)
    rng = np.random.default_rng(0)
    for array in (history.obs, history.actions, history.next_obs, history.all_rewards):
        array[:] = rng.standard_normal(array.shape)
    history.t = 30
    size = script.make_envs(agent.args, [{}]).single_observation_space.shape[0]
    obs, state = np.ones((20, size), np.float32), torch.get_rng_state()
    first = agent.act(obs, history)
    assert np.array_equal(first, agent.act(obs, history)) and torch.equal(state, torch.get_rng_state())
    sampled = [agent.act(obs, history, training=True) for _ in range(50)]
    assert np.std(sampled, axis=0).min() > 0.05


@pytest.mark.parametrize("script", ALL, ids=learning.SCRIPTS)
def test_steps_after_a_divergence_are_not_sampled(script):
    lengths = np.arange(20) * 5  # none of the first context, 95 of the last
    buffer = learning.random_buffer(script, learning.make_agent(script), lengths=lengths)
    buffer.rewards[:] = torch.arange(buffer.rewards.shape[-1])
    buffer.actions[:] = torch.arange(20.0).view(20, 1, 1, 1)
    _, actions, _, rewards, *_ = buffer.sample(20_000)
    first = rewards.min()  # where the buffer holds the warm-up's rewards, too
    context = actions[:, 0]
    assert (rewards - first < 5 * context).all() and set(context.tolist()) == set(range(1, 20))


def test_published_runs_are_those_that_the_scripts_would_make_now():
    paths = list((learning.ROOT / "results" / "runs").glob("*/config.json"))
    assert paths
    for path in paths:
        config = json.loads(path.read_text())
        method, args = METHODS[config["method"]], config["args"]
        flags = [*method.flags.split(), "--total-timesteps", str(args["total_timesteps"])]
        now, defaults = plan.parsed(method, args["env_id"], args["seed"], flags)
        published, today = plan.identity(method.name, args, defaults), plan.identity(method.name, now)
        pairs = {name: (published.get(name), today.get(name)) for name in published | today}
        changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        assert not changed, f"{method.script} would not make {path.parent.name} again: {changed}"
