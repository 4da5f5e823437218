"""RSAC: what its encoders see, and which loss trains which of them."""

import learning
import numpy as np
import pytest
import torch

import aib_envs
import rsac

ENCODERS = ("infer_for_actor", "infer_for_q", "infer_for_q_target")
OF_POLICY = {"actor", "infer_for_actor"}
OF_Q = {"qf1", "qf2", "qf1_target", "qf2_target"}
Q_ENCODERS = {"infer_for_q", "infer_for_q_target"}
KINDS = pytest.mark.parametrize("hypernetwork", [False, True])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def moved(**flags):
    """The modules whose weights four gradient steps change."""
    agent, buffer = learning.learner(rsac, **flags)
    before = learning.weights(agent)
    learning.update(agent, buffer, 4)
    changed = {name for name, p in learning.weights(agent).items() if not torch.equal(p, before[name])}
    return {name.split(".")[0] for name in changed}


@KINDS
def test_each_loss_trains_its_own_encoder(hypernetwork):
    everything = OF_POLICY | OF_Q | Q_ENCODERS | {"log_alpha"}
    assert moved(hypernetwork=hypernetwork) == everything
    assert moved(hypernetwork=hypernetwork, policy_lr=0.0) == everything - OF_POLICY
    assert moved(hypernetwork=hypernetwork, encoder_lr=0.0) == everything - Q_ENCODERS
    assert moved(hypernetwork=hypernetwork, q_lr=0.0, encoder_lr=0.0) == OF_POLICY


@KINDS
def test_the_policys_loss_leaves_no_gradient_in_the_critics(hypernetwork):
    agent, buffer = learning.learner(rsac, hypernetwork=hypernetwork)
    batch = buffer.sample(16)
    gradients = []
    for update_policy in (False, True):
        torch.manual_seed(1)
        agent, _ = learning.learner(rsac, hypernetwork=hypernetwork)
        torch.manual_seed(2)
        agent.update(*batch, update_policy)
        gradients.append([p.grad for part in (agent.qf1, agent.qf2, agent.infer_for_q) for p in part.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_every_loss_of_a_gradient_step_sees_the_same_masked_window():
    agent, buffer = learning.learner(rsac, mask_prob=0.5)
    *batch, window = buffer.sample(64)
    seen = {name: [] for name in ENCODERS}
    for name in ENCODERS:
        keep = lambda module, inputs, name=name: seen[name].append(inputs)
        getattr(agent, name).encoder.register_forward_pre_hook(keep)
    agent.update(*batch, window, True)
    assert [len(calls) for calls in seen.values()] == [3, 3, 1]  # target or Q-loss, two updates
    first, *others = (call for calls in seen.values() for call in calls)
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))
    for part, masked in zip(window, first, strict=True):  # whole vectors, half of them
        hidden = (masked == 0).all(-1)
        assert torch.equal(masked[~hidden], part[~hidden]) and 0.3 < hidden.float().mean() < 0.7


@pytest.mark.parametrize("name", ENCODERS)
def test_the_loss_of_the_q_functions_depends_on_each_encoder(name):
    batch = learning.learner(rsac)[1].sample(32)

    def loss(changed):
        torch.manual_seed(1)
        agent, _ = learning.learner(rsac)
        if changed:
            torch.nn.init.normal_(getattr(agent, name).encoder.head.weight, std=10)
        torch.manual_seed(2)
        return agent.update(*batch, False)["qf_loss"]

    assert loss(False) == loss(False) != loss(True)


def test_windows_are_strictly_past_and_each_reward_stands_beside_its_action():
    k, steps, n, episodes = 24, 100, 3, 2
    history = aib_envs.History(n, k, steps, 2, 2)
    buffer = rsac.ReplayBuffer(history, episodes * steps, "cpu")
    for episode in range(episodes):  # column 0 says which episode and context, column 1 which place
        for array in (history.obs, history.actions, history.next_obs):
            array[..., 0] = 10 * episode + np.arange(n)[:, None]
            array[..., 1] = np.arange(k + steps)
        history.next_obs[..., 1] += 1
        history.all_rewards[:] = np.arange(k + steps)
        history.lengths[:] = steps
        buffer.add(history)
    obs, actions, next_obs, rewards, last, (w_obs, w_actions, w_deltas, w_rewards) = buffer.sample(20_000)
    now = obs[:, 1]
    assert torch.equal(rewards, now) and torch.equal(actions[:, 1], now) and torch.equal(next_obs[:, 1], now + 1)
    assert torch.equal(last, now == k + steps - 1) and now.min() == k  # never the warm-up
    place = w_actions[..., 1]
    assert torch.equal(w_rewards[..., 0], place) and torch.equal(w_obs[..., 1], place)
    assert torch.equal(w_deltas, torch.tensor([0.0, 1.0]).expand_as(w_deltas))
    assert torch.equal(w_obs[..., 0], obs[:, :1].expand(-1, k // 5))
    ages = (now[:, None] - place).long().unique()
    assert ages.tolist() == list(range(1, k + 1))


def test_it_acts_on_the_last_transitions_with_their_rewards_and_without_masks():
    agent = learning.make_agent(rsac, mask_prob=0.5)
    history = aib_envs.History(20, 24, 100, 4, 2)
    rng = np.random.default_rng(0)
    for array in (history.obs, history.actions, history.next_obs, history.all_rewards):
        array[:] = rng.standard_normal(array.shape)
    history.t = 30
    seen = []
    agent.infer_for_actor.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    obs, state = np.ones((20, 4), np.float32), torch.get_rng_state()
    first = agent.act(obs, history)
    assert np.array_equal(first, agent.act(obs, history)) and torch.equal(state, torch.get_rng_state())
    places = 30 + np.linspace(0, 23, 4).astype(int)  # in the arrays, which begin with 24 steps of warm-up
    assert np.array_equal(seen[0][3][..., 0], history.all_rewards[:, places])
    assert np.array_equal(seen[0][1], history.actions[:, places])
    agent.act(obs, history, training=True)
    assert 0.2 < np.mean([(part == 0).float().mean() for part in seen[-1]]) < 0.8


def test_the_hypernetworks_first_weights_may_not_depend_on_z():
    z = torch.rand(5, rsac.Z_DIM)
    for bias_init in (False, True):
        agent = learning.make_agent(rsac, hypernetwork=True, bias_init=bias_init)
        for infer in (agent.infer_for_actor, agent.infer_for_q):
            chunks = infer.hypernetwork.chunks(z)
            assert (torch.allclose(chunks[0], chunks[1], atol=1e-6)) == bias_init
            assert not torch.allclose(chunks[0, 0], chunks[0, 1], atol=1e-3)


@pytest.mark.parametrize(("flags", "prob"), [("", 0.2), ("--hypernetwork", 0.4), ("--mask-prob 0.1", 0.1)])
def test_masks_are_as_frequent_as_those_of_the_methods_beside_it(flags, prob):
    assert rsac.mask_probability(learning.parse(rsac, flags)) == prob
