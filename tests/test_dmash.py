"""DMA*-SH: every part of the algorithm against its definition, and what its gradient step does."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import aib_envs
import dmash_sac as script
from dmash_sac import Agent, Args, Encoder, Hypernetwork, ReplayBuffer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def filled_buffer(env_id="DI", episodes=2, lengths=None):
    """A buffer of random episodes."""
    task, rng = aib_envs.get_task(env_id), np.random.default_rng(0)
    history = aib_envs.History(20, task.window, task.steps, task.obs_dim, task.act_dim)
    buffer = ReplayBuffer(history, episodes * task.steps, "cpu")
    for _ in range(episodes):
        for array in (history.obs, history.actions, history.rewards):
            array[:] = rng.standard_normal(array.shape)
        history.lengths[:] = task.steps if lengths is None else lengths
        buffer.add(history)
    return buffer


def make_agent(env_id="DI", **kwargs):
    task = aib_envs.get_task(env_id)
    return Agent(task.obs_dim, task.act_dim, Args(env_id=env_id, **kwargs))


# ----------------------------------------------------- encoder -------------------------------------------------------


def test_sim_norm_is_a_softmax_in_groups_of_four():
    x = torch.randn(5, 8)
    z = script.sim_norm(x)
    assert torch.equal(z[:, :4], F.softmax(x[:, :4], -1)) and torch.equal(z[:, 4:], F.softmax(x[:, 4:], -1))
    torch.testing.assert_close(z.sum(-1), torch.full((5,), 2.0))


def test_avg_l1_norm():
    x = torch.randn(5, 7, 32)
    torch.testing.assert_close(script.avg_l1_norm(x).abs().mean(-1), torch.ones(5, 7))
    torch.testing.assert_close(script.avg_l1_norm(3 * x), script.avg_l1_norm(x))
    assert torch.equal(script.avg_l1_norm(torch.zeros(2, 32)), torch.zeros(2, 32))


@pytest.mark.parametrize("mask_prob", [0.4, 0.2, 0.0])
def test_masking_hides_whole_parts_at_its_rate_and_only_in_training(mask_prob):
    encoder, seen = Encoder(4, 2, mask_prob, True), []
    encoder.embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    ones = torch.ones(400, 25, 4), torch.ones(400, 25, 2), torch.ones(400, 25, 4)
    encoder(*ones)
    hidden = torch.stack([part[..., 0] == 0 for part in seen[0].split([4, 2, 4], -1)])  # [part, batch, time]
    for part, first in zip(seen[0].split([4, 2, 4], -1), hidden, strict=True):
        assert torch.equal(part == 0, first[..., None].expand_as(part))
    rates = hidden.float().mean((1, 2))
    assert (rates - mask_prob).abs().max() < 5 * (0.25 / 10_000) ** 0.5  # 5 standard errors of 10,000 draws
    both = (hidden[0] & hidden[1]).float().mean()
    assert abs(both - mask_prob**2) < 0.025  # independent
    encoder.eval()
    encoder(*ones)
    assert (seen[1] == 1).all()


@pytest.mark.parametrize(("window", "count"), [(24, 4), (128, 25)])
def test_subsample_is_a_fifth_of_the_window(window, count):
    positions = script.subsample(4000, window, training=True)
    assert positions.shape == (4000, count) and all(len(set(row.tolist())) == count for row in positions)
    share = torch.bincount(positions.flatten(), minlength=window) / positions.numel()
    assert share.min() > 0.75 / window and share.max() < 1.25 / window  # all positions alike
    assert (positions.diff(dim=1) < 0).float().mean() > 0.4  # random order
    fixed = script.subsample(7, window, training=False)
    assert torch.equal(fixed, script.subsample(7, window, training=False)) and fixed.shape == (1, count)
    assert fixed[0, 0] == 0 and fixed[0, -1] == window - 1 and (fixed.diff() > 0).all()


def test_subsample_in_evaluation_has_the_published_positions():
    assert script.subsample(1, 24, training=False).tolist() == [[0, 7, 15, 23]]


# -------------------------------------------------- factored adapter --------------------------------------------------


def materialise(hypernetwork, z):
    """The adapter's matrices from the definition: 33 chunks of 512 numbers, one after the other."""
    rows = []
    for e in hypernetwork.embeddings:
        x = torch.cat([z, e.expand(len(z), -1)], 1)
        features = F.relu(hypernetwork.second(F.relu(hypernetwork.first(x))))
        rows.append(hypernetwork.head(features))
    flat = torch.cat(rows, 1)[:, :16_672]
    w_down, w_up, b_down, b_up = flat.split([32 * 256, 256 * 32, 32, 256], 1)
    w_down = w_down.view(-1, 16, 2, 256).transpose(1, 2).reshape(-1, 32, 256)  # chunk j holds rows j and 16 + j,
    w_up = w_up.view(-1, 16, 16, 32).transpose(1, 2).reshape(-1, 256, 32)  # and j, 16 + j, ..., 240 + j
    return w_down, w_up, b_down, b_up


def adapt_materialised(x, matrices):
    w_down, w_up, b_down, b_up = matrices
    hidden = F.relu(torch.einsum("boi,bi->bo", w_down, x) + b_down)
    return F.relu(x + torch.einsum("boi,bi->bo", w_up, hidden) + b_up)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_factored_adapter_is_the_materialised_one(dtype, tolerance):
    hypernetwork = Hypernetwork(8).to(dtype)
    z, x = torch.rand(16, 8, dtype=dtype), torch.randn(16, 256, dtype=dtype)
    weights, results = torch.randn(16, 256, dtype=dtype), []
    for build, apply in ((hypernetwork, script.adapt), (lambda z: materialise(hypernetwork, z), adapt_materialised)):
        inputs = [z.clone().requires_grad_(), x.clone().requires_grad_()]
        out = apply(inputs[1], build(inputs[0]))
        gradients = torch.autograd.grad((out * weights).sum(), [*inputs, *hypernetwork.parameters()])
        results.append([out, *gradients])
    assert len(results[0]) == 1 + 2 + 7
    for factored, expected in zip(*results, strict=True):
        assert (factored - expected).abs().max() <= tolerance * expected.abs().max()


def test_an_adapter_of_zero_weights_is_the_final_relu():
    hypernetwork = Hypernetwork(8)
    torch.nn.init.zeros_(hypernetwork.head.weight)
    torch.nn.init.zeros_(hypernetwork.head.bias)
    x = torch.randn(3, 256)
    assert torch.equal(script.adapt(x, hypernetwork(torch.rand(3, 8))), F.relu(x))


# ------------------------------------------------- policy ------------------------------------------------------------


def test_log_standard_deviation_ends_at_minus_5_and_2():
    agent = make_agent()
    for bias, bound in ((-1e3, -5.0), (1e3, 2.0), (0.0, -1.5)):
        torch.nn.init.zeros_(agent.actor.head.weight)
        torch.nn.init.constant_(agent.actor.head.bias, bias)
        _, log_std = agent.actor(torch.randn(7, 4), agent.hypernetwork(torch.rand(7, 8)))
        assert torch.equal(log_std, torch.full((7, 2), bound))


def test_adapter_follows_the_trunk_directly():
    """Linear, ReLU, Linear, adapter (which ends with a ReLU), head, written out with materialised matrices."""
    network, hypernetwork = script.MLP(5, 3).double(), Hypernetwork(8).double()
    x, z = torch.randn(16, 5).double(), torch.rand(16, 8).double()
    first, _, second = network.trunk
    adapted = adapt_materialised(second(F.relu(first(x))), materialise(hypernetwork, z))
    torch.testing.assert_close(network(x, hypernetwork(z)), network.head(adapted))


def test_log_probability_is_the_density_of_the_squashed_gaussian():
    agent = make_agent().double()
    omega = agent.hypernetwork(torch.rand(1, 8).double())
    obs, grid = torch.randn(1, 4).double(), torch.linspace(-0.99999, 0.99999, 200_001).double()
    mean, log_std = agent.actor(obs, omega)
    assert log_std.min() >= -5 and log_std.max() <= 2
    action, log_prob = agent.actor.get_action(obs, omega)
    base = torch.distributions.Normal(mean[0], log_std[0].exp())
    density = lambda a: base.log_prob(torch.atanh(a)) - torch.log(1 - a**2)  # per action component
    torch.testing.assert_close(log_prob[0], density(action[0]).sum(), rtol=1e-4, atol=1e-4)
    mass = torch.trapezoid(density(grid[:, None]).exp(), grid, dim=0)
    torch.testing.assert_close(mass, torch.ones(2).double(), rtol=1e-3, atol=1e-3)


# --------------------------------------------------- replay buffer ----------------------------------------------------


def test_sampled_windows_are_strictly_past_and_stay_in_their_episode():
    k, steps, n, episodes = 24, 100, 3, 4
    history = aib_envs.History(n, k, steps, 2, 2)
    buffer = ReplayBuffer(history, episodes * steps, "cpu")
    for episode in range(episodes):  # observations carry (episode and context, place); actions the transition
        history.obs[..., 0] = 10 * episode + np.arange(n)[:, None]
        history.obs[..., 1] = np.arange(k + steps + 2)
        history.actions[..., 0] = 10 * episode + np.arange(n)[:, None]
        history.actions[..., 1] = np.arange(k + steps)
        history.rewards[:] = np.arange(steps)
        history.lengths[:] = steps
        buffer.add(history)
    obs, actions, next_obs, rewards, (w_obs, w_actions, w_deltas) = buffer.sample(20_000)
    t = rewards
    assert torch.equal(obs[:, 1], k + 1 + t) and torch.equal(next_obs[:, 1], k + 2 + t)  # never the warm-up
    assert torch.equal(actions[:, 1], k + t)
    for part in (next_obs, actions):
        assert torch.equal(part[:, 0], obs[:, 0])
    for part in (w_obs, w_actions):
        assert torch.equal(part[..., 0], obs[:, :1].expand(-1, 4))
    transition = w_actions[..., 1]
    assert (transition < (k + t)[:, None]).all() and (transition >= t[:, None]).all()
    age = (k + t)[:, None] - transition  # 1 ... K steps ago, all equally often
    counts = torch.bincount(age.long().flatten(), minlength=k + 1)
    assert counts[0] == 0 and len(counts) == k + 1 and counts[1:].min() > 0.8 * counts[1:].float().mean()
    assert torch.equal(w_obs[..., 1], transition + (transition >= k))
    assert torch.equal(w_deltas, torch.tensor([0.0, 1.0]).expand_as(w_deltas))
    where = torch.stack([obs[:, 0], t]).unique(dim=1).shape[1]
    assert where == n * episodes * steps  # contexts, episodes and steps are all drawn


def test_buffer_overwrites_the_oldest_episode():
    history = aib_envs.History(1, 24, 100, 1, 1)
    buffer = ReplayBuffer(history, 250, "cpu")
    for episode in range(5):
        history.rewards[:], history.lengths[:] = episode, 100
        buffer.add(history)
        assert set(buffer.sample(500)[3].tolist()) == {e for e in (episode - 1, episode) if e >= 0}


def test_steps_after_a_divergence_are_not_sampled():
    buffer = filled_buffer(episodes=2, lengths=np.arange(20) * 5)  # none of the first context, 95 of the last
    buffer.rewards[:] = torch.arange(100.0)
    buffer.actions[:] = torch.arange(20.0).view(20, 1, 1, 1)
    _, actions, _, rewards, _ = buffer.sample(20_000)
    assert (rewards < 5 * actions[:, 0]).all() and set(actions[:, 0].tolist()) == set(range(1, 20))


# ------------------------------------------------- the gradient step -------------------------------------------------


def test_every_loss_of_a_gradient_step_sees_the_same_omega(monkeypatch):
    agent, buffer, seen, original = make_agent(), filled_buffer(), [], script.adapt

    def adapt(x, omega):
        seen.append((omega[0].requires_grad, [part.detach().clone() for part in omega]))
        return original(x, omega)

    monkeypatch.setattr(script, "adapt", adapt)
    for step in range(3):
        seen.clear()
        agent.update(*buffer.sample(32), step % 2 == 0)
        with_gradient, omegas = zip(*seen, strict=True)
        assert len(seen) == 1 + 5 + 2 * 3 * (step % 2 == 0)  # dynamics; critics; two policy updates every second step
        assert with_gradient == (True, *[False] * (len(seen) - 1))
        for omega in omegas:
            assert all(torch.equal(a, b) for a, b in zip(omega, omegas[0], strict=True))
    assert [len(part) for part in omegas[0]] == [32, 32, 32, 32, 256, 32]


def test_time_limits_bootstrap():
    """The critics' loss on last steps of episodes is the one with a bootstrapped target."""
    agent, buffer = make_agent(), filled_buffer()
    buffer.rewards[:] = torch.arange(100.0)
    obs, actions, next_obs, rewards, window = buffer.sample(2000)
    last = rewards == 99
    assert last.sum() > 3
    obs, actions, next_obs, rewards = (x[last] for x in (obs, actions, next_obs, rewards))
    window = tuple(x[last] for x in window)
    torch.manual_seed(2)
    with torch.no_grad():
        omega = agent.hypernetwork(agent.encoder(*window))
        next_actions, log_pi = agent.actor.get_action(next_obs, omega)
        q = [f(torch.cat([next_obs, next_actions], 1), omega)[:, 0] for f in (agent.qf1_target, agent.qf2_target)]
        target = rewards + 0.99 * (torch.minimum(*q) - agent.log_alpha.exp() * log_pi)
        q = [f(torch.cat([obs, actions], 1), omega)[:, 0] for f in (agent.qf1, agent.qf2)]
        expected, cut = (sum(F.mse_loss(x, y) for x in q) for y in (target, rewards))
    torch.manual_seed(2)
    loss = agent.update(obs, actions, next_obs, rewards, window, False)["qf"]
    torch.testing.assert_close(loss, expected)
    assert abs(loss - cut) > 1e-3


def test_target_networks_follow_by_tau():
    agent, buffer = make_agent(tau=0.25), filled_buffer()
    copies = lambda: [
        [p.clone() for q in pair for p in q.parameters()]
        for pair in ((agent.qf1, agent.qf2), (agent.qf1_target, agent.qf2_target))
    ]
    _, old = copies()
    agent.update(*buffer.sample(32), True)
    for old_target, new, target in zip(old, *copies(), strict=True):
        torch.testing.assert_close(target, 0.75 * old_target + 0.25 * new)


# ------------------------------------------------------- acting -------------------------------------------------------


def test_evaluation_acts_deterministically_and_draws_no_random_numbers():
    agent, history = make_agent(), aib_envs.History(20, 24, 100, 4, 2)
    history.obs[:], history.actions[:], history.t = np.random.default_rng(0).standard_normal((20, 126, 1)), 0.5, 30
    obs, state = np.ones((20, 4), np.float32), torch.get_rng_state()
    first = agent.act(obs, history, training=False)
    assert np.array_equal(first, agent.act(obs, history, training=False))
    assert torch.equal(state, torch.get_rng_state())
    sampled = agent.act(obs, history, training=True)
    assert agent.encoder.training and not np.array_equal(sampled, agent.act(obs, history, training=True))
    assert first.shape == (20, 2) and first.dtype == np.float32 and np.abs(sampled).max() <= 1
