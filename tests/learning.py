"""What the tests of the algorithms share: scripts as modules, agents with something to learn from, short runs."""

import functools
import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

import aib_envs
import aib_run
from tools import sync
from tools.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sync.SCRIPTS
_number = itertools.count()

# The rows of the table whose scripts stand in the root: relatives have tests of their own
MAIN_METHODS = [method for method in METHODS.values() if "/" not in method.script and (ROOT / method.script).exists()]


def load(path):
    """A new module from a script."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_{next(_number)}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def script(name):
    """The module of a script, by its path from the root."""
    return load(ROOT / name)


def parse(module, flags):
    return aib_run.parse_args(module.Args, flags.split() if isinstance(flags, str) else flags)


def make_agent(module, env_id="DI", **flags):
    args = module.Args(env_id=env_id, **flags)
    return module.make_agent(args, module.make_envs(args, [{}]))


def random_buffer(module, agent, episodes=2, lengths=None):
    """A replay buffer of random episodes, with the true contexts where the agent sees them."""
    env_id = agent.args.env_id
    task = aib_envs.get_task(env_id)
    contexts = aib_envs.context_set(env_id, "train")
    envs = module.make_envs(agent.args, [{}])
    obs_dim = envs.single_observation_space.shape[0]
    history = aib_envs.History(20, agent.window_size, task.steps, obs_dim, task.act_dim)
    buffer = module.ReplayBuffer(history, episodes * task.steps, "cpu")
    rng = np.random.default_rng(0)
    for _ in range(episodes):
        for array in (history.obs, history.actions, history.next_obs, history.rewards):
            array[:] = rng.standard_normal(array.shape)
        if obs_dim > task.obs_dim:
            scaled = agent.args.scale_context
            vectors = np.stack([aib_envs.context_vector(env_id, context, scaled) for context in contexts])
            history.obs[:, :, task.obs_dim :] = vectors[:, None]
            history.next_obs[:, :, task.obs_dim :] = vectors[:, None]
        history.lengths[:] = task.steps if lengths is None else lengths
        buffer.add(history)
    return buffer


def learner(module, env_id="DI", **flags):
    """An agent and a buffer of random episodes."""
    agent = make_agent(module, env_id, **flags)
    return agent, random_buffer(module, agent)


def short_episode(module, args, contexts=2, steps=4):
    """An agent and a buffer that holds one episode, of a warm-up and a few steps with the agent's own actions."""
    envs = module.make_envs(args, aib_envs.context_set(args.env_id, "train")[:contexts])
    obs_dim = envs.single_observation_space.shape[0]
    act_dim = envs.single_action_space.shape[0]
    agent = module.make_agent(args, envs)
    history = aib_envs.History(contexts, agent.window_size, steps, obs_dim, act_dim)
    buffer = module.ReplayBuffer(history, steps, "cpu")
    obs, _ = envs.reset(seed=0)
    for t in range(-agent.window_size, steps):
        actions = agent.act(obs, history, training=t < steps - 2)
        next_obs, rewards, _, _, infos = envs.step(actions)
        history.add(obs, actions, rewards, next_obs, infos["diverged"])
        obs = next_obs
    buffer.add(history)
    return agent, buffer


def update(agent, buffer, steps=1, batch_size=32, reward_scale=1.0):
    """Gradient steps; returns the losses of the last one."""
    for step in range(steps):
        obs, actions, next_obs, rewards, *rest = buffer.sample(batch_size)
        losses = agent.update(obs, actions, next_obs, reward_scale * rewards, *rest, step % 2 == 0)
    return losses


def weights(agent):
    return {name: p.detach().clone() for name, p in agent.named_parameters()}


def same(one, other):
    """Are two dicts of tensors the same to the bit?"""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
