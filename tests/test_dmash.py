"""DMA*-SH: every part of the algorithm against its definition, and what its gradient step does."""

import re

import learning
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import aib_envs
import dmash_sac as script
from dmash_sac import Encoder, Hypernetwork, ReplayBuffer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_agent(**flags):
    return learning.make_agent(script, **flags)


def random_buffer(agent, **options):
    return learning.random_buffer(script, agent, **options)


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


# ------------------------------------------------- generated adapter --------------------------------------------------


def matrices(chunks):
    """W_down [32, 256], W_up [256, 32] and both biases of one sample, placed number by number from its chunks."""
    chunks = chunks.tolist()
    w_down, w_up = np.zeros((32, 256)), np.zeros((256, 32))
    for j in range(16):
        for place in range(512):
            row, column = divmod(place, 256)
            w_down[16 * row + j, column] = chunks[j][place]  # rows j and 16 + j
            row, column = divmod(place, 32)
            w_up[16 * row + j, column] = chunks[16 + j][place]  # rows j, 16 + j, ..., 240 + j
    return w_down, w_up, np.array(chunks[32][:32]), np.array(chunks[32][32:288])


def test_chunks_and_the_plain_adapter_are_equation_3():
    hypernetwork = Hypernetwork(8).double()
    z, x = torch.rand(2, 8).double(), torch.randn(2, 256).double()
    chunks = hypernetwork.chunks(z)
    assert chunks.shape == (2, 33, 512)
    for j, e in enumerate(hypernetwork.embeddings):
        f = F.relu(hypernetwork.second(F.relu(hypernetwork.first(torch.cat([z[0], e])))))
        torch.testing.assert_close(chunks[0, j], hypernetwork.head(f))
    adapted = script.adapt_plainly(x, chunks).detach().numpy()
    for i in range(2):
        w_down, w_up, b_down, b_up = matrices(chunks[i])
        hidden = np.maximum(w_down @ x[i].numpy() + b_down, 0)
        np.testing.assert_allclose(adapted[i], np.maximum(x[i].numpy() + w_up @ hidden + b_up, 0), rtol=1e-10)


def compare_adapters(module, inputs, dtype, tolerance):
    """The adapter that runs and the plain one of a script: outputs, and gradients of inputs and hypernetwork."""
    hypernetwork = module.Hypernetwork(inputs).to(dtype)
    z, x, weights = torch.rand(6, inputs, dtype=dtype), *torch.randn(2, 6, module.WIDTH, dtype=dtype)
    results = []
    for build, apply in ((hypernetwork, module.adapt), (hypernetwork.chunks, module.adapt_plainly)):
        leaves = [z.clone().requires_grad_(), x.clone().requires_grad_()]
        out = apply(leaves[1], build(leaves[0]))
        results.append([out, *torch.autograd.grad((out * weights).sum(), [*leaves, *hypernetwork.parameters()])])
    assert len(results[0]) == 1 + 2 + 7
    for fast, plain in zip(*results, strict=True):
        assert (fast - plain).abs().max() <= tolerance * plain.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_the_fast_adapter_is_the_plain_one(dtype, tolerance):
    compare_adapters(script, 8, dtype, tolerance)


CONSTANTS = [("WIDTH", 64), ("WIDTH", 128), ("WIDTH", 512), ("BOTTLENECK", 16), ("CHUNK", 1024), ("Z_DIM", 12)]


def holders(constant):
    return [name for name in learning.SCRIPTS if hasattr(learning.script(name), constant)]


@pytest.mark.parametrize(
    ("name", "constant", "value"), [(name, *change) for change in CONSTANTS for name in holders(change[0])]
)
def test_constants_can_be_changed(name, constant, value, tmp_path):
    """In a copy of the script: the fast adapter is still the plain one, and 20 gradient steps can be made."""
    text = (learning.ROOT / name).read_text()
    text, count = re.subn(rf"(?m)^{constant} = \d+", f"{constant} = {value}", text)
    assert count == 1
    (tmp_path / name).write_text(text)
    module = learning.load(tmp_path / name)
    agent, buffer = learning.learner(module)
    before = learning.weights(agent)
    learning.update(agent, buffer, steps=20, batch_size=8)
    after = learning.weights(agent)
    assert all(x.isfinite().all() for x in after.values()) and not learning.same(before, after)
    assert agent.actor.trunk[2].out_features == module.WIDTH
    if hasattr(module, "adapt"):
        compare_adapters(module, getattr(module, "Z_DIM", 2), torch.float64, 1e-11)


@pytest.mark.parametrize("chunk", [128, 768])  # no whole rows of 256; no whole number of chunks in 32 rows
def test_a_chunk_that_does_not_fit_is_refused(chunk, monkeypatch):
    monkeypatch.setattr(script, "CHUNK", chunk)
    with pytest.raises(ValueError):
        Hypernetwork(8)


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
    """Linear, ReLU, Linear, adapter (which ends with a ReLU), head."""
    network, hypernetwork = script.MLP(5, 3).double(), Hypernetwork(8).double()
    x, z = torch.randn(16, 5).double(), torch.rand(16, 8).double()
    first, _, second = network.trunk
    adapted = script.adapt_plainly(second(F.relu(first(x))), hypernetwork.chunks(z))
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
    for episode in range(episodes):  # column 0 says which episode and context, column 1 which place
        for array in (history.obs, history.actions, history.next_obs):
            array[..., 0] = 10 * episode + np.arange(n)[:, None]
            array[..., 1] = np.arange(k + steps)
        history.next_obs[..., 1] += 1
        history.rewards[:] = np.arange(steps)
        history.lengths[:] = steps
        buffer.add(history)
    obs, actions, next_obs, rewards, last, (w_obs, w_actions, w_deltas) = buffer.sample(20_000)
    t = rewards
    assert torch.equal(last, t == steps - 1)
    assert torch.equal(obs[:, 1], k + t) and torch.equal(next_obs[:, 1], k + t + 1)  # never the warm-up
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
    assert torch.equal(w_obs[..., 1], transition)
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


# ------------------------------------------------- the gradient step -------------------------------------------------


def test_every_loss_of_a_gradient_step_sees_the_same_omega(monkeypatch):
    agent, seen, original = make_agent(), [], script.adapt
    buffer = random_buffer(agent)

    def adapt(x, omega):
        seen.append((any(part.requires_grad for part in omega), [part.detach().clone() for part in omega]))
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


def test_what_the_dynamics_loss_trains_steps_last():
    """Adam's steps in order: critics, twice policy and temperature, then encoder, hypernetwork and dynamics model."""
    agent, order = make_agent(), []
    buffer = random_buffer(agent)
    names = ("dynamics_optimizer", "q_optimizer", "actor_optimizer", "alpha_optimizer")
    for name in names:
        getattr(agent, name).register_step_post_hook(
            lambda *_, name=name: order.append(name.removesuffix("_optimizer"))
        )
    agent.update(*buffer.sample(32), True)
    assert order == ["q", "actor", "alpha", "actor", "alpha", "dynamics"]
    order.clear()
    losses = agent.update(*buffer.sample(32), False)
    assert order == ["q", "dynamics"] and set(losses) == {"dynamics_loss", "qf_loss", "alpha"}


# ------------------------------------------------------- acting -------------------------------------------------------


def test_masks_are_drawn_in_training_only():
    agent, history = make_agent(), aib_envs.History(20, 24, 100, 4, 2)
    for training in (True, False):
        agent.act(np.ones((20, 4), np.float32), history, training=training)
        assert agent.encoder.training == training
