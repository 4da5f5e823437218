"""HyperDynamics: generated models against explicit ones, windows, experts, the planner, and whole runs."""

import itertools
import json
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_process import call

import aib_envs
import aib_run
import hyperdynamics as script
from hyperdynamics import Agent, Args, Hypernetwork, ReplayBuffer

MODELS = ["hyper", "global", "concat", "recurrent", "expert"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_agent(model="hyper", env_id="DI", **flags):
    task = aib_envs.get_task(env_id)
    context_dim = len(task.dimensions) * (model == "expert")
    agent = Agent(task.obs_dim + context_dim, task.act_dim, Args(env_id=env_id, model=model, **flags))
    agent.set_scales(*(torch.randn(500, dim) * 3 + 1 for dim in (task.obs_dim, task.act_dim, task.obs_dim)))
    return agent


def random_history(agent, n=20, steps=30, seed=0):
    """A finished episode of random numbers, with the contexts of the training set where the agent sees them."""
    history = aib_envs.History(n, agent.window_size, steps, agent.obs_dim + (agent.args.model == "expert") * 2, 2)
    rng = np.random.default_rng(seed)
    for _ in range(-agent.window_size, steps):
        obs, actions = rng.standard_normal((n, agent.obs_dim)), rng.uniform(-1, 1, (n, 2))
        if agent.args.model == "expert":
            obs = np.concatenate([obs, agent.contexts[:n]], 1)
        obs = obs.astype(np.float32)
        history.add(obs, actions.astype(np.float32), np.zeros(n), obs + 1, np.zeros(n, bool))
    return history


def filled_buffer(agent, episodes=2):
    history = random_history(agent)
    buffer = ReplayBuffer(history, episodes * 30, "cpu")
    for i in range(episodes):
        buffer.add(random_history(agent, seed=i))
    return buffer


# ------------------------------------------------ generated networks -------------------------------------------------


def explicit(hypernetwork, code, x):
    """One network after the other: all its weights are the linear layer's output for this code."""
    outputs = []
    for c, y in zip(code, x, strict=True):
        for i, head in enumerate(hypernetwork.heads):
            parameters = head[-1] + sum(c[k] * head[k] for k in range(len(c)))
            y = F.linear(y, parameters[:-1].T, parameters[-1])
            y = F.relu(y) if i < 2 else y
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_generated_networks_are_the_explicit_ones(dtype, tolerance):
    hypernetwork = Hypernetwork(8, 6, 4).to(dtype)
    for head in hypernetwork.heads:
        head.data[-1] = 0.1 * torch.randn(head.shape[1:], dtype=dtype)
    code, x, weights = (torch.randn(7, dim, dtype=dtype) for dim in (8, 6, 4))
    built = lambda code, x: script.forward_model(hypernetwork.generate(code), x[:, None])[:, 0]
    results = []
    for function in (lambda code, x: explicit(hypernetwork, code, x), hypernetwork, built):
        inputs = [code.clone().requires_grad_(), x.clone().requires_grad_()]
        out = function(*inputs)
        results.append([out, *torch.autograd.grad((out * weights).sum(), [*inputs, *hypernetwork.parameters()])])
    assert [tuple(g.shape) for g in results[0][3:]] == [(9, 7, 128), (9, 129, 128), (9, 129, 4)]
    for expected, *found in zip(*results, strict=True):
        assert expected.abs().max() > 0.01
        for each in found:
            assert (each - expected).abs().max() <= tolerance * expected.abs().max()


def test_one_network_serves_all_candidates_of_its_environment():
    hypernetwork, code, x = Hypernetwork(8, 6, 4), torch.randn(3, 8), torch.randn(3, 50, 6)
    found = script.forward_model(hypernetwork.generate(code), x)
    for i in range(3):
        expected = explicit(hypernetwork, code[i].expand(50, 8), x[i])
        torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-4)


def test_initial_ranges():
    heads = Hypernetwork(8, 23, 17).heads
    for head in heads:
        assert (head[-1] == 0).all() and abs(head[:-1].std() / 0.1 - 1) < 0.03 and head[:-1].mean().abs() < 3e-3
    code = torch.randn(2, 8)
    for matrix in Hypernetwork(8, 23, 17).generate(code):
        assert (matrix.std((1, 2)) / (0.1 * code.norm(dim=1)) - 1).abs().max() < 0.15
    for model, shape in ((script.new_model(23, 17), ()), (script.new_model(23, 17, 20), (20,))):
        assert [tuple(m.shape) for m in model] == [(*shape, 24, 128), (*shape, 129, 128), (*shape, 129, 17)]
        for matrix, inputs in zip(model, (23, 128, 128), strict=True):
            assert 0.98 < matrix.abs().max() * inputs**0.5 <= 1


@pytest.mark.parametrize(("model", "inputs"), [("global", 6), ("concat", 14), ("recurrent", 134), ("expert", 6)])
def test_models_that_are_not_generated(model, inputs):
    agent = make_agent(model)
    assert agent.model[0].shape == (*[20] * (model == "expert"), inputs + 1, 128)
    layers = [nn_linear(m[3] if model == "expert" else m) for m in agent.model]
    x = torch.randn(5, inputs)
    expected = layers[2](F.relu(layers[1](F.relu(layers[0](x)))))
    found = script.forward_model(agent.model, x.expand(20, 5, inputs) if model == "expert" else x)
    torch.testing.assert_close(found[3] if model == "expert" else found, expected)


def nn_linear(matrix):
    layer = torch.nn.Linear(len(matrix) - 1, matrix.shape[1])
    layer.weight.data, layer.bias.data = matrix.data[:-1].T, matrix.data[-1]
    return layer


def test_recurrent_encoder_is_the_gru_s_last_state():
    agent = make_agent("recurrent")
    window = torch.randn(3, 5, 16, 4), torch.randn(3, 5, 16, 2)
    code = agent.infer(window)
    gru = next(module for module in agent.modules() if isinstance(module, torch.nn.GRU))
    for i, j in ((0, 0), (2, 4)):
        state = torch.nn.GRU.forward(gru, agent.normalise(window[0][i, j], window[1][i, j])[None])[1][0, 0]
        torch.testing.assert_close(code[i, j], state)


# --------------------------------------------------- data, windows ---------------------------------------------------


def numbered_buffer(window, episodes=2, diverged=False):
    """obs = (10 * episode + context, t), actions = t / 2: three contexts, ten steps."""
    history = aib_envs.History(3, window, 10, 2, 1)
    buffer = ReplayBuffer(history, episodes * 10, "cpu")
    for episode in range(3):  # with room for two, the third one takes the place of the first
        history.begin()
        for t in range(-window, 10):
            obs = np.stack([10 * episode + np.arange(3), np.full(3, t)], 1)
            gone = np.array([False, diverged and t >= 4, False])
            history.add(obs, 0.5 * obs[:, 1:], obs[:, 1], obs + np.array([0, 1]), gone)
        buffer.add(history)
    return buffer, history


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("each_context", [False, True])
def test_samples_are_all_steps_of_the_kept_episodes_with_their_strictly_past_windows(window, each_context):
    buffer, _ = numbered_buffer(window, diverged=True)
    obs, actions, next_obs, (past_obs, past_actions) = buffer.sample(5000, each_context)
    assert torch.equal(next_obs, obs + torch.tensor([0, 1])) and torch.equal(actions, 0.5 * obs[..., 1:])
    if each_context:
        assert obs.shape == (3, 5000, 2) and torch.equal(obs[..., 0] % 10, torch.arange(3.0)[:, None].expand(3, 5000))
    drawn = {tuple(row) for row in obs.flatten(0, -2).int().tolist()}
    assert drawn == {(10 * e + c, t) for e in (1, 2) for c in range(3) for t in range(4 if c == 1 else 10)}
    assert past_obs.shape == (*obs.shape[:-1], window, 2)
    if window:
        expected = obs[..., None, :].expand_as(past_obs).clone()
        expected[..., 1] += torch.arange(-window, 0)  # the last one is step t - 1
        assert torch.equal(past_obs, expected) and torch.equal(past_actions, 0.5 * expected[..., 1:])


def test_acting_sees_the_windows_of_training():
    buffer, _ = numbered_buffer(16)
    history = aib_envs.History(3, 16, 10, 2, 1)
    for t in range(-16, 10):
        if t >= 0:
            window = history.window(np.arange(16)[None])[:2]
            past = buffer.at(torch.arange(3) * 2, torch.full((3,), t))[3]  # episode 2 lies at place 0
            for own, stored in zip(window, past, strict=True):
                assert np.array_equal(own, stored.numpy())
        obs = np.stack([20 + np.arange(3), np.full(3, t)], 1)
        history.add(obs, 0.5 * obs[:, 1:], obs[:, 1], obs + np.array([0, 1]), np.zeros(3, bool))


@pytest.mark.parametrize("model", ["hyper", "concat", "recurrent"])
def test_the_code_depends_on_all_of_the_window_and_on_nothing_else(model):
    agent = make_agent(model)
    history = random_history(agent, n=1)
    buffer = ReplayBuffer(history, 30, "cpu")
    buffer.add(history)
    buffer.obs.requires_grad_(), buffer.actions.requires_grad_()
    t = 3  # its window begins in the warm-up
    agent.infer(buffer.at(torch.zeros(1).long(), torch.full((1,), t))[3]).sum().backward()
    moved = lambda x: x.grad[0, 0].abs().sum(-1).nonzero().flatten().tolist()
    assert moved(buffer.actions) == list(range(t, t + 16))  # transitions K + t - 16 ... K + t - 1
    assert moved(buffer.obs) == list(range(t, t + 16))


def test_what_lies_before_the_warm_up_is_zero_after_normalisation():
    agent, seen = make_agent("hyper", candidates=2), []
    agent.history_encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    history = aib_envs.History(2, 16, 10, 4, 2)
    obs = np.ones((2, 4), np.float32)
    for t in range(-16, 1):
        agent.act(obs, history)
        unknown = seen[-1][:, : -t if t else 0]
        assert (unknown == 0).all() and (seen[-1][:, -t:] != 0).all() and seen[-1].shape == (2, 16, 6)
        history.add(obs, obs[:, :2], np.zeros(2), obs, np.zeros(2, bool))


@pytest.mark.parametrize("model", MODELS)
def test_loss_is_that_of_normalised_differences(model):
    agent = make_agent(model, lr=0.0)
    obs, actions, next_obs, window = filled_buffer(agent).sample(32, model == "expert")
    mean, std = agent.mean, agent.std
    x = torch.cat([(obs[..., :4] - mean[:4]) / std[:4], (actions - mean[4:6]) / std[4:6]], -1)
    target = ((next_obs - obs)[..., :4] - mean[6:]) / std[6:]
    if model == "hyper":
        predicted = explicit(agent.hypernetwork, agent.infer(window), x)
    else:
        predicted = script.forward_model(agent.model, torch.cat([x, agent.infer(window)], -1))
    loss = agent.update(obs, actions, next_obs, window)["dynamics_loss"]
    torch.testing.assert_close(loss, F.mse_loss(predicted, target), rtol=1e-4, atol=1e-6)


def test_scales_are_those_of_the_data():
    agent = make_agent("expert")
    obs, actions, next_obs = (torch.randn(10_000, dim) * 3 + 1 for dim in (6, 2, 6))
    agent.set_scales(obs, actions, next_obs)
    x = agent.normalise(obs, actions)
    assert x.shape == (10_000, 6)  # the context is not among them
    torch.testing.assert_close(x.mean(0), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.std(0), torch.ones(6), rtol=1e-4, atol=0)
    deltas = (next_obs - obs)[:, :4]
    torch.testing.assert_close(agent.mean[6:], deltas.mean(0), rtol=1e-3, atol=1e-4)
    agent.set_scales(torch.ones(9, 6), actions[:9], torch.ones(9, 6))
    assert agent.normalise(torch.ones(9, 6), actions[:9]).isfinite().all()  # what never changes


# ------------------------------------------------------ experts ------------------------------------------------------


@pytest.mark.parametrize("env_id", ["DI", "ODE", "Cartpole"])
def test_the_expert_of_the_nearest_training_context_is_asked(env_id):
    task, agent = aib_envs.get_task(env_id), make_agent("expert", env_id)
    train = aib_envs.context_set(env_id, "train")
    envs = script.make_envs(agent.args, aib_envs.eval_contexts(env_id))
    obs = torch.from_numpy(envs.reset(seed=0)[0])
    matrices, _ = agent.models(obs, torch.zeros(60, 0))
    for i, context in enumerate(aib_envs.eval_contexts(env_id)):
        distances = []
        for other in train:
            d = [(context[x.key] - other[x.key]) / np.ptp(x.values or x.outer) for x in task.dimensions]
            distances.append(math.hypot(*d))
        nearest = int(np.argmin(distances))
        assert i >= 20 or (nearest == i and distances[i] == 0)
        for matrix, stack in zip(matrices, agent.model, strict=True):
            assert torch.equal(matrix[i], stack[nearest])
        if "inversion" in context:
            assert train[nearest]["inversion"] == context["inversion"]


def test_an_expert_learns_from_its_own_context_only():
    results = []
    for change in (0.0, 5.0):
        torch.manual_seed(0)
        agent = make_agent("expert")
        buffer = filled_buffer(agent)
        buffer.obs[7, :, :, :4] += change * torch.randn(buffer.obs[7, :, :, :4].shape)
        torch.manual_seed(1)
        for _ in range(3):
            agent.update(*buffer.sample(16, each_context=True))
        results.append([p.detach().clone() for p in agent.model])
    for a, b in zip(*results, strict=True):
        differs = (a != b).flatten(1).any(1)
        assert differs.nonzero().flatten().tolist() == [7]


# ------------------------------------------------ rewards of the planner ---------------------------------------------


def disturb(env, rng):
    """Brings the environment to a random state in which rewards are not all the same."""
    env = env.unwrapped
    if isinstance(env, aib_envs.DoubleIntegrator):
        env.state = rng.uniform(-0.15, 0.15, 4)
    elif isinstance(env, aib_envs.ComplexODE):
        env.state = rng.choice([-1, 1], 1) * np.exp(rng.uniform(-4, 1, 1))
    elif env.env_id == "Cartpole":
        env.data.qpos[:], env.data.qvel[:] = rng.uniform(-1.5, 1.5, 2), rng.uniform(-8, 8, 2)
    else:
        env.model.geom("target").pos[:2] = env.data.geom("finger").xpos[:2] + rng.uniform(-0.06, 0.06, 2)


@pytest.mark.parametrize(
    "env_id", ["DI", "DI-Friction", "DI-Perm", "ODE", "ODE-5", "Cartpole", "Reacher-E", "Reacher-H", "Reacher-H-Perm"]
)
def test_rewards_are_the_environments(env_id):
    rng, rows = np.random.default_rng(0), []
    contexts = [aib_envs.context_set(env_id, split)[i] for split in ("train", "eval-out") for i in (0, 19)]
    envs = [aib_envs.gym.make(f"AIB/{env_id}-v0", context=context) for context in contexts]
    for step in range(1000):
        env = envs[step // 250]
        if step % 5 == 0:
            obs, _ = env.reset(seed=step)
            disturb(env, rng)
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        next_obs, reward, *_ = env.step(action)
        rows.append((obs, action, next_obs, reward))
        obs = next_obs
    obs, actions, next_obs, rewards = (torch.tensor(np.array(column)) for column in zip(*rows, strict=True))
    found = script.REWARDS[env_id](obs.view(10, 100, -1), actions.view(10, 100, -1), next_obs.view(10, 100, -1))
    assert found.shape == (10, 100)
    torch.testing.assert_close(found.flatten().double(), rewards, rtol=1e-5, atol=1e-5)
    assert len(rewards.unique()) >= (900 if env_id == "Cartpole" else 6 if "ODE" in env_id else 2)
    assert 0.05 < rewards.mean() < 0.95


def test_every_reward_belongs_to_a_task():
    assert script.REWARDS.keys() <= aib_envs.TASKS.keys() and len(script.REWARDS) == 3 + 21 + 1 + 3


# ------------------------------------------------------- planner -----------------------------------------------------


class TrueDynamics(Agent):
    """Knows the double integrators' true dynamics in `known` contexts, in place of a model."""

    def predict(self, obs, actions, code, model):
        shape = (-1, *[1] * (obs.ndim - 1))
        mass, sign = (torch.tensor([float(c[key]) for c in self.known]).view(shape) for key in ("mass", "inversion"))
        velocity = obs[..., 2:] + 0.1 * sign * actions / mass
        return torch.cat([obs[..., :2] + 0.1 * obs[..., 2:], velocity], -1).clamp(-1, 1) - obs


@pytest.mark.parametrize("planner", ["shooting", "cem"])
def test_mpc_with_the_true_dynamics_reaches_the_goal(planner):
    contexts = [{"mass": m, "inversion": i} for m in (0.5, 1.0, 1.5) for i in (-1, 1)]
    agent = TrueDynamics(4, 2, Args(planner=planner, model="global"))
    returns = np.zeros(len(contexts))
    for i, context in enumerate(contexts):
        agent.known = [context]
        envs = aib_envs.make_vec("DI", [context])
        returns[i] = aib_envs.evaluate(envs, agent.act, agent.window_size, 1)[0].item()
    assert (returns > 45).all() and returns.mean() > 65, returns


def test_without_held_actions_no_plan_reaches_the_goal_in_time():
    """Why --action-hold is 10: a random walk of 20 independent actions goes nowhere, and the reward is sparse."""
    context, returns = {"mass": 1.2, "inversion": 1}, {}
    for hold in (1, 10):
        agent = TrueDynamics(4, 2, Args(model="global", action_hold=hold))
        agent.known = [context]
        envs = aib_envs.make_vec("DI", [context])
        returns[hold] = aib_envs.evaluate(envs, agent.act, agent.window_size, 1)[0].item()
    assert returns[1] == 0 and returns[10] > 60


def test_prediction_errors_of_the_true_dynamics_are_zero_and_grow_with_the_horizon_otherwise():
    envs = aib_envs.make_vec("DI", aib_envs.eval_contexts("DI"))
    episodes = script.random_episodes(envs, "cpu")
    agent = TrueDynamics(4, 2, Args(model="global"))
    agent.known = aib_envs.eval_contexts("DI")
    agent.set_scales(*episodes.sample(10_000)[:3])
    errors = agent.prediction_errors(episodes)
    assert list(errors) == ["one_step", "twenty_step"] and list(errors["one_step"]) == list(aib_envs.SPLITS)
    assert max(x for e in errors.values() for x in e.values()) < 1e-9
    agent.known = [c | {"inversion": -c["inversion"] if i >= 40 else c["inversion"]} for i, c in enumerate(agent.known)]
    errors = agent.prediction_errors(episodes)
    for e in errors.values():
        assert e["train"] < 1e-9 and e["eval-in"] < 1e-9 and e["eval-out"] > 0.1


@pytest.mark.parametrize("model", MODELS)
def test_prediction_errors_against_explicit_loops(model):
    agent = make_agent(model)
    envs = script.make_envs(agent.args, aib_envs.eval_contexts("DI"))
    episodes = script.random_episodes(envs, "cpu")
    agent.set_scales(*episodes.sample(10_000)[:3])
    episodes.lengths[5] = 60  # this one has diverged
    errors, expected = agent.prediction_errors(episodes, starts=4), {"one_step": [], "twenty_step": []}
    for row in range(20):  # of the training contexts
        for t in np.linspace(0, 80, 4).astype(int):
            if t + 20 > episodes.lengths[row]:
                continue
            obs, _, _, window = episodes.at(torch.tensor([row]), torch.tensor([t]))
            code = agent.infer(window)
            (networks, code), state = agent.models(obs, code), obs[:, None, :4]
            for step in range(20):
                action, truth = episodes.actions[row, 0, 16 + t + step], episodes.next_obs[row, 0, 16 + t + step, :4]
                state = state + agent.predict(state, action[None, None], code[:, None], networks)
                if step in (0, 19):
                    name, scale = ("twenty_step", agent.std[:4]) if step else ("one_step", agent.std[6:])
                    expected[name].append((((state - truth) / scale) ** 2).mean().item())
    assert len(expected["one_step"]) < 20 * 4
    for name in errors:
        assert errors[name]["train"] == pytest.approx(np.mean(expected[name]), rel=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_rollouts_of_plans_against_explicit_loops(model, monkeypatch):
    monkeypatch.setitem(script.REWARDS, "DI", lambda obs, action, next_obs: next_obs[..., 0] + 10 * action[..., 1])
    agent = make_agent(model, horizon=7, action_hold=3, candidates=4)
    history = random_history(agent, n=3)
    obs = torch.from_numpy(history.obs[:, -1])
    window = [torch.from_numpy(x) for x in history.window(np.arange(agent.window_size)[None])[:2]]
    with torch.no_grad():
        code, plans = agent.infer(window), torch.rand(3, 4, 3, 2)
        networks, own = agent.models(obs, code)
        found = agent.rollout(obs, own, networks, plans)
        for i in range(3):
            networks, own = agent.models(obs[i : i + 1], code[i : i + 1])
            for j in range(4):
                state, expected = obs[i : i + 1, None, :4], 0.0
                for step in range(7):
                    action = plans[i : i + 1, j : j + 1, step // 3]
                    state = state + agent.predict(state, action, own[:, None], networks)
                    expected += (state[0, 0, 0] + 10 * action[0, 0, 1]).item()
                assert found[i, j].item() == pytest.approx(expected, rel=1e-3)


def test_a_context_whose_simulations_all_diverge_at_once_ends_nothing():
    buffer, _ = numbered_buffer(4)
    buffer.lengths[1] = 0
    obs, *_ = buffer.sample(50, each_context=True)
    assert obs.shape[:2] == (3, 50)


@pytest.mark.parametrize("planner", ["shooting", "cem"])
def test_the_plan_with_the_greatest_return_is_followed(planner, monkeypatch):
    agent = make_agent("global", planner=planner, candidates=200, horizon=6, action_hold=2)
    goal, seen = torch.tensor([[0.3, -0.8], [-0.6, 0.1]]), []

    def rollout(self, obs, code, model, plans):  # each environment has its own best action
        assert plans.shape == (2, 200, 3, 2) and plans.abs().max() <= 1
        seen.append(plans)
        returns = -(plans - goal[:, None, None]).square().sum((2, 3))
        returns[:, 0] = returns[:, 0].nan_to_num()
        return returns

    monkeypatch.setattr(Agent, "rollout", rollout)
    action = agent.plan(torch.zeros(2, 4), torch.zeros(2, 0), None)
    everything = torch.cat(seen, 1)
    best = (everything - goal[:, None, None]).square().sum((2, 3)).argmin(1)
    assert torch.equal(action, everything[torch.arange(2), best, 0])
    assert len(seen) == (5 if planner == "cem" else 1)
    for before, after in itertools.pairwise(seen):  # no iteration loses the best plan
        best = (before - goal[:, None, None]).square().sum((2, 3)).argmin(1)
        assert torch.equal(after[:, 0], before[torch.arange(2), best])
    assert ((action - goal).norm(dim=1) < (0.05 if planner == "cem" else 1.0)).all()


def test_predictions_that_are_not_finite_are_not_chosen(monkeypatch):
    monkeypatch.setitem(script.REWARDS, "DI", lambda obs, action, next_obs: next_obs[..., 0])
    agent = make_agent("global", horizon=2)
    plans = torch.zeros(1, 4, 1, 2)
    values = torch.tensor([[[float("nan")], [1.0], [float("inf")], [0.5]]])
    monkeypatch.setattr(agent, "predict", lambda obs, actions, code, model: values.expand(1, 4, 4))
    returns = agent.rollout(torch.zeros(1, 4), torch.zeros(1, 0), None, plans)
    assert returns.argmax().item() == 1 and returns.isfinite().all()


def test_impossible_predictions_of_cartpole_earn_no_more_than_the_best_state():
    obs = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0, 0.0], [0.0, -3.0, 0.0, 0.0, 0.0]])
    rewards = script.cartpole_reward(obs, torch.zeros(3, 1), obs)
    assert rewards.tolist() == pytest.approx([1.0, 1.0, 0.0])


@pytest.mark.parametrize("flags", [{}, {"planner": "cem"}, {"predict_only": True}])
def test_evaluation_is_deterministic_and_does_not_disturb_training(flags):
    agent = make_agent("hyper", candidates=20, **flags)
    history = random_history(agent, n=3)
    history.t = 7
    obs, state = history.obs[:, 29], torch.get_rng_state()
    first = agent.act(obs, history)
    assert first.shape == (3, 2) and first.dtype == np.float32 and abs(first).max() <= 1
    assert np.array_equal(first, agent.act(obs, history)) and torch.equal(state, torch.get_rng_state())
    trained = agent.act(obs, history, training=True)
    assert not np.array_equal(trained, agent.act(obs, history, training=True))
    history.t = 8
    assert not np.array_equal(first, agent.act(obs, history))  # other random numbers at another step


@pytest.mark.parametrize("model", MODELS)
def test_each_environment_gets_its_own_plan(model):  # they are planned for a few at a time
    agent, seen = make_agent(model, candidates=500, horizon=2), []
    history = random_history(agent, n=12)
    plan = agent.plan
    agent.plan = lambda obs, code, generator: seen.append((obs, code)) or obs[:, :2]
    actions = agent.act(history.obs[:, 29], history)
    assert np.array_equal(actions, history.obs[:, 29, :2])
    codes = agent.infer([torch.from_numpy(x) for x in history.window(np.arange(agent.window_size)[None])[:2]])
    assert len(seen) == 3
    torch.testing.assert_close(torch.cat([code for _, code in seen]), codes)
    agent.plan = plan
    first = agent.act(history.obs[:, 29], history)
    other = history.obs[:, 29].copy()
    other[7, :4] += 1.0
    changed = (first != agent.act(other, history)).any(1)
    assert not changed[[i for i in range(12) if i != 7]].any()


@pytest.mark.parametrize("model", MODELS)
def test_learning_lowers_prediction_errors(model):
    agent = make_agent(model)
    envs = script.make_envs(agent.args, aib_envs.eval_contexts("DI"))
    episodes = script.random_episodes(envs, "cpu")
    if model == "expert":  # one for each training context
        for name in ("obs", "next_obs", "actions", "lengths"):
            setattr(episodes, name, getattr(episodes, name)[:20])
    agent.set_scales(*episodes.sample(10_000)[:3])
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    losses = [agent.update(*episodes.sample(128, model == "expert"))["dynamics_loss"].item() for _ in range(150)]
    assert np.mean(losses[-20:]) < {"hyper": 0.6, "expert": 0.4}.get(model, 0.85) * np.mean(losses[:5])
    assert all(not torch.equal(p, before[name]) for name, p in agent.named_parameters())  # all of it learns


# ------------------------------------------------------ whole runs ---------------------------------------------------

SHORT = ["--candidates", "4", "--horizon", "3", "--action-hold", "2", "--updates-per-round", "5", "--batch-size", "16"]
SHORT += ["--eval-rollouts", "1"]


def only_run(directory):
    (run,) = directory.iterdir()
    return run


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def outcome(directory):
    """What a run has learned, without what depends on time."""
    metrics = [{k: v for k, v in m.items() if k != "seconds"} for m in metrics_of(directory)]
    return metrics, json.loads((directory / "results.json").read_text())["returns"]


@pytest.mark.parametrize(
    ("env_id", "flags", "method"),
    [
        ("DI", "", "HyperDynamics"),
        pytest.param("DI-Perm", "--planner cem --code-dim 1", "HyperDynamics-cem", marks=pytest.mark.slow),
        ("ODE", "--model global", "HyperDynamics-global"),
        pytest.param("DI-Friction", "--model concat", "HyperDynamics-concat", marks=pytest.mark.slow),
        ("DI", "--model recurrent", "HyperDynamics-recurrent"),
        ("ODE-3", "--model expert", "HyperDynamics-expert"),
        pytest.param(
            *("Cheetah", "--predict-only --total-timesteps 2", "HyperDynamics-random"), marks=pytest.mark.slow
        ),
        ("DI", "--predict-only --model concat", "HyperDynamics-concat-random"),
    ],
)
def test_script_trains_and_evaluates(env_id, flags, method, tmp_path):
    steps = aib_envs.get_task(env_id).steps
    lengths = ["--total-timesteps", 10, "--learning-starts", steps, "--eval-every", 10, "--run-dir", tmp_path]
    assert call(script, "--env-id", env_id, *SHORT, *lengths, *flags.split()) == 0
    directory = only_run(tmp_path)
    metrics = metrics_of(directory)
    assert [m["global_step"] for m in metrics] == ([0, 2] if env_id == "Cheetah" else [0, 10])
    warm_up = 0 if "global" in flags or "expert" in flags else 16
    assert metrics[0]["env_steps"] == 20 * (steps + 2 * warm_up)
    assert metrics[-1]["env_steps"] == metrics[0]["env_steps"] + 20 * metrics[-1]["global_step"]
    for m in metrics:
        assert m["losses"]["dynamics_loss"] > 0
        for name in ("one_step", "twenty_step"):
            assert all(0 < m["prediction"][name][split] < 1e6 for split in aib_envs.SPLITS)
    assert json.loads((directory / "results.json").read_text())["method"] == directory.name.split("__")[1] == method


def test_stopped_or_killed_and_resumed_it_is_the_same_run(monkeypatch, tmp_path, capsys):
    flags = ["--env-id", "DI", *SHORT, "--learning-starts", 100, "--eval-every", 100, "--total-timesteps", 150]
    assert call(script, *flags, "--run-dir", tmp_path / "whole") == 0
    whole = only_run(tmp_path / "whole")
    aer = {split: np.mean(returns) for split, returns in outcome(whole)[1].items()}
    capsys.readouterr()
    assert call(script, "--eval-only", whole) == 0
    assert capsys.readouterr().out.strip() == "AER " + ", ".join(f"{split} {x:.1f}" for split, x in aer.items())

    flags += ["--run-dir", tmp_path / "runs"]
    log = aib_run.Run.log
    for lines, number in ((1, signal.SIGTERM), (2, signal.SIGINT)):  # twice Ctrl-C ends at once

        def log_and_stop(self, *args, lines=lines, number=number):
            log(self, *args)
            if len(metrics_of(self.directory)) == lines:
                signal.raise_signal(number)
                if number == signal.SIGINT:
                    signal.raise_signal(number)

        with monkeypatch.context() as patch:
            patch.setattr(aib_run.Run, "log", log_and_stop)
            assert call(script, *flags) == (143 if number == signal.SIGTERM else 130)
        flags = ["--resume", only_run(tmp_path / "runs")]
    assert not (only_run(tmp_path / "runs") / "results.json").exists()
    assert call(script, *flags) == 0
    assert outcome(only_run(tmp_path / "runs")) == outcome(whole)


def test_nothing_to_learn_from_stops_the_run(monkeypatch, tmp_path, capsys):
    def diverging(self, action):
        raise ArithmeticError("too fast")

    monkeypatch.setattr(aib_envs.DoubleIntegrator, "_step", diverging)
    assert call(script, "--env-id", "DI", *SHORT, "--run-dir", tmp_path) == 3
    assert "every simulation diverged" in capsys.readouterr().err.splitlines()[-1]


def test_what_is_not_finite_stops_the_run(monkeypatch, tmp_path):
    predict = Agent.predict
    monkeypatch.setattr(Agent, "predict", lambda self, *args: 1e30 * predict(self, *args))
    assert call(script, "--env-id", "DI", *SHORT, "--run-dir", tmp_path) == 3
    assert not (only_run(tmp_path) / "results.json").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--env-id Cheetah", "--predict-only"),
        ("--candidates 0", "--candidates"),
        ("--horizon 0", "--horizon"),
        ("--action-hold 0", "--action-hold"),
        ("--code-dim 5000", "--code-dim"),
        ("--lr nan", "--lr"),
        ("--learning-starts 50", "--learning-starts"),
        ("--model large", "--model"),
    ],
)
def test_bad_input_gets_one_line(flags, named, tmp_path, capsys):
    assert call(script, *flags.split(), "--run-dir", tmp_path / "runs") == 2
    out, err = capsys.readouterr()
    assert named in err and len(err.splitlines()) == 1 and not out and not (tmp_path / "runs").exists()
