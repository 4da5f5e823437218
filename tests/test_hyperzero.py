"""HyperZero: stacked experts against agents of their own, generated networks against explicit ones, runs end to end."""

import copy
import dataclasses
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_process import call

import aib_envs
import aib_run
import hyperzero as script
from hyperzero import Agent, Args, ContextMLP, DataSet, Experts, Heads, StackedReplay, TaskHypernetwork

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -------------------------------------------------- stacked experts --------------------------------------------------


def batches(n, updates=5, size=16, obs_dim=4, act_dim=2):
    """Random batches for `Experts.update`, of which a different reward scale for each agent."""
    scale = torch.logspace(-1, 1, n)[:, None]
    for step in range(updates):
        obs, next_obs = torch.randn(2, n, size, obs_dim)
        actions, noise = torch.rand(2, n, size, act_dim) * 2 - 1
        yield obs, actions, next_obs, scale * torch.randn(n, size), 1.5 * noise, step % 2 == 0


class OneExpert:
    """TD3 by its definition, for one agent, with layers (weight, bias) of its own."""

    def __init__(self, experts, i):
        take = lambda network: [p.detach()[i].clone().requires_grad_() for p in network.parameters()]
        self.nets = {name: take(getattr(experts, name)) for name in ("actor", "qf1", "qf2")}
        self.targets = copy.deepcopy(self.nets)
        self.q_optimizer = torch.optim.Adam(self.nets["qf1"] + self.nets["qf2"], lr=experts.args.expert_lr)
        self.actor_optimizer = torch.optim.Adam(self.nets["actor"], lr=experts.args.expert_lr)
        self.gamma, self.tau = experts.args.gamma, experts.args.tau

    @staticmethod
    def apply(net, *x):
        x = torch.cat(x, 1)
        for layer in range(3):
            x = F.linear(x, net[2 * layer].T, net[2 * layer + 1][0])
            x = F.relu(x) if layer < 2 else x
        return x

    def update(self, obs, actions, next_obs, rewards, noise, policy_turn):
        with torch.no_grad():
            a = torch.clamp(torch.tanh(self.apply(self.targets["actor"], next_obs)) + noise, -1, 1)
            values = [self.apply(self.targets[name], next_obs, a)[:, 0] for name in ("qf1", "qf2")]
            target = rewards + self.gamma * torch.minimum(*values)
        loss = sum(F.mse_loss(self.apply(self.nets[name], obs, actions)[:, 0], target) for name in ("qf1", "qf2"))
        self.q_optimizer.zero_grad()
        loss.backward()
        self.q_optimizer.step()
        if policy_turn:
            self.actor_optimizer.zero_grad()
            (-self.apply(self.nets["qf1"], obs, torch.tanh(self.apply(self.nets["actor"], obs))).mean()).backward()
            self.actor_optimizer.step()
            for name, net in self.nets.items():
                for p, target in zip(net, self.targets[name], strict=True):
                    target.data = (1 - self.tau) * target.data + self.tau * p.data


def close(a, b, tolerance=1e-8):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def same_weights(experts, i, alone):
    """Weights, targets, gradients and Adam's moments of agent i against those of a `OneExpert`."""
    for name in alone.nets:
        optimizers = (experts.actor_optimizer, alone.actor_optimizer)
        optimizers = optimizers if name == "actor" else (experts.q_optimizer, alone.q_optimizer)
        nets = getattr(experts, name).parameters(), alone.nets[name], getattr(experts, f"{name}_target").parameters()
        for p, q, p_target, q_target in zip(*nets, alone.targets[name], strict=True):
            moments = [
                (optimizers[0].state[p][key][i], optimizers[1].state[q][key]) for key in ("exp_avg", "exp_avg_sq")
            ]
            pairs = [(p.data[i], q.data), (p_target.data[i], q_target.data), *moments]
            assert all(close(a, b) for a, b in pairs), name
            if name == "actor":  # in OneExpert the policy's loss adds to the critics' gradients
                assert close(p.grad[i], q.grad), name


@pytest.mark.parametrize("updates", [1, 5])
def test_stacked_experts_equal_the_same_experts_trained_alone(updates):
    n, args = 3, Args(expert_lr=1e-3, tau=0.1)
    experts = Experts(n, 4, 2, args).double()  # Adam divides by a gradient's size, so that float32 shows its rounding
    alone = [OneExpert(experts, i) for i in range(n)]
    single = [Experts(1, 4, 2, args).double() for _ in range(n)]
    for i in range(n):
        single[i].load_state_dict({name: x[i : i + 1] for name, x in experts.state_dict().items()})
    for *batch, policy_turn in batches(n, updates):
        batch = [x.double() for x in batch]
        experts.update(*batch, policy_turn)
        for i in range(n):
            alone[i].update(*(x[i] for x in batch), policy_turn)
            single[i].update(*(x[i : i + 1] for x in batch), policy_turn)
    for i in range(n):
        same_weights(experts, i, alone[i])
        for name, x in single[i].state_dict().items():
            assert close(experts.state_dict()[name][i], x[0]), name


def test_the_policy_and_the_targets_wait_for_their_turn():
    experts, (*batch, _) = Experts(2, 4, 2, Args()), next(batches(2))
    before = copy.deepcopy(experts.state_dict())
    assert experts.update(*batch, False).keys() == {"qf_loss"}
    moved = {name.split(".")[0] for name, x in experts.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {"qf1", "qf2"}
    assert experts.update(*batch, True).keys() == {"qf_loss", "actor_loss"}
    moved = {name.split(".")[0] for name, x in experts.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {"qf1", "qf2", "actor", "qf1_target", "qf2_target", "actor_target"}


def test_experts_act_each_by_its_own_policy_and_explore():
    experts, obs = Experts(20, 4, 2, Args()), np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    actions = experts.act(obs)
    for i in (0, 7, 19):
        expected = OneExpert.apply([p[i] for p in experts.actor.parameters()], torch.from_numpy(obs[i : i + 1]))
        np.testing.assert_allclose(actions[i], expected[0].tanh().detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(actions, experts.act(obs))
    noise = np.stack([experts.act(obs, std=0.1) - actions for _ in range(200)])
    assert abs(noise.std() - 0.1) < 0.005 and np.abs(experts.act(obs, std=5.0)).max() == 1.0


def test_layers_of_experts_start_as_those_of_torch():
    layer = script.StackedLinear(20, 64, 32)
    for x in (layer.weight, layer.bias):
        assert x.abs().max() <= 1 / 8 and abs(x.std() * 8 * 3**0.5 - 1) < 0.1 and not torch.equal(x[0], x[1])


# ----------------------------------------------- replay buffer, data set ---------------------------------------------


def test_each_expert_samples_its_own_steps_before_a_divergence():
    n, steps = 3, 10
    history = aib_envs.History(n, 0, steps, 2, 1)
    buffer = StackedReplay(history, 4 * steps, "cpu")
    for episode in range(6):  # the first two are overwritten
        history.begin()
        for t in range(steps):
            obs = np.array([[100 * i + 10 * episode, t] for i in range(n)], np.float32)
            diverged = np.array([False, t >= 3, episode % 2 == 0])
            history.add(obs, 0.1 * obs[:, 1:], obs[:, 1] + 0.5, obs + np.array([0, 1]), diverged)
        buffer.add(history)
    obs, actions, next_obs, rewards = buffer.sample(5000)
    assert obs.shape == (n, 5000, 2) and actions.shape == (n, 5000, 1) and rewards.shape == (n, 5000)
    assert torch.equal(obs[..., 0] // 100, torch.arange(n)[:, None].expand(n, 5000))
    assert torch.equal(next_obs, obs + torch.tensor([0.0, 1.0])) and torch.equal(rewards, obs[..., 1] + 0.5)
    torch.testing.assert_close(actions, 0.1 * obs[..., 1:])
    seen = [torch.unique(10 * (x[:, 0] // 10 % 10) + x[:, 1], return_counts=True) for x in obs]
    assert [len(values) for values, _ in seen] == [40, 4 * 3, 2 * 10] and seen[0][0].min() == 20
    assert all(counts.min() > 0.6 * 5000 / len(counts) for _, counts in seen)  # uniformly


def collected(rollouts=2, **flags):
    task, contexts = aib_envs.get_task("DI"), aib_envs.context_set("DI", "train")
    args, envs = Args(**flags), aib_envs.make_vec("DI", contexts)
    experts, history = Experts(20, 4, 2, args), aib_envs.History(20, 0, task.steps, 4, 2)
    dataset = DataSet(history, rollouts, "cpu")
    dataset.record(envs, experts, history, args.seed)
    return dataset, experts, envs


def test_the_data_set_holds_what_the_experts_do_and_think():
    dataset, experts, envs = collected()
    assert dataset.obs.shape == (20, 2, 100, 4) and dataset.q.shape == dataset.rewards.shape == (20, 2, 100)
    obs, actions, next_obs, rewards, values = dataset.sample(50)
    np.testing.assert_allclose(actions[:, 7], experts.act(obs[:, 7].numpy()), rtol=1e-4, atol=1e-6)
    x = torch.cat([obs, actions], 2)
    q = torch.minimum(experts.qf1(x), experts.qf2(x)).squeeze(2)
    torch.testing.assert_close(values, q, rtol=1e-4, atol=1e-6)
    i = 11  # by hand, in one environment
    env = envs.envs[i].unwrapped
    env.reset(seed=0)
    env.state = obs[i, 0].numpy().astype(np.float64)
    after, reward, *_ = env.step(actions[i, 0].numpy())
    np.testing.assert_allclose(next_obs[i, 0], after, atol=1e-6)
    assert reward == rewards[i, 0]
    again, _, _ = collected(seed=2)
    assert not torch.equal(again.obs[:, 0, 0], dataset.obs[:, 0, 0])  # other starts, which are not evaluation's
    envs.reset(seed=aib_envs.reset_seeds(20, 1, 0, 0))
    start = np.stack([env.unwrapped.state for env in envs.envs]).astype(np.float32)
    assert not np.isclose(dataset.obs[:, :, 0], start[:, None]).all(2).any()


def test_steps_of_a_diverged_simulation_are_not_learned_from(monkeypatch):
    step = aib_envs.DoubleIntegrator._step

    def diverging(self, action):
        self.count = getattr(self, "count", 0) + 1
        if self.context["mass"] == 0.5 and self.count == 30:
            raise ArithmeticError("too fast")
        return step(self, action)

    monkeypatch.setattr(aib_envs.DoubleIntegrator, "_step", diverging)
    dataset, _, _ = collected()
    assert dataset.lengths[0].tolist() == [29, 100] and (dataset.lengths[1:] == 100).all()
    _, episode, t = dataset.draw(4000)
    assert t[0][episode[0] == 0].max() == 28 and t[0][episode[0] == 1].max() == 99


def test_an_expert_whose_simulations_all_diverge_at_once_ends_nothing():
    history = aib_envs.History(2, 0, 5, 3, 1)
    buffer = StackedReplay(history, 10, "cpu")
    history.lengths[:] = 0, 5
    buffer.add(history)
    assert buffer.sample(7)[0].shape == (2, 7, 3)


# ------------------------------------------------- generated networks ------------------------------------------------


def test_heads_start_in_their_ranges():
    heads = Heads(5, 2)
    assert heads.first.weight.shape == (6 * 256, 256) and heads.last.weight.shape == (257 * 2, 256)
    for head, bound in ((heads.first, 0.05), (heads.last, 0.008)):
        assert 0.999 * bound < head.weight.max() <= bound and -bound <= head.weight.min() < -0.999 * bound
        assert abs(head.weight.mean()) < 0.01 * bound and abs(head.weight.std() - bound / 3**0.5) < 0.01 * bound
        assert (head.bias == 0).all()


def test_sizes():
    count = lambda module: sum(p.numel() for p in module.parameters())
    hypernetwork, mlp = TaskHypernetwork(2, [(4, 2), (6, 1)]), ContextMLP(2, [(4, 2), (6, 1)])
    embed = sum(i * o + o + 4 * (o * o + o) for i, o in ((2, 64), (64, 128), (128, 256)))
    assert count(hypernetwork.embed) == embed == 387_392
    assert [count(heads) for heads in hypernetwork.heads] == [257 * (5 * 256 + 257 * 2), 257 * (7 * 256 + 257)]
    assert [sum(x[0].numel() for x in function.args) for function in hypernetwork(torch.zeros(3, 2))] == [1_794, 2_049]
    assert count(mlp.first) == 9 * 256
    assert [count(network) for network in mlp.rest] == [257 * 256 + 257 * 2, 257 * 256 + 257]
    assert count(ContextMLP(2, [(4, 2)])) == 7 * 256 + 257 * 256 + 257 * 2  # without a Q-function


def explicit_embedding(embed, c):
    """Linear, block, block, three times; a block is x + Linear(ReLU(Linear(ReLU(x))))."""
    for part in embed:
        linear, *blocks = part
        c = linear.weight @ c + linear.bias
        for _, first, _, second in blocks:
            hidden = first.weight @ c.clamp(min=0) + first.bias
            c = c + second.weight @ hidden.clamp(min=0) + second.bias
    return c


def explicit_network(hypernetwork, k, c, x):
    """Network k of context c [dimensions] on one input x, number by number from the heads."""
    heads, inputs = hypernetwork.heads[k], len(x)
    embedding = explicit_embedding(hypernetwork.embed, c)
    first, last = (head.weight @ embedding + head.bias for head in (heads.first, heads.last))
    w1, b1 = first[: inputs * 256].view(inputs, 256), first[inputs * 256 :]
    outputs = len(last) // 257
    w2, b2 = last[: 256 * outputs].view(256, outputs), last[256 * outputs :]
    hidden = (x[:, None] * w1).sum(0) + b1
    return (hidden.clamp(min=0)[:, None] * w2).sum(0) + b2


def test_generated_networks_are_explicit_networks_of_each_sample():
    hypernetwork = TaskHypernetwork(2, [(4, 2), (6, 1)]).double()
    for heads in hypernetwork.heads:  # biases that are seen
        torch.nn.init.normal_(heads.first.bias, std=0.1)
        torch.nn.init.normal_(heads.last.bias, std=0.1)
    context = torch.randn(3, 2).double()
    for k, (inputs, outputs) in enumerate([(4, 2), (6, 1)]):
        x, weight, results = torch.randn(3, 5, inputs).double(), torch.randn(3, 5, outputs).double(), []
        for explicit in (False, True):
            given = [context.clone().requires_grad_(), x.clone().requires_grad_()]
            if explicit:
                rows = [
                    [explicit_network(hypernetwork, k, given[0][i], given[1][i, j]) for j in range(5)] for i in range(3)
                ]
                y = torch.stack([torch.stack(row) for row in rows])
            else:
                y = hypernetwork(given[0])[k](given[1])
            parameters = [*hypernetwork.embed.parameters(), *hypernetwork.heads[k].parameters()]
            results.append([y, *torch.autograd.grad((y * weight).sum(), [*given, *parameters])])
        assert results[0][0].std() > 0.01 and len(results[0]) == 3 + 30 + 4
        for batched, expected in zip(*results, strict=True):
            assert close(batched, expected, 1e-10)


def test_the_mlp_gets_the_context_as_input():
    model, context, x = ContextMLP(2, [(4, 2), (6, 1)]), torch.randn(3, 2), torch.randn(3, 5, 6)
    policy, qf = model(context)
    for i in range(3):
        for function, rest, inputs in ((policy, model.rest[0], x[i, :, :4]), (qf, model.rest[1], x[i])):
            padded = torch.cat([inputs, torch.zeros(5, 6 - inputs.shape[1]), context[i].expand(5, 2)], 1)
            torch.testing.assert_close(function(x[..., : inputs.shape[1]])[i], rest(model.first(padded)))


def test_values_teach_the_mlps_policy_something():  # or UVFA would be MLP
    model, context, x = ContextMLP(2, [(4, 2), (6, 1)]), torch.randn(3, 2), torch.randn(3, 5, 6)
    policy, qf = model(context)
    before = policy(x[..., :4])
    qf(x).sum().backward()
    assert all(p.grad is None for p in model.rest[0].parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert (policy(x[..., :4]) - before).abs().max() > 0.001


# -------------------------------------------------- losses of stage 2 ------------------------------------------------


def make_agent(env_id="DI", **flags):
    task = aib_envs.get_task(env_id)
    return Agent(task.obs_dim + len(task.dimensions), task.act_dim, Args(env_id=env_id, **flags))


def tuples(n=20, size=7):
    """Random contexts and tuples for `Agent.losses`."""
    context, (obs, next_obs) = torch.rand(n, 2) * 2 - 1, torch.randn(2, n, size, 4)
    return context, obs, torch.rand(n, size, 2) * 2 - 1, next_obs, torch.rand(n, size), 10 * torch.rand(n, size)


METHODS = [
    ({}, "HyperZero", ["action", "value", "td"]),
    ({"td": False}, "HyperZero-noTD", ["action", "value"]),
    ({"q": False, "td": False}, "HyperZero-noQ", ["action"]),
    ({"model": "mlp"}, "UVFA", ["action", "value", "td"]),
    ({"model": "mlp", "td": False}, "UVFA-noTD", ["action", "value"]),
    ({"model": "mlp", "q": False, "td": False}, "MLP", ["action"]),
]


@pytest.mark.parametrize(("flags", "method", "terms"), METHODS)
def test_losses_are_their_definitions(flags, method, terms):
    agent = make_agent(gamma=0.9, **flags)
    assert script.method_name(agent.args) == method
    context, obs, actions, next_obs, rewards, q = batch = tuples()
    losses, expected = agent.losses(*batch), {"action": 0, "value": 0, "td": 0}
    assert list(losses) == terms and len(agent.model(context)) == 1 + ("value" in terms)
    for i in range(20):  # one context at a time
        functions = agent.model(context[i : i + 1])
        policy = lambda x, functions=functions: torch.tanh(functions[0](x[None]))[0]
        expected["action"] += (policy(obs[i]) - actions[i]).pow(2).mean() / 20
        if "value" in terms:
            qf = lambda x, a, functions=functions: functions[1](torch.cat([x, a], 1)[None])[0, :, 0]
            expected["value"] += (qf(obs[i], actions[i]) - q[i]).pow(2).mean() / 20
            target = rewards[i] + 0.9 * qf(next_obs[i], policy(next_obs[i]).detach())
            expected["td"] += (target - q[i]).pow(2).mean() / 20
    for name in terms:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-4, atol=1e-6)
    total = sum({"action": 1.0, "value": 0.01, "td": 0.01}[name] * expected[name] for name in terms)
    gradients = torch.autograd.grad(total, list(agent.parameters()))
    assert agent.update(*batch).keys() == set(terms)
    for p, gradient in zip(agent.parameters(), gradients, strict=True):
        assert close(p.grad, gradient, 1e-3)


@pytest.mark.parametrize("model", ["hyper", "mlp"])
def test_td_moves_the_q_function_and_not_the_policy(model):
    agent = make_agent(model=model)
    networks = agent.model.heads if model == "hyper" else agent.model.rest
    losses = agent.losses(*tuples())
    reached = {}
    for name, loss in losses.items():
        for k, network in enumerate(networks):
            found = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
            reached[name, k] = any(g is not None and bool((g != 0).any()) for g in found)
    policy, qf = 0, 1
    assert reached["action", policy] and not reached["action", qf]
    assert reached["value", qf] and not reached["value", policy]
    assert reached["td", qf] and not reached["td", policy]
    if model == "hyper":  # the task embedding learns from all of them
        for loss in losses.values():
            found = torch.autograd.grad(loss, list(agent.model.embed.parameters()), retain_graph=True)
            assert all((g != 0).any() for g in found)


@pytest.mark.parametrize("model", ["hyper", "mlp"])
def test_an_agent_acts_by_the_network_of_each_context(model):
    agent, contexts = make_agent(model=model), aib_envs.eval_contexts("DI")
    obs = np.random.default_rng(0).standard_normal((60, 6)).astype(np.float32)
    obs[:, 4:] = [aib_envs.context_vector("DI", context, scaled=True) for context in contexts]
    history = aib_envs.History(60, agent.window_size, 100, 6, 2)
    first = agent.act(obs, history)
    policy = lambda i: agent.model(torch.from_numpy(obs[i : i + 1, 4:]))[0](torch.from_numpy(obs[i : i + 1, None, :4]))
    for i in (0, 25, 59):
        np.testing.assert_allclose(first[i], policy(i)[0, 0].tanh().detach(), rtol=1e-4, atol=1e-6)
    history.t = 1
    np.testing.assert_array_equal(agent.act(obs, history), first)
    obs[25, 4:] = obs[59, 4:]  # an inversion within the episode, as report.py makes them
    switched = agent.act(obs, history)
    np.testing.assert_allclose(switched[25], policy(25)[0, 0].tanh().detach(), rtol=1e-4, atol=1e-6)
    assert not np.allclose(switched[25], first[25]) and np.array_equal(switched[:25], first[:25])
    obs[25, 4:] = aib_envs.context_vector("DI", contexts[25], scaled=True)
    agent.update(*tuples())
    history.begin()
    assert not np.array_equal(agent.act(obs, history), first)  # a new episode, new networks


def test_it_learns_a_policy_that_depends_on_the_context():
    """a* = c tanh(s), with c = -1 or 1, at contexts between those of training."""
    agent = make_agent(hyper_lr=1e-3)
    context = torch.stack([torch.linspace(-1, 1, 20), torch.tensor([-1.0, 1.0]).repeat(10)], 1)
    expert = lambda context, obs: context[:, None, 1:] * torch.tanh(obs[..., :2])
    for _ in range(150):
        obs, next_obs = torch.randn(2, 20, 16, 4)
        agent.update(context, obs, expert(context, obs), next_obs, torch.zeros(20, 16), torch.ones(20, 16))
    context, obs = torch.tensor([[0.07, 1.0], [0.07, -1.0]]), torch.randn(2, 200, 4)
    error = agent.model(context)[0](obs).tanh() - expert(context, obs)
    assert error.abs().mean() < 0.15


# ---------------------------------------------------- runs, end to end -----------------------------------------------

SHORT = ["--env-id", "DI", "--total-timesteps", "150", "--learning-starts", "100", "--eval-every", "100"]
SHORT += ["--batch-size", "8", "--rollouts", "2"]
STAGE_2 = ["--epochs", "3", "--eval-epochs", "2", "--hyper-batch-size", "400", "--eval-rollouts", "1"]


def only_run(directory):
    (run,) = directory.iterdir()
    return run


def metrics_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k != "seconds"} for m in lines]


def results_of(directory):
    return json.loads((directory / "results.json").read_text())


def outcome(directory):
    """What a run has learned, without what depends on time."""
    results, agent = results_of(directory), torch.load(directory / "agent.pt", weights_only=True)
    return metrics_of(directory), results["returns"], results["experts"], [x.tolist() for x in agent.values()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a finished run of both stages. Not to be changed."""
    runs = tmp_path_factory.mktemp("finished")
    assert call(script, *SHORT, *STAGE_2, "--keep-checkpoint", "--run-dir", runs) == 0
    return only_run(runs)


def check_results(directory, method, terms):
    results, metrics = results_of(directory), metrics_of(directory)
    config = json.loads((directory / "config.json").read_text())
    assert results["method"] == config["method"] == directory.name.split("__")[1] == method
    assert config["args"]["total_timesteps"] == 150 and len(results["experts"]) == 20
    stage_2 = [m for m in metrics if "aer" in m]
    assert [(m["epoch"], m["global_step"]) for m in stage_2] == [(0, 150), (2, 152), (3, 153)]
    for m in stage_2:
        assert m["experts"] == results["experts"] and m["env_steps"] == 20 * (100 + 150 + 2 * 100)
        assert list(m["losses"]) == (terms if m["epoch"] else [])
    for split, aer in stage_2[-1]["aer"].items():
        assert np.mean(results["returns"][split]) == pytest.approx(aer)
    return [m for m in metrics if "aer" not in m]


def test_both_stages(finished):
    stage_1 = check_results(finished, "HyperZero", ["action", "value", "td"])
    assert [m["global_step"] for m in stage_1] == [0, 100] and all(len(m["experts"]) == 20 for m in stage_1)
    assert [m["env_steps"] for m in stage_1] == [20 * (100 + step + 1) for step in (0, 100)]
    data = torch.load(finished / "dataset.pt", weights_only=True)
    assert data["env_id"] == "DI" and data["args"]["total_timesteps"] == 150 and data["args"]["rollouts"] == 2
    experts = data["dataset"]["rewards"].sum(2).mean(1).tolist()
    assert results_of(finished)["experts"] == pytest.approx(experts)


@pytest.mark.parametrize(("flags", "method"), [([], "HyperZero"), (["--model", "mlp", "--no-q", "--no-td"], "MLP")])
def test_stage_2_alone(flags, method, finished, tmp_path):
    assert call(script, "--dataset", finished, *STAGE_2, "--run-dir", tmp_path, *flags) == 0
    directory = only_run(tmp_path)
    assert not check_results(directory, method, ["action", "value", "td"] if method == "HyperZero" else ["action"])
    if method == "HyperZero":  # it is the same as after stage 1
        assert outcome(directory)[1:] == outcome(finished)[1:]
        assert metrics_of(directory) == metrics_of(finished)[2:]
        assert call(script, "--eval-only", directory) == 0


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["Cartpole", "aib_speed:Cheetah-Speed-Length", "aib_speed:Finger-Speed-Length"])
def test_mujoco(env_id, tmp_path, monkeypatch):
    task = dataclasses.replace(aib_envs.get_task(env_id), steps=100)
    monkeypatch.setitem(aib_envs.TASKS, aib_envs.task_name(env_id), task)
    flags = ("--env-id", env_id, "--total-timesteps", 6, "--learning-starts", 100, "--batch-size", 8)
    flags += ("--rollouts", 1, "--epochs", 1, "--eval-rollouts", 1, "--run-dir", tmp_path)
    assert call(script, *flags) == 0
    experts = results_of(only_run(tmp_path))["experts"]
    assert all(0 <= x < 100 for x in experts)
    assert "Finger" in env_id or min(experts) > 0  # what does not spin earns nothing


@pytest.mark.parametrize(("fraction", "number"), [(0, 0), (0.03, 1), (0.15, 3), (0.75, 15), (1.0, 19)])
def test_contexts_are_held_out_at_random(fraction, number):
    held_out, seen = script.split_contexts(20, fraction, seed=1)
    assert len(held_out) == number and sorted(held_out + seen) == list(range(20))
    assert number in (0, 19) or held_out != script.split_contexts(20, fraction, seed=2)[0]


def test_what_an_expert_did_is_learned_for_its_own_context(finished, monkeypatch, tmp_path):
    directory = Path(shutil.copytree(finished, tmp_path / finished.name))
    data = torch.load(directory / "dataset.pt", weights_only=True)
    data["dataset"]["actions"][:] = torch.arange(20.0)[:, None, None, None] / 20  # which context it is
    torch.save(data, directory / "dataset.pt")
    calls, update = [], script.Agent.update
    monkeypatch.setattr(script.Agent, "update", lambda self, *batch: calls.append(batch) or update(self, *batch))
    flags = ["--dataset", directory, "--held-out", 0.15, "--epochs", 1, "--run-dir", tmp_path / "runs"]
    assert call(script, *flags, "--eval-rollouts", 1) == 0
    contexts = aib_envs.context_set("DI", "train")
    seen = set(range(20)) - set(results_of(only_run(tmp_path / "runs"))["held_out"])
    assert calls and len(seen) == 17
    for vectors, _, actions, *_ in calls:
        numbers = (20 * actions[:, :, 0]).round().int()
        assert vectors.shape == (17, 2) and (numbers == numbers[:, :1]).all() and set(numbers[:, 0].tolist()) == seen
        for vector, i in zip(vectors, numbers[:, 0].tolist(), strict=True):
            np.testing.assert_allclose(vector, aib_envs.context_vector("DI", contexts[i], scaled=True))


def stop_at(monkeypatch, line, how):
    """From now on, runs end (or are asked to) when they have written this line of metrics.jsonl."""
    log = aib_run.Run.log

    def log_and_stop(self, *args):
        log(self, *args)
        if len(metrics_of(self.directory)) == line:
            how()

    monkeypatch.setattr(aib_run.Run, "log", log_and_stop)


def kill():
    raise KeyboardInterrupt


def ask():
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("in_stage_1", "in_stage_2"), [((kill, 2), (ask, 3)), ((ask, 1), (kill, 4))])
def test_ended_in_both_stages_and_resumed_it_is_the_same_run(in_stage_1, in_stage_2, finished, monkeypatch, tmp_path):
    flags = [*SHORT, *STAGE_2, "--keep-checkpoint", "--run-dir", tmp_path]
    for how, line in (in_stage_1, in_stage_2):
        with monkeypatch.context() as patch:
            stop_at(patch, line, how)
            assert call(script, *flags) == (130 if how == kill else 128 + signal.SIGTERM)
        flags = ["--resume", only_run(tmp_path)]
    assert not (only_run(tmp_path) / "results.json").exists()
    assert call(script, *flags) == 0
    assert outcome(only_run(tmp_path)) == outcome(finished)


def test_a_run_with_another_runs_data_set_goes_on_without_it(finished, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "data")
    with monkeypatch.context() as patch:
        stop_at(patch, 1, ask)
        patch.setenv("HOME", str(tmp_path))
        assert call(script, "--dataset=~/data", *STAGE_2, "--run-dir", "runs") == 128 + signal.SIGTERM
    shutil.rmtree("data")
    monkeypatch.chdir("/")
    directory = only_run(tmp_path / "runs")
    assert call(script, "--resume", directory) == 0
    assert outcome(directory)[1:] == outcome(finished)[1:]


# ------------------------------------------------------- bad input ---------------------------------------------------


def change(path, **changes):
    torch.save(torch.load(path, weights_only=True) | changes, path)


DATASET = "--env-id DI --dataset {d}"


@pytest.mark.parametrize(
    ("prepare", "flags", "named"),
    [
        (None, "--no-q", "--no-td"),
        (None, "--epochs 0", "--epochs"),
        (None, "--held-out 1.5", "--held-out"),
        (None, "--learning-starts 50", "--learning-starts"),
        (None, "--env-id DI --dataset nowhere", "nowhere/dataset.pt"),
        (None, "--env-id DI-Perm --dataset {d}", "{d}/dataset.pt"),
        (None, DATASET + " --total-timesteps 300", "--total-timesteps 150"),
        (None, DATASET + " --gamma 0.9", "--gamma 0.99"),
        (lambda d: change(d / "dataset.pt", dataset={}), DATASET, "{d}/dataset.pt"),
        (lambda d: torch.save({"env_id": "DI"}, d / "dataset.pt"), DATASET, "{d}/dataset.pt"),
        (None, "--resume {d}", "{d}"),
        (None, "--resume {d} --dataset {d}", "--dataset"),
        (lambda d: (d / "results.json").unlink(), "--resume {d} --total-timesteps 300", "--total-timesteps"),
    ],
)
def test_bad_input_gets_one_line_and_nothing_is_written(prepare, flags, named, finished, tmp_path, capsys):
    directory = Path(shutil.copytree(finished, tmp_path / finished.name))
    if prepare:
        prepare(directory)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    flags = [flag.replace("{d}", str(directory)) for flag in flags.split()]
    flags += [] if "--resume" in flags else ["--run-dir", str(tmp_path / "runs")]
    capsys.readouterr()
    assert call(script, *flags) == 2
    out, err = capsys.readouterr()
    assert named.replace("{d}", str(directory)) in err and len(err.splitlines()) == 1 and not out
    assert before == {path: path.read_bytes() for path in directory.iterdir()} and not (tmp_path / "runs").exists()


def test_what_is_not_finite_stops_the_run(finished, tmp_path):
    directory = Path(shutil.copytree(finished, tmp_path / "data"))
    data = torch.load(directory / "dataset.pt", weights_only=True)
    data["dataset"]["q"][:] = 1e30  # its square is not finite
    torch.save(data, directory / "dataset.pt")
    assert call(script, "--dataset", directory, *STAGE_2, "--run-dir", tmp_path / "runs") == 3
    assert not (only_run(tmp_path / "runs") / "results.json").exists()


def test_nothing_to_learn_from_stops_the_run(monkeypatch, tmp_path, capsys):
    def diverging(self, action):
        raise ArithmeticError("too fast")

    monkeypatch.setattr(aib_envs.DoubleIntegrator, "_step", diverging)
    assert call(script, *SHORT, *STAGE_2, "--run-dir", tmp_path) == 3
    assert "every simulation diverged" in capsys.readouterr().err.splitlines()[-1]
