"""All methods: sizes, which loss moves which parameters, and the paper's theory on the real code."""

import gymnasium as gym
import learning
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import aib_envs
import da_sac
import dma_sac
import dmah_sac
import dmash_sac
import dr_sac
import rsac

CONTEXT, CRITICS = {"encoder", "dynamics"}, {"qf1", "qf2", "qf1_target", "qf2_target"}
RL = {"actor", "log_alpha", *CRITICS}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


make = learning.learner


def moved(agent, buffer, steps=4, scale=1.0):
    """Names of the parameters that gradient steps change by at least a bit."""
    before = learning.weights(agent)
    learning.update(agent, buffer, steps, reward_scale=scale)
    return {name for name, p in learning.weights(agent).items() if not torch.equal(p, before[name])}


def modules(names):
    return {name.split(".")[0] for name in names}


# ------------------------------------------------------- sizes -------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "flags", "count"),
    [
        (dma_sac, {"mask_prob": 0.0, "normalise": False}, 321_766),
        (dma_sac, {}, 321_766),
        (da_sac, {}, 338_470),
        (dmash_sac, {}, 352_366),
    ],
)
def test_parameter_counts_on_walker_are_the_papers(script, flags, count):
    agent, _ = make(script, "Walker", **flags)
    assert (
        sum(p.numel() for name, p in agent.named_parameters() if "target" not in name and name != "log_alpha") == count
    )


# ------------------------------------------------ which loss moves what -----------------------------------------------


@pytest.mark.parametrize(
    ("script", "flags", "context"),
    [
        (dma_sac, {}, CONTEXT),
        (dma_sac, {"mask_prob": 0.0, "normalise": False}, CONTEXT),
        (dma_sac, {"kl_beta": 0.4}, CONTEXT),
        (dmah_sac, {}, CONTEXT),
        (dmah_sac, {"rl_only": True}, CONTEXT),
        (dmash_sac, {}, CONTEXT | {"hypernetwork"}),
        (dmash_sac, {"mask_prob": 0.0, "normalise": False}, CONTEXT | {"hypernetwork"}),
    ],
)
def test_dynamics_loss_and_rl_losses_train_different_parameters(script, flags, context):
    assert modules(moved(*make(script, **flags))) == context | RL
    assert modules(moved(*make(script, policy_lr=0.0, q_lr=0.0, **flags))) == context
    assert modules(moved(*make(script, dynamics_lr=0.0, **flags))) == RL
    results = []
    for scale in (1.0, 100.0):  # other rewards: other critics, but the same encoder to the bit
        torch.manual_seed(0)
        agent, buffer = make(script, **flags)
        moved(agent, buffer, scale=scale)
        results.append(learning.weights(agent))
    differing = {name for name in results[0] if not torch.equal(results[0][name], results[1][name])}
    assert modules(differing) >= {"actor", "qf1", "qf2"} and not modules(differing) & context


@pytest.mark.parametrize(("script", "flags"), [(dr_sac, {}), (dr_sac, {"context_aware": True}), (da_sac, {})])
def test_methods_without_dynamics_model_train_policy_and_critics(script, flags):
    assert modules(moved(*make(script, **flags))) == RL
    assert modules(moved(*make(script, policy_lr=0.0, **flags))) == RL - {"actor"}
    assert modules(moved(*make(script, q_lr=0.0, **flags))) == {"actor"}


@pytest.mark.parametrize("script", [da_sac, dmah_sac])
def test_own_hypernetworks_learn_from_their_modules_loss(script):
    names = moved(*make(script, q_lr=0.0))
    assert any(name.startswith("actor.hypernetwork") for name in names)
    assert not any(name.startswith("qf") for name in names)
    names = moved(*make(script, policy_lr=0.0))
    assert {f"{q}.hypernetwork.embeddings" for q in ("qf1", "qf2")} <= names
    assert not any(name.startswith("actor") for name in names)


def test_hypernetworks_of_the_dynamics_model():
    assert any("hypernetwork" in name for name in moved(*make(dmah_sac)) if name.startswith("dynamics"))
    agent, _ = make(dmah_sac, rl_only=True)
    assert not any("hypernetwork" in name for name, _ in agent.dynamics.named_parameters())


@pytest.mark.parametrize("flag", ["detach_critic", "detach_actor"])
def test_non_detached_rl_losses_join_the_step_of_encoder_and_hypernetwork(flag):
    gradients = {}
    for detached in (True, False):
        torch.manual_seed(0)
        agent, buffer = make(dmash_sac, mask_prob=0.0, dynamics_lr=0.0, policy_lr=0.0, q_lr=0.0, **{flag: detached})
        context = [*agent.encoder.parameters(), *agent.hypernetwork.parameters()]
        batch, noise = buffer.sample(64), torch.get_rng_state()
        agent.update(*batch, True)
        gradients[detached] = [p.grad.clone() for p in context]
    torch.set_rng_state(noise)
    obs, actions, next_obs, rewards, _, window = batch
    omega = agent.infer(window)  # nothing has moved, and nothing is masked: the same omega, now with gradients
    with torch.no_grad():
        next_actions, log_pi = agent.actor.get_action(next_obs, omega)
        next_inputs = torch.cat([next_obs, next_actions], 1)
        next_q = torch.minimum(agent.qf1_target(next_inputs, omega), agent.qf2_target(next_inputs, omega))[:, 0]
        target = rewards + 0.99 * (next_q - log_pi)
    if flag == "detach_critic":
        inputs = torch.cat([obs, actions], 1)
        loss = sum(F.mse_loss(q(inputs, omega)[:, 0], target) for q in (agent.qf1, agent.qf2))
    else:
        loss = 0.0  # of both policy updates; alpha stays 1
        for _ in range(2):
            omega = agent.infer(window)
            pi, log_pi = agent.actor.get_action(obs, omega)
            inputs = torch.cat([obs, pi], 1)
            loss = loss + (log_pi - torch.minimum(agent.qf1(inputs, omega), agent.qf2(inputs, omega))[:, 0]).mean()
    expected = torch.autograd.grad(loss, context)
    for joined, dynamics, rl in zip(gradients[False], gradients[True], expected, strict=True):
        torch.testing.assert_close(joined, dynamics + rl, rtol=1e-3, atol=1e-5)
    assert max(g.abs().max() for g in expected) > 1e-3
    assert modules(moved(*make(dmash_sac, **{flag: False}))) == CONTEXT | RL | {"hypernetwork"}


# ------------------------------------------------ replay without a window --------------------------------------------


@pytest.mark.parametrize("script", [dr_sac, da_sac])
def test_buffer_without_a_window_samples_every_step_of_the_kept_episodes(script):
    history = aib_envs.History(3, 0, 10, 2, 1)
    buffer = script.ReplayBuffer(history, 25, "cpu")  # two episodes
    for episode in range(3):  # the third one takes the place of the first
        history.begin()
        for t in range(10):
            obs = np.stack([10 * episode + np.arange(3), np.full(3, t)], 1)
            diverged = np.array([False, t >= 4, False])
            history.add(obs, 0.5 * obs[:, 1:], 2 * obs[:, 1], obs + np.array([0, 1]), diverged)
        buffer.add(history)
    obs, actions, next_obs, rewards, last = buffer.sample(5000)
    assert torch.equal(last, obs[:, 1] == 9)
    assert torch.equal(next_obs, obs + torch.tensor([0, 1]))
    assert torch.equal(actions, 0.5 * obs[:, 1:]) and torch.equal(rewards, 2 * obs[:, 1])
    drawn = {tuple(row) for row in obs.int().tolist()}
    assert drawn == {(10 * e + c, t) for e in (1, 2) for c in range(3) for t in range(4 if c == 1 else 10)}


@pytest.mark.parametrize("script", [dr_sac, da_sac, dma_sac, dmah_sac, dmash_sac, rsac])
def test_without_a_bootstrap_the_target_of_last_steps_is_their_reward(script):
    obs, actions, next_obs, rewards, last, *window = make(script)[1].sample(32)

    def loss(last, **flags):
        torch.manual_seed(1)
        agent, _ = make(script, **({"bootstrap_at_limit": False} | flags))
        return agent.update(obs, actions, next_obs, rewards, last, *window, False)["qf_loss"]

    all_, none = torch.ones_like(last), torch.zeros_like(last)
    assert loss(all_) == loss(none, gamma=0.0) != loss(none)
    assert loss(none) == loss(all_, bootstrap_at_limit=True)


# ------------------------------------------------------ DMA-Pearl ----------------------------------------------------


def test_pearl_kl_is_the_closed_form_and_evaluation_takes_the_mean():
    agent, buffer = make(dma_sac, kl_beta=0.4)
    *_, window = buffer.sample(64)
    head, seen = agent.encoder.head, []
    head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    samples = torch.stack([agent.encoder(*window) for _ in range(400)])
    mean, variance = head.mean(seen[0]), head.variance(seen[0])
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, variance.sqrt()), torch.distributions.Normal(0.0, 1.0)
    ).mean()
    torch.testing.assert_close(head.kl, expected)
    assert ((samples.mean(0) - mean).abs() < 6 * (variance / 400).sqrt()).all()
    torch.testing.assert_close(samples.var(0).mean(), variance.mean(), rtol=0.05, atol=0)
    agent.encoder.eval()
    assert torch.equal(agent.encoder(*window), mean) and torch.equal(agent.encoder(*window), mean)


def test_pearl_loss_is_a_product_without_masks_and_norms():
    agent, buffer = make(dma_sac, kl_beta=0.7, dynamics_lr=0.0)
    assert agent.encoder.mask_prob == 0 and not agent.encoder.normalise
    obs, actions, next_obs, rewards, last, window = buffer.sample(64)
    state = torch.get_rng_state()
    agent.encoder.train()
    loss = F.mse_loss(agent.dynamics(torch.cat([obs, actions], 1), agent.encoder(*window)), next_obs - obs)
    loss = loss * (1 + 0.7 * agent.encoder.head.kl)
    expected = torch.autograd.grad(loss, [*agent.encoder.parameters(), *agent.dynamics.parameters()])
    torch.set_rng_state(state)
    agent.update(obs, actions, next_obs, rewards, last, window, False)
    for p, g in zip([*agent.encoder.parameters(), *agent.dynamics.parameters()], expected, strict=True):
        torch.testing.assert_close(p.grad, g)


# ---------------------------------------------------- who sees what --------------------------------------------------


def test_concat_sees_the_true_context_and_dr_does_not():
    contexts = aib_envs.context_set("DI", "train")
    raw = np.stack([aib_envs.context_vector("DI", context) for context in contexts])
    scaled = np.stack([aib_envs.context_vector("DI", context, scaled=True) for context in contexts])
    for script, flags, expected in [
        (dr_sac, {}, None),
        (dr_sac, {"context_aware": True}, raw),
        (dr_sac, {"context_aware": True, "scale_context": True}, scaled),
        (da_sac, {}, raw),
        (da_sac, {"scale_context": True}, scaled),
        (dma_sac, {}, None),
        (dmah_sac, {}, None),
        (dmash_sac, {}, None),
    ]:
        envs = script.make_envs(script.Args(env_id="DI", **flags), contexts)
        obs, _ = envs.reset(seed=aib_envs.reset_seeds(20, 0))
        assert obs.shape == (20, 4 if expected is None else 6)
        assert expected is None or np.array_equal(obs[:, 4:], expected)


def test_da_networks_get_the_context_through_the_adapter_only():
    agent, _ = make(da_sac)
    assert agent.actor.trunk[0].in_features == 4 and agent.qf1.trunk[0].in_features == 4 + 2
    history = aib_envs.History(3, 0, 100, 6, 2)
    obs = np.ones((3, 6), np.float32)
    obs[:, 4:] = [[0.5, -1], [0.5, 1], [0.5, -1]]
    actions = agent.act(obs, history, training=False)
    np.testing.assert_allclose(actions[0], actions[2], rtol=1e-5, atol=1e-6)
    assert not np.allclose(actions[0], actions[1], rtol=1e-3)


def test_da_hands_out_what_each_context_generates():
    """Once for each of the 20 contexts, or for each sample: the same outputs and the same gradients."""
    agent, buffer = make(da_sac)
    obs, context = buffer.sample(64)[0].tensor_split([-2], dim=1)
    which = (context[:, None] == agent.contexts).all(2).float()
    assert (which.sum(1) == 1).all() and torch.equal(which @ agent.contexts, context)
    found = {}
    for name, pair in {"handed out": (agent.contexts, which), "own": (context, torch.eye(64))}.items():
        agent.actor.zero_grad()
        outputs = torch.cat(agent.actor(obs, pair))
        outputs.pow(2).sum().backward()
        found[name] = [outputs.detach(), *(p.grad.clone() for p in agent.actor.parameters())]
    torch.testing.assert_close(found["handed out"], found["own"], rtol=1e-4, atol=1e-4)


def test_da_does_not_learn_from_a_context_that_is_not_a_training_context():
    agent, buffer = make(da_sac)
    obs, *rest = buffer.sample(64)
    obs[3, -2] += 1e-3
    assert agent.update(obs, *rest, False)["qf_loss"].isnan()


# -------------------------------------------------------- theory -----------------------------------------------------


def hand_made_omega(down, up, z):
    """Omega of the real layout whose matrices are W_down = down[0] + z down[1] (top left corner), W_up likewise."""
    head_down, head_up = torch.zeros(256, 2, 65).double(), torch.zeros(32, 16, 65).double()
    for column, (w_down, w_up) in enumerate(zip(down, up, strict=True)):
        for chunk in (0, 1):  # rows 0 and 1 are the first of chunks 0 and 1
            head_down[:2, 0, 2 * chunk + column] = torch.tensor(w_down[chunk])
            head_up[:2, 0, 2 * chunk + column] = torch.tensor(w_up[chunk])
    f = torch.zeros(len(z), 16, 65, dtype=torch.float64)
    for chunk in (0, 1):
        f[:, chunk, 2 * chunk], f[:, chunk, 2 * chunk + 1] = 1, z
    zeros = torch.zeros(len(z), 288, dtype=torch.float64)
    return dmash_sac.Omega(f, f, zeros[:, :32], zeros[:, 32:], head_down.flatten(1), head_up.flatten(1))


def features(*columns):
    """Trunk features [batch, 256] that begin with `columns`."""
    return F.pad(torch.stack(columns, 1), (0, 256 - len(columns)))


NOTHING, IDENTITY = [[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]


def test_theorem_1_1_a_generated_adapter_realises_the_product_exactly():
    s, z = torch.randn(2, 1000, dtype=torch.float64)
    h = ([[-1.0, 0.0], [0.0, -1.0]], [[1.0, 0.0], [0.0, -1.0]])  # h(z) = [z - 1, -(z + 1)] on the diagonal
    omega = hand_made_omega((IDENTITY, NOTHING), h, z)
    x = features(F.relu(s), F.relu(-s))
    hidden = dmash_sac.generated_linear(x, omega.down, omega.head_down)
    x = x + dmash_sac.generated_linear(hidden, omega.up, omega.head_up)  # the theorem's has no ReLU
    torch.testing.assert_close(x[:, 0] + x[:, 1], s * z, rtol=1e-14, atol=1e-14)


def test_theorem_1_1_a_relu_network_on_both_inputs_cannot():
    network = dma_sac.MLP(1, 1).double()  # [s; z] -> number; piecewise linear
    torch.nn.init.normal_(network.trunk[0].bias)
    s, z, step = *torch.randn(2, 500, dtype=torch.float64), 1e-4
    values, patterns = [], []
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        inputs, codes = (s + i * step)[:, None], F.pad((z + j * step)[:, None], (0, 7))
        first = network.trunk[0](torch.cat([inputs, codes], 1))
        second = network.trunk(torch.cat([inputs, codes], 1))
        patterns.append(torch.cat([first > 0, second > 0], 1))
        values.append(network(inputs, codes)[:, 0])
    inside = torch.stack([(p == patterns[0]).all(1) for p in patterns]).all(0)  # all four corners in one cell
    mixed = (values[3] - values[2] - values[1] + values[0]) / step**2
    assert inside.float().mean() > 0.5 and mixed[inside].abs().max() < 1e-6  # that of s * z is 1 everywhere


def test_theorem_a_5_the_adapter_with_its_final_relu_inverts_exactly():
    s = torch.randn(1000, dtype=torch.float64)
    for mode, expected in ((0.0, s), (1.0, -s)):
        omega = hand_made_omega((IDENTITY, NOTHING), (NOTHING, [[-2.0, 2.0], [2.0, -2.0]]), torch.full_like(s, mode))
        x = dmash_sac.adapt(features(s, -s), omega)
        assert torch.equal(x[:, 0] - x[:, 1], expected)


def test_lemma_1_7_a_context_blind_policy_sees_the_average_of_the_modes():
    plus, minus = (gym.make("AIB/DI-v0", context={"inversion": c}).unwrapped for c in (1, -1))
    for action in np.random.default_rng(0).uniform(-1, 1, (50, 2)):
        changes = []
        for env in (plus, minus):
            env.reset(seed=3)  # velocity zero
            env.step(action)
            changes.append(env.state[2:].copy())
        assert np.array_equal(changes[0] + changes[1], np.zeros(2)) and np.abs(changes[0]).max() > 0

    def total(env, gain):
        env.reset(seed=4)
        obs, total = env.state, 0.0
        for _ in range(100):
            obs, reward, *_ = env.step(np.clip(gain * (obs[:2] + 1.5 * obs[2:]), -1, 1))
            total += reward
        return total

    objective = {gain: (total(plus, gain) + total(minus, gain)) / 2 for gain in (-1.0, 1.0)}
    assert objective[-1.0] == objective[1.0]  # a policy and its mirror image are worth the same
    assert total(plus, -1.0) > 50 and total(minus, -1.0) == 0  # though one is good in one mode and fails in the other


# ---------------------------------------------------- shadow gradient ------------------------------------------------


@pytest.mark.parametrize("script", [dma_sac, dmah_sac, dmash_sac])
def test_shadow_gradient_is_the_mean_norm_of_the_samples_own_gradients(script):
    agent, buffer = make(script)
    agent.actor.get_action = lambda obs, context: [x := agent.actor(obs, context)[0].tanh(), x.sum(1)]  # no noise
    agent.eval()
    obs, *_, window = batch = buffer.sample(6)
    norms = []
    for i in range(6):
        z = agent.encoder(*(part[i : i + 1] for part in window)).detach().requires_grad_()
        context = agent.hypernetwork(z) if script is dmash_sac else z
        pi, log_pi = agent.actor.get_action(obs[i : i + 1], context)
        q = [qf(torch.cat([obs[i : i + 1], pi], 1), context) for qf in (agent.qf1, agent.qf2)]
        (agent.log_alpha.exp() * log_pi - min(q)).sum().backward()
        norms.append(z.grad.norm().item())
    assert min(norms) > 0
    assert agent.diagnose(*batch)["shadow_gradient"] == pytest.approx(sum(norms) / 6, rel=1e-4)
    assert all(x.grad is None for x in agent.encoder.parameters())  # computed, never applied


@pytest.mark.parametrize(
    ("script", "flags"), [(dma_sac, {}), (dma_sac, {"kl_beta": 0.4}), (dmah_sac, {}), (dmash_sac, {})]
)
def test_what_diagnose_says_depends_on_nothing_called_before_and_changes_nothing(script, flags):
    agent, buffer = make(script, policy_lr=0.0, q_lr=0.0, dynamics_lr=0.0, tau=0.0, **flags)
    batch = buffer.sample(16)
    history = aib_envs.History(3, agent.window_size, 100, 4, 2)
    obs = np.ones((3, 4), np.float32)
    before = [
        lambda: agent.train(),
        lambda: agent.eval(),
        lambda: agent.act(obs, history, training=True),
        lambda: agent.act(obs, history, training=False),
        lambda: agent.update(*batch, True),
        lambda: agent.diagnose(*batch),
    ]
    found = []
    for call in before:
        call()
        torch.manual_seed(1)
        found.append(agent.diagnose(*batch)["shadow_gradient"])
    assert len(set(found)) == 1 and found[0] > 0

    losses = []
    for look in (False, True):
        if look:
            agent.diagnose(*batch)
        torch.manual_seed(1)
        losses.append(agent.update(*batch, True))
    assert learning.same(*losses)


@pytest.mark.parametrize("script", [dma_sac, dmah_sac, dmash_sac])
def test_a_gradient_step_infers_z_once(script):
    agent, buffer = make(script)
    batch = buffer.sample(8)
    calls = []
    agent.encoder.register_forward_hook(lambda encoder, *_: calls.append(encoder.training))
    agent.eval()
    agent.update(*batch, True)
    assert calls == [True]  # as in training, whatever was called before


@pytest.mark.parametrize("script", [dr_sac, da_sac])
def test_without_z_there_is_no_shadow_gradient(script):
    agent, buffer = make(script)
    assert agent.diagnose(*buffer.sample(6)) == {}
